"""Models: built from a preset or loaded from a folder, and split where the vocabulary loss needs them split.

What is specific to a family stands in `codistill.families`. Shape suffixes: B sequences, T position,
D width, N predicted rows, V vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from codistill.attention import use_short_attention
from codistill.config import ModelConfig
from codistill.data.tokenizers import load_tokenizer
from codistill.errors import UserError
from codistill.families import FAMILIES, Family
from codistill.families.supported import check_config, check_folder, check_model, check_objective
from codistill.seeds import seed_of

# Models here load and save in a moment, beside a progress bar of our own.
transformers_logging.disable_progress_bar()


class Predictor(nn.Module):
    """A masked or causal LM that stops before its output embedding, and after choosing the predicted rows.

    `forward(inputs, rows_N)` gives the features (N, D); logits are features @ `output_weight`ᵀ + `output_bias`, of
    which the first `vocabulary` are tokens.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int):
        super().__init__()
        check_model(model)
        family = FAMILIES[model.config.model_type]
        use_short_attention(model)
        self.model, self.vocabulary = model, vocabulary
        # In lists, so that the parts are not registered twice, and looked up once, because a walk through module names
        # costs more than a tiny model's layer norm.
        transform = nn.Identity() if family.transform is None else model.get_submodule(family.transform)
        self._parts = [model.get_submodule(family.backbone), transform]
        self._output = [cast(nn.Linear, model.get_submodule(family.output))]
        self._options = call_options(model)

    def forward(self, inputs: Mapping[str, Tensor], rows_N: Tensor) -> Tensor:
        backbone, transform = self._parts
        hidden_BTD = backbone(**inputs, **self._options).last_hidden_state
        return transform(hidden_BTD.flatten(0, 1).index_select(0, rows_N))

    @property
    def output_weight(self) -> Tensor:
        """(at least V, D): rows beyond the tokenizer's vocabulary are for the loss to cut."""
        return self._output[0].weight

    @property
    def output_bias(self) -> Tensor | None:
        """As long as `output_weight`, or None."""
        return self._output[0].bias

    @property
    def num_parameters(self) -> int:
        """Tied tensors count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def call_options(model: PreTrainedModel) -> dict[str, bool]:
    """What to call `model` with in training: one that keeps keys and values takes documents for one another's past."""
    return {"use_cache": False} if FAMILIES[model.config.model_type].objective == "clm" else {}


def new_model(
    config: ModelConfig,
    *,
    vocabulary: int,
    length: int,
    tokenizer: PreTrainedTokenizerFast | None,
    seed: int,
    name: str,
) -> PreTrainedModel:
    """A model of `config` with parameters that depend on (seed, name) only: not on the rest of the cohort.

    `length`: the longest sequence in tokens that it must take. Built on the current default device.
    """
    family = FAMILIES[config.family]
    hugging_face_config = family.configure(config, max(length, 512))
    hugging_face_config.vocab_size = vocabulary
    for token, number in _special_tokens(tokenizer, family).items():
        setattr(hugging_face_config, f"{token}_token_id", number)
    torch.manual_seed(seed_of(seed, "initialisation", name))
    return family.model(hugging_face_config)


def load_model(path: str, field: str, objective: str | None = None, *, needs_head: bool = True) -> PreTrainedModel:
    """The LM in a folder or of a hub name, in float32; raises UserError naming `field`, also for one that is not made
    for `objective`, where one is given. Without `needs_head` its LM head may be missing there, and is then random."""
    check_folder(Path(path), field)
    if _is_local(path) and not (Path(path) / "config.json").is_file():
        raise UserError(f"{field}: {path!r} is no model folder (it has no config.json); give a folder or a hub name")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{field}: {path!r} cannot be loaded: {_first_line(error)}") from None
    check_config(config, path, field)
    if objective is not None:
        check_objective(config.model_type, objective, f"{field}: {path!r}")
    return _load_weights(path, FAMILIES[config.model_type], field, needs_head)


def load_own_tokenizer(path: str) -> PreTrainedTokenizerFast | None:
    """The tokenizer stored beside a model, or None where there is none; raises UserError for one that is unreadable."""
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
    if _is_local(path) and not any((Path(path) / file).is_file() for file in files):
        return None
    return load_tokenizer(path)


def _special_tokens(tokenizer: PreTrainedTokenizerFast | None, family: Family) -> dict[str, int | None]:
    """Ids by role; for a causal model the tokens that begin and end a text where only BERT's names for them exist."""
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("pad", "bos", "eos", "cls", "sep")}
    if family.objective == "clm":
        for role, name in (("bos", "cls"), ("eos", "sep")):
            ids[role] = ids[name] if ids[role] is None else ids[role]
    return ids


def _load_weights(path: str, family: Family, field: str, needs_head: bool) -> PreTrainedModel:
    auto, kind = {
        "mlm": (AutoModelForMaskedLM, "masked"),
        "clm": (AutoModelForCausalLM, "causal"),
    }[family.objective]
    try:
        model, report = auto.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # safetensors and the hub have error types of their own, none of them documented
        raise UserError(f"{field}: the weights in {path!r} cannot be read: {_first_line(error)}") from None
    needed = "" if needs_head else f"{family.backbone}."
    missing = sorted(key for key in report["missing_keys"] if key.startswith(needed))
    if missing:
        raise UserError(
            f"{field}: {path!r} lacks {len(missing)} tensors of a {kind} LM ({', '.join(missing[:3])}…); "
            f"give a model that was saved with its {kind}-LM head"
        )
    return model


def _is_local(path: str) -> bool:
    return Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
