"""Models: built from a preset or loaded from a folder, and split where the vocabulary loss needs them split.

What is specific to a family stands in `FAMILIES`, and nowhere else. Shape suffixes: B sequences, T position,
D width, N predicted rows, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from codistill.config import ModelConfig
from codistill.data.tokenizers import load_tokenizer
from codistill.errors import UserError
from codistill.seeds import seed_of

# Models here load and save in a moment, beside a progress bar of our own.
transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Family:
    """Where an architecture keeps its backbone, the head's transform and the output embedding; how to configure it."""

    model: type[PreTrainedModel]
    backbone: str
    transform: str
    output: str
    configure: Callable[[ModelConfig, int], PreTrainedConfig]


class Predictor(nn.Module):
    """A masked LM that stops before its output embedding, and after choosing the predicted rows.

    `forward(inputs, rows_N)` gives the features (N, D); logits are features @ `output_weight`ᵀ + `output_bias`, of
    which the first `vocabulary` are tokens.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int):
        super().__init__()
        family = FAMILIES[model.config.model_type]
        self.model, self.vocabulary = model, vocabulary
        # In lists, so that the parts are not registered twice, and looked up once, because a walk through module names
        # costs more than a tiny model's layer norm.
        self._parts = [model.get_submodule(name) for name in (family.backbone, family.transform)]
        self._output = [cast(nn.Linear, model.get_submodule(family.output))]

    def forward(self, inputs: Mapping[str, Tensor], rows_N: Tensor) -> Tensor:
        backbone, transform = self._parts
        hidden_BTD = backbone(**inputs).last_hidden_state
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
    for token in ("pad", "bos", "eos", "cls", "sep"):
        setattr(hugging_face_config, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id", None))
    torch.manual_seed(seed_of(seed, "initialisation", name))
    return family.model(hugging_face_config)


def load_model(path: str, field: str) -> PreTrainedModel:
    """The masked LM in a Hugging Face folder or of a hub name, in float32; raises UserError naming `field`."""
    if _is_local(path) and not (Path(path) / "config.json").is_file():
        raise UserError(f"{field}: {path!r} is no model folder (it has no config.json); give a folder or a hub name")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{field}: {path!r} cannot be loaded: {_first_line(error)}") from None
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{field}: {path!r} is of the family {config.model_type!r}; supported are {', '.join(FAMILIES)}"
        )
    return _load_weights(path, field)


def load_own_tokenizer(path: str) -> PreTrainedTokenizerFast | None:
    """The tokenizer stored beside a model, or None where there is none; raises UserError for one that is unreadable."""
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
    if _is_local(path) and not any((Path(path) / file).is_file() for file in files):
        return None
    return load_tokenizer(path)


def _load_weights(path: str, field: str) -> PreTrainedModel:
    try:
        model, report = AutoModelForMaskedLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # safetensors and the hub have error types of their own, none of them documented
        raise UserError(f"{field}: the weights in {path!r} cannot be read: {_first_line(error)}") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{field}: {path!r} lacks {len(missing)} tensors of a masked LM ({', '.join(missing[:3])}…); "
            "give a model that was saved with its masked-LM head"
        )
    return model


def _is_local(path: str) -> bool:
    return Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# ---- families ----------------------------------------------------------------------------------


def _heads(config: ModelConfig) -> int:
    return config.heads or max(config.width // 64, 1)


def _bert(config: ModelConfig, positions: int) -> BertConfig:
    return BertConfig(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=_heads(config),
        intermediate_size=config.feed_forward or 4 * config.width,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        max_position_embeddings=positions,
    )


def _modernbert(config: ModelConfig, positions: int) -> ModernBertConfig:
    return ModernBertConfig(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=_heads(config),
        intermediate_size=config.feed_forward or 3 * config.width // 2,
        attention_dropout=config.dropout,
        mlp_dropout=config.dropout,
        embedding_dropout=config.dropout,
        max_position_embeddings=positions,
    )


FAMILIES: Mapping[str, Family] = {
    "bert": Family(BertForMaskedLM, "bert", "cls.predictions.transform", "cls.predictions.decoder", _bert),
    "modernbert": Family(ModernBertForMaskedLM, "model", "head", "decoder", _modernbert),
}
