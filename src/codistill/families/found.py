"""Models of families that no table knows: cut at their output embedding, where that is proven to be right.

Shape suffixes: B sequences, T position, D width, N predicted rows, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from codistill.errors import UserError
from codistill.families.family import Parts
from codistill.families.layers import first_list, lists_of_layers, puts_out_states

CAUSAL_CLASSES = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
_TOLERANCE = 1e-5  # of the largest logit
_ONE_AT_A_TIME = Lock()  # scores are computed by several threads


@dataclass(frozen=True)
class Bypass:
    """The features of any model: what enters its output embedding, which is left out."""

    model: nn.Module
    output: nn.Module

    def __call__(self, inputs: Mapping[str, Any], rows_N: Tensor) -> Tensor:
        options = {"use_cache": False} if is_causal_class(self.model) else {}  # as in `Chain`
        with _passing_through(self.output):
            features_BTD = self.model(**inputs, **options).logits
        return features_BTD.flatten(0, 1).index_select(0, rows_N)


def is_causal_class(model: nn.Module) -> bool:
    """Whether the class of `model`, or one that it is made from, is a causal LM of transformers."""
    return any(kind.__name__ in CAUSAL_CLASSES for kind in type(model).__mro__)


def found(model: nn.Module) -> Parts:
    """`model` cut at its output embedding; UserError unless features → output embedding are proven to be its logits.

    The proof: on random tokens, and with all parameters moved at random, so that no scale of 1 or bias of 0 hides.
    """
    name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    _check_not_wrapped(name, model)
    output = _output_embedding(model)
    if output is None:
        raise UserError(
            f"{name!r}: no output embedding was found in this {type(model).__name__}; give a language model with its "
            "head, or say where its parts are with Predictor.from_module(module, features, output, vocabulary=…)"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UserError(f"{name!r}: an encoder-decoder does not predict the rows of its own input; give another model")
    moved, ids_BT = _moved(model)
    difference = _difference(moved, ids_BT)
    if difference is not None:
        raise UserError(
            f"{name!r}: its logits are not its output embedding's ({difference}), so the family cannot be used as it "
            "is; say where its parts are with Predictor.from_module(module, features, output, vocabulary=…)"
        )
    return replace(cut(model), layers=_layers(model, moved, ids_BT))


def cut(model: nn.Module) -> Parts:
    """`model` before its output embedding, which it has; unproven."""
    output = cast(nn.Linear, _output_embedding(model))
    return Parts(Bypass(model, output), output)


def found_layers(model: nn.Module) -> Sequence[nn.Module]:
    """The layers of `model`, proven by running it with all parameters moved at random; none where that cannot be."""
    if not first_list(model):
        return ()
    try:
        return _layers(model, *_moved(model))
    except Exception:  # a model that cannot be copied, as one in shards, or that has no such vocabulary
        return ()


def _layers(model: nn.Module, moved: nn.Module, ids_BT: Tensor) -> Sequence[nn.Module]:
    return first_list(model) if puts_out_states(moved, lists_of_layers(moved), ids_BT) else ()


def _check_not_wrapped(name: str, model: nn.Module) -> None:
    """UserError for what `torch.compile`, DataParallel and their like make of a model."""
    for attribute, remedy in (
        ("_orig_mod", "whose layers compile in place with model.base_model.compile()"),
        ("module", "and on several processes the cohort ranks=codistill.distributed.start() (docs/python.md)"),
    ):
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module) and not isinstance(model, PreTrainedModel):
            wrapper = type(model).__name__
            raise UserError(f"{name!r}: {wrapper} wraps a {type(inner).__name__}; give the model itself, {remedy}")


def _output_embedding(model: nn.Module) -> nn.Linear | None:
    """The one that the model names, or else the only linear layer that is as wide as the vocabulary."""
    if not isinstance(model, PreTrainedModel):
        return None
    named = model.get_output_embeddings()
    if isinstance(named, nn.Linear):
        return named
    size = getattr(model.config, "vocab_size", None)
    wide = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == size]
    return wide[0] if len(wide) == 1 else None


@torch.no_grad()
def _moved(original: nn.Module) -> tuple[nn.Module, Tensor]:
    """A copy with all parameters moved at random, in evaluation mode, and random tokens (2, 8) for it."""
    model = deepcopy(original).eval()
    device = next(model.parameters()).device
    draw = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=draw, device=device, dtype=parameter.dtype), alpha=0.1)
    return model, torch.randint(cast(Any, model).config.vocab_size, (2, 8), generator=draw, device=device)


@torch.no_grad()
def _difference(model: nn.Module, ids_BT: Tensor) -> str | None:
    """How the logits differ from features → output embedding, in a few words, or None."""
    output = cast(nn.Linear, _output_embedding(model))
    try:
        logits_NV = cast(Any, model)(input_ids=ids_BT).logits.flatten(0, 1)
        features_ND = Bypass(model, output)({"input_ids": ids_BT}, torch.arange(ids_BT.numel(), device=ids_BT.device))
        expected_NV = functional.linear(features_ND, output.weight, output.bias)
        error = (logits_NV - expected_NV).abs().max().item()
    except Exception as failure:  # whatever a stranger's forward raises
        return f"{type(failure).__name__} when run without it"
    scale = logits_NV.abs().max().item()
    return None if error <= _TOLERANCE * scale else f"they differ by {error:.1g} of {scale:.1g}"


@contextmanager
def _passing_through(module: nn.Module) -> Iterator[None]:
    """Inside, `module` gives back what it is given, and no other thread is inside; afterwards it has the `forward` that
    it had, of its own or not."""
    with _ONE_AT_A_TIME:
        before = module.__dict__.get("forward")
        module.forward = lambda features: features  # type: ignore[method-assign]
        try:
            yield
        finally:
            del module.forward
            if before is not None:
                module.forward = before  # type: ignore[method-assign]
