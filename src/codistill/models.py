"""Models: built from a preset or loaded from a folder, and split where the vocabulary loss needs them split.

What is specific to a family stands in `codistill.families`. Shape suffixes: B sequences, T position,
D width, N predicted rows, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from codistill.attention import unread_masks, use_short_attention
from codistill.config import KINDS, ModelConfig
from codistill.data.tokenizers import load_tokenizer, own_padding
from codistill.errors import UserError, first_line
from codistill.families import (
    FAMILIES,
    Family,
    Parts,
    family_of,
    first_position,
    is_causal,
    is_in_the_table,
    layers_of,
    local_windows,
    split,
)
from codistill.families.ahead import check_sight, looks_ahead
from codistill.families.supported import (
    check_finite,
    check_folder,
    check_full_precision,
    check_model,
    check_objective,
    check_output,
    check_supported,
)
from codistill.folders import is_local
from codistill.seeds import seed_of

# Models here load and save in a moment, beside a progress bar of our own.
transformers_logging.disable_progress_bar()

Objective = Literal["mlm", "clm"]
_LOADERS = {"mlm": AutoModelForMaskedLM, "clm": AutoModelForCausalLM}


class Predictor(nn.Module):
    """A masked or causal LM that stops before its output embedding, and after choosing the predicted rows.

    `forward(inputs, rows_N)` gives the features (N, D); `position_ids` among the inputs count from 0 in every family.
    Logits are features @ `output_weight`ᵀ + `output_bias`, of which the first `vocabulary` are tokens. Takes any
    Hugging Face model: of a known family, or of one whose output embedding is proven to give its logits (raises
    UserError for any other); for other modules see `from_module`. Sets such a model's attention implementation, where
    it is "sdpa", to one that is faster for short bfloat16 sequences on a CPU.
    """

    def __init__(self, model: nn.Module, vocabulary: int, parts: Parts | None = None):
        super().__init__()
        if isinstance(model, PreTrainedModel):
            check_model(model)
            use_short_attention(model)
        self.model, self.vocabulary = model, vocabulary
        self.is_from_module = parts is not None  # what it predicts is its maker's to know
        # Looked up once, because a walk through module names costs more than a tiny model's layer norm. Who gives parts
        # of their own takes a batch's inputs as they are: what these mean is theirs to say.
        self._parts = parts or split(model)
        self._first_position = 0 if parts else first_position(model)
        self._windows = [] if parts else local_windows(model)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        features: Callable[[Mapping[str, Tensor], Tensor], Tensor],
        output: nn.Module | None = None,
        *,
        vocabulary: int,
    ) -> "Predictor":
        """A predictor of any module, from `features(inputs, rows_N)`, a function of a batch's inputs and its rows.

        It gets the inputs as they are, and gives (N, D); `output`, a part of `module`, has a `weight` (at least V, D)
        and maybe a `bias`. Without `output` it gives the logits themselves (N, at least V), which go through the
        reference loss: plain autograd on N × V tensors. `module` holds all parameters, the output's too. Raises
        UserError where `output` has no weight of that shape, or parameters that `module` has not.
        """
        if output is not None:
            check_output(output, module, vocabulary)
        return cls(module, vocabulary, Parts(features, output))

    def forward(self, inputs: Mapping[str, Tensor], rows_N: Tensor) -> Tensor:
        if self._first_position and "position_ids" in inputs:
            inputs = {**inputs, "position_ids": inputs["position_ids"] + self._first_position}
        mask = inputs.get("attention_mask")
        if self._windows and mask is not None and mask.dim() == 4:
            by_kind: dict[str, Any] = {"attention_mask": _for_each_kind_of_layer(mask, self._windows)}
            inputs = {**inputs, **by_kind}
        with unread_masks(inputs, rows_N.device):
            return self._parts.features(inputs, rows_N)

    @property
    def output_weight(self) -> Tensor | None:
        """(at least V, D): rows beyond the vocabulary are for the loss to cut. None: the features are logits."""
        return self._parts.weight

    @property
    def output_bias(self) -> Tensor | None:
        """As long as `output_weight`, or None."""
        return self._parts.bias

    def logits(self, features_ND: Tensor) -> Tensor:
        """(N, V), in float32 at least."""
        wide_NV = features_ND.to(torch.promote_types(features_ND.dtype, torch.float32))
        if self.output_weight is not None:
            bias_V = None if self.output_bias is None else self.output_bias[: self.vocabulary].to(wide_NV.dtype)
            return functional.linear(wide_NV, self.output_weight[: self.vocabulary].to(wide_NV.dtype), bias_V)
        return wide_NV[:, : self.vocabulary]

    @cached_property
    def layers(self) -> Sequence[nn.Module]:
        """Those that put out the model's hidden states; none where that is not proven."""
        return layers_of(self.model) if self._parts.layers is None else self._parts.layers

    @cached_property
    def looks_ahead(self) -> bool:
        """Whether the model sees later tokens, found by running it once; waits for the device."""
        return looks_ahead(self.model, self._parts, self.vocabulary)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.parameters()).device

    @property
    def num_parameters(self) -> int:
        """Tied tensors count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def _for_each_kind_of_layer(mask_B1TT: Tensor, windows: Sequence[int]) -> dict[str, Tensor]:
    """transformers gives a whole mask to every layer as it is; a local layer needs it cut to its window. UserError
    where local layers have several."""
    if len(windows) > 1:
        raise UserError(
            f"attention_mask: one for each pair of positions, as documents kept apart need it, but the model's local "
            f"layers have windows of {' and '.join(map(str, windows))}; leave data.within_documents out, or give "
            "another model"
        )
    position_T = torch.arange(mask_B1TT.shape[-1], device=mask_B1TT.device)
    is_far_TT = (position_T[:, None] - position_T).abs() > windows[0]
    nothing = False if mask_B1TT.dtype == torch.bool else torch.finfo(mask_B1TT.dtype).min
    return {"full_attention": mask_B1TT, "sliding_attention": mask_B1TT.masked_fill(is_far_TT, nothing)}


@torch.no_grad()
def check_documents_apart(predictor: Predictor, field: str) -> None:
    """UserError unless a model that is not of the table keeps the documents of a row apart: with another first document
    the features of the second have to stay as they are."""
    model = cast(PreTrainedModel, predictor.model)
    if is_in_the_table(model):
        return
    was_training, half = model.training, 8
    ids_BT = torch.arange(2 * half, device=predictor.device)[None] % predictor.vocabulary
    position_T = torch.arange(half, device=predictor.device).repeat(2)
    inputs = {"position_ids": position_T[None]}
    if not is_causal(model):
        number_T = torch.arange(2 * half, device=predictor.device) // half
        inputs["attention_mask"] = (number_T[:, None] == number_T)[None, None]
    rows_N = torch.arange(half, 2 * half, device=predictor.device)
    try:
        one, other = (
            predictor.eval()({"input_ids": torch.cat([first, ids_BT[:, half:]], 1), **inputs}, rows_N)
            for first in (ids_BT[:, :half], ids_BT[:, :half].flip(1))
        )
        moved = ((one - other).abs().max() / one.abs().max()).item()
        reason = f"with another first document the second one's features move by {moved:.1g}" if moved > 1e-5 else ""
    except UserError as refusal:
        raise UserError(f"{field}: {refusal}") from None
    except Exception as failure:  # whatever a stranger's forward raises
        reason = f"{type(failure).__name__} with such inputs"
    finally:
        predictor.train(was_training)
    if reason:
        raise UserError(
            f"data.within_documents: {field} is a {model.config.model_type}, which does not keep documents apart "
            f"({reason}); give another family, or leave it out"
        )


def call_options(model: PreTrainedModel) -> dict[str, bool]:
    """What to call `model` with in training: one that keeps keys and values takes documents for one another's past."""
    return {"use_cache": False} if is_causal(model) else {}


