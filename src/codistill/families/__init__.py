"""Architectures: what is specific to a family of models stands here, and nowhere else."""

from collections.abc import Mapping, Sequence
from typing import cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from codistill.families.causal import CAUSAL
from codistill.families.family import Family, Parts, parts_of
from codistill.families.found import cut, found, found_layers, is_causal_class
from codistill.families.layers import first_list, state_of
from codistill.families.masked import MASKED, MASKED_LEGACY

FAMILIES: Mapping[str, Family] = {**MASKED, **CAUSAL}

__all__ = [
    "FAMILIES",
    "Family",
    "Parts",
    "bend",
    "family_of",
    "first_position",
    "is_causal",
    "is_in_the_table",
    "known_objective",
    "layers_of",
    "local_windows",
    "longest",
    "split",
    "state_of",
]


def family_of(config: PreTrainedConfig) -> Family | None:
    """The row of the table that describes models of `config`, or None."""
    known = MASKED_LEGACY if getattr(config, "legacy", False) and config.model_type in MASKED_LEGACY else FAMILIES
    return known.get(config.model_type)


def is_causal(model: nn.Module) -> bool:
    """Whether `model` predicts the next token, as its class says, a BERT's for generation too; or, of a backbone, its
    family."""
    if is_causal_class(model):
        return True
    family = family_of(model.config) if isinstance(model, PreTrainedModel) else None
    return family is not None and family.objective == "clm"


def known_objective(model: nn.Module) -> str | None:
    """ "mlm" or "clm" of a model that is of the table, of the very class that stands there; None for any other."""
    family = family_of(model.config) if isinstance(model, PreTrainedModel) else None
    return family.objective if family is not None and type(model) is family.model else None


def split(model: nn.Module, *, is_proven: bool = False) -> Parts:
    """`model` cut before its output embedding, by the table or by proof; UserError where neither can say how.

    `is_proven`: the proof was made already, of a model with numbers, which one on fake tensors has not.
    """
    if not is_in_the_table(model):
        return cut(model) if is_proven else found(model)
    known = cast(PreTrainedModel, model)
    return parts_of(known, cast(Family, family_of(known.config)))


def layers_of(model: nn.Module) -> Sequence[nn.Module]:
    """The layers of `model` that put out its hidden states, by the table or by proof; none where neither tells."""
    return first_list(model) if is_in_the_table(model) else found_layers(model)


def is_in_the_table(model: nn.Module) -> bool:
    """Whether `model` is cut by the table, whose rows are tested, and not by proof: a subclass may do anything to the
    logits, and some settings do."""
    return known_objective(model) is not None and bend(cast(PreTrainedModel, model).config) is None


def bend(config: PreTrainedConfig) -> str | None:
    """The setting of `config` that caps or scales logits, so that they are no linear function of features, or None."""
    plain = {"final_logit_softcapping": None, "logit_scale": 1, "logits_scaling": 1}
    for key, as_they_are in plain.items():
        value = getattr(config, key, None)
        if value not in (None, as_they_are):
            return f"{key} {value}"
    return None


def first_position(model: nn.Module) -> int:
    """The number that a sequence's first position has: 0, or where a family counts from its padding token on, as
    RoBERTa does, the one after that."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return cast(int, module.padding_idx) + 1
    return 0


def local_windows(model: nn.Module) -> list[int]:
    """How far the local layers of a masked LM look to either side, where it has such layers beside global ones: one
    window as a rule, or all that there are."""
    config = getattr(model, "config", None)
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()) or is_causal(model):
        return []
    try:
        windows = [getattr(config, "sliding_window", None)]
    except RuntimeError:  # transformers has each layer say its own
        windows = [layer.sliding_window for layer in cast(PreTrainedConfig, config).per_layer_config]
    return sorted({window for window in windows if window is not None})


def longest(model: PreTrainedModel) -> int | None:
    """How many tokens a sequence may have, or None where nothing bounds it."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return None if positions is None else positions - first_position(model)
