"""Whether a model looks at later tokens, found by running it: a class and a family say what it is for, and a
configuration what it does.

Shape suffixes: B sequences, T position, D width, N predicted rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from codistill.errors import UserError
from codistill.families.family import Parts

_LENGTH = 8
# Of the largest feature. Models that look both ways move by 1e-3 or more with random weights of 0.02; causal mixtures
# of experts, which batch the tokens of an expert, by 6e-7 of rounding.
_ROUNDING = 1e-5


@torch.no_grad()
def movement(model: nn.Module, parts: Parts, vocabulary: int) -> float:
    """How far the features of a row's first tokens move with the tokens after them, as a share of the largest: 0 for a
    causal model, but for rounding. Runs `model` twice on a few tokens, in evaluation mode, and leaves it as it was.
    """
    device = next(model.parameters()).device
    length = _length(model)
    ids_T = (vocabulary // 2 + torch.arange(length, device=device)) % vocabulary  # special tokens come first
    other_T = ids_T.clone()
    other_T[length // 2 :] = (other_T[length // 2 :] + max(vocabulary // 4, 1)) % vocabulary
    rows_N = torch.arange(length // 2, device=device)
    with _in_evaluation_mode(model):
        one_ND, after_ND = (parts.features({"input_ids": of_T[None]}, rows_N).float() for of_T in (ids_T, other_T))
    return ((one_ND - after_ND).abs().max() / one_ND.abs().max()).item()


def looks_ahead(model: nn.Module, parts: Parts, vocabulary: int) -> bool:
    """Whether `model` sees tokens that come later, which a causal one does not."""
    narrow = torch.finfo(next(model.parameters()).dtype).eps
    return movement(model, parts, vocabulary) > max(_ROUNDING, 2 * narrow)


def check_sight(model: PreTrainedModel, parts: Parts, objective: str, field: str) -> None:
    """UserError where `model` sees what `objective` asks it to predict, or less than it may: a masked LM that its
    configuration makes a causal one."""
    if objective == "clm" and looks_ahead(model, parts, model.config.vocab_size):
        raise UserError(
            f"{field} looks at later tokens{why(model)}, which it would be asked to predict; give a causal model"
        )
    # Only where the configuration says so: a model of one's own may look at what it likes.
    causal = next((key for key in ("is_decoder", "is_causal") if getattr(model.config, key, None) is True), None)
    if objective == "mlm" and causal and movement(model, parts, model.config.vocab_size) == 0:
        raise UserError(
            f"{field} does not look at later tokens (its config has {causal}: true), which a masked LM does; give one "
            f"that does, or set {causal}: false if it was trained so"
        )


def why(model: nn.Module) -> str:
    """What in the configuration of a model makes it look at later tokens, in brackets, or nothing."""
    config = getattr(model, "config", None)
    for key, value in (("is_causal", False), ("use_bidirectional_attention", True), ("is_decoder", False)):
        if getattr(config, key, None) is value:
            return f" (its config has {key}: {str(value).lower()})"
    return ""


def _length(model: nn.Module) -> int:
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(_LENGTH, positions) if isinstance(positions, int) and positions > 1 else _LENGTH


@contextmanager
def _in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, nothing is compiled; afterwards every part is in the mode it was in, which may not be the whole's."""
    training = [part for part in model.modules() if part.training]
    # What is compiled would be so for these few tokens too, and from then on for any number of them, which is slower.
    # Asked only then, for it imports the compiler.
    is_compiled = any(part._compiled_call_impl is not None for part in model.modules())
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
            yield
    finally:
        for part in training:
            part.training = True