def new_model(
    config: ModelConfig,
    *,
    vocabulary: int,
    length: int,
    tokenizer: PreTrainedTokenizerFast | None,
    seed: int,
    name: str,
    given: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """A model of `config` with parameters that depend on (seed, name) only: not on the rest of the cohort.

    `length`: the longest sequence in tokens that it must take. `given`: the Hugging Face configuration to take instead,
    which lacks at most special tokens. Built on the current default device.
    """
    family = FAMILIES[config.family]
    hugging_face_config = given or family.configure(config, max(length, 512))
    if given is None:
        hugging_face_config.vocab_size = vocabulary
    for token, number in _special_tokens(tokenizer, family).items():
        if given is None or getattr(given, f"{token}_token_id", None) is None:
            setattr(hugging_face_config, f"{token}_token_id", number)
    if given is None and family.counts_from_padding:
        if hugging_face_config.pad_token_id is None and tokenizer is not None:
            raise UserError(
                f"members.{name}.model.family: {config.family} counts positions from its padding token, and the "
                "tokenizer has none of its own; take a tokenizer with one, or another family"
            )
        hugging_face_config.pad_token_id = hugging_face_config.pad_token_id or 0
        hugging_face_config.max_position_embeddings += hugging_face_config.pad_token_id + 1
    torch.manual_seed(seed_of(seed, "initialisation", name))
    model = family.model(hugging_face_config)
    if family.objective == "clm":
        cast(Any, model).generation_config.pad_token_id = getattr(tokenizer, "pad_token_id", None)
    return model


def load_model(
    path: str,
    field: str,
    objective: Objective | None = None,
    *,
    needs_head: bool = True,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The LM in a folder or of a hub name, in float32; raises UserError naming `field`.

    `objective`: what it is to be trained for, where one is given; a model of another kind is refused, by its family or
    by what it looks at, and one of a family that we do not know is loaded for it. Without `needs_head` its LM head may
    be missing there, and is then random. `trust_remote_code`: whether Python code that comes with it may be run.
    """
    check_folder(Path(path), field)
    if is_local(path) and not (Path(path) / "config.json").is_file():
        raise UserError(f"{field}: {path!r} is no model folder (it has no config.json); give a folder or a hub name")
    try:
        config_dict, _ = PreTrainedConfig.get_config_dict(path)
        if "auto_map" in config_dict and config_dict.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
            raise UserError(
                f"{field}: {path!r} comes with code of its own, which runs only if you trust it: read it, then give "
                f"{field.removesuffix('.path')}.trust_remote_code: true"
            )
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        nowhere = "" if Path(path).exists() else "there is no such folder here; from the hub: "
        raise UserError(f"{field}: {path!r} cannot be loaded: {nowhere}{first_line(error)}") from None
    check_full_precision(config, path, field)
    if objective is not None:
        check_objective(config.model_type, objective, f"{field}: {path!r}")
    family = family_of(config)
    objective = family.objective if family is not None else objective or "mlm"
    check_supported(config, objective, path, field, trusted=trust_remote_code)
    model = _load_weights(path, field, config, objective, trust_remote_code, needs_head)
    check_finite(model, f"{field}: {path!r}")
    try:
        parts = split(model)
    except UserError as error:
        raise UserError(f"{field}: {path!r} is of the family {error}; supported are {', '.join(FAMILIES)}") from None
    check_sight(model, parts, objective, f"{field}: {path!r}")
    return model


def train_all_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None) -> None:
    """Gives the input embedding a gradient for every token that stands in a text, in place.

    A model's configuration names a padding token, whose embedding then gets none; where that token has another role
    too, as the one that ends a text, or the tokenizer pads with another, it is seen and has to learn. Padding itself
    is hidden, or comes after what is predicted, so it adds nothing.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding) and embedding.padding_idx != own_padding(tokenizer):
        embedding.padding_idx = None


def load_own_tokenizer(path: str) -> PreTrainedTokenizerFast | None:
    """The tokenizer stored beside a model, or None where there is none; raises UserError for one that is unreadable."""
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
    if is_local(path) and not any((Path(path) / file).is_file() for file in files):
        return None
    return load_tokenizer(path)


def _special_tokens(tokenizer: PreTrainedTokenizerFast | None, family: Family) -> dict[str, int | None]:
    """Ids by role; for a causal model the tokens that begin and end a text where only BERT's names for them exist."""
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "cls", "sep")}
    # transformers gives what a configuration calls padding an input embedding of 0 that never learns.
    ids["pad"] = own_padding(tokenizer)
    if family.objective == "clm":
        for role, name in (("bos", "cls"), ("eos", "sep")):
            ids[role] = ids[name] if ids[role] is None else ids[role]
    return ids


def _load_weights(
    path: str, field: str, config: PreTrainedConfig, objective: Objective, trust_remote_code: bool, needs_head: bool
) -> PreTrainedModel:
    auto, kind = _LOADERS[objective], KINDS[objective]
    load = partial(
        auto.from_pretrained,
        path,
        dtype=torch.float32,
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
    )
    said = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # of tensors that are missing we say what matters
    try:
        model, report = load(config=config)
        if any(key.startswith("lm_predictions.lm_head.") for key in report["unexpected_keys"]):
            config.legacy = False  # DeBERTa's published weights have one head, and its default configuration the other
            model, report = load(config=config)
    except Exception as error:  # safetensors and the hub have error types of their own, none of them documented
        raise UserError(f"{field}: the weights in {path!r} cannot be read: {first_line(error)}") from None
    finally:
        transformers_logging.set_verbosity(said)
    needed = "" if needs_head else f"{model.base_model_prefix}."
    missing = sorted(key for key in report["missing_keys"] if key.startswith(needed))
    if missing:
        raise UserError(
            f"{field}: {path!r} lacks {len(missing)} tensors of a {kind} LM ({', '.join(missing[:3])}…); "
            f"give a model that was saved with its {kind}-LM head"
        )
    return model
