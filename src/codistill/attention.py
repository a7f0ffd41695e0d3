"""What transformers' models do for attention, where it can be done better without a change of their numbers: short
sequences in bfloat16 on a CPU, where PyTorch's own attention spends most of a small model's time; and masks on an
accelerator, which transformers makes after a look at values, for which the host would wait in every pass.

Shape suffixes: B sequences, H heads, Q queries, T keys, E width of a head.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "codistill"
# Up to so many keys two batched products and a softmax take a quarter to two thirds of the time of
# `scaled_dot_product_attention` (forward and backward, 2 cores with avx512_bf16; docs/log.md), and hold Q × T weights.
LONGEST = 512


def attention(
    module: nn.Module,
    query_BHQE: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **further: Any,
) -> tuple[Tensor, Tensor | None]:
    """(B, Q, H, E) softmax(q kᵀ · scaling + mask) v, and None: what transformers expects of an attention function.

    `key` and `value` may have fewer heads than the queries (each then serves a group of them). The softmax is in
    float32. Anything but short bfloat16 sequences on a CPU goes to `scaled_dot_product_attention`.
    """
    if any(further.get(name) is not None for name in ("softcap", "position_bias", "cache")) or not _is_ours(key):
        return sdpa_attention_forward(
            module, query_BHQE, key, value, attention_mask, dropout, scaling, is_causal, **further
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = _causal(query_BHQE, key) if attention_mask is None and causal and query_BHQE.shape[2] > 1 else attention_mask
    query_BHQE, key, value = (x.to(torch.bfloat16) for x in (query_BHQE, key, value))  # as autocast would
    groups = query_BHQE.shape[1] // key.shape[1]
    key_BHTE, value_BHTE = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    scaling = query_BHQE.shape[-1] ** -0.5 if scaling is None else scaling
    weights_BHQT = torch.matmul(query_BHQE * scaling, key_BHTE.transpose(2, 3))
    if mask is not None:
        weights_BHQT = _masked(weights_BHQT, mask)
    weights_BHQT = torch.softmax(weights_BHQT, -1, dtype=torch.float32).to(query_BHQE.dtype)
    weights_BHQT = nn.functional.dropout(weights_BHQT, dropout, training=dropout > 0)
    return torch.matmul(weights_BHQT, value_BHTE).transpose(1, 2).contiguous(), None


def use_short_attention(model: PreTrainedModel) -> None:
    """Makes `model` call `attention` where it would call `scaled_dot_product_attention`; other choices stay."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def _is_ours(key: Tensor) -> bool:
    if key.device.type != "cpu" or key.shape[2] > LONGEST:
        return False
    return (torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else key.dtype) == torch.bfloat16


def _causal(query_BHQE: Tensor, key: Tensor) -> Tensor:
    shape = query_BHQE.shape[2], key.shape[2]
    return torch.ones(shape, dtype=torch.bool, device=key.device).tril()


def _masked(weights_BHQT: Tensor, mask: Tensor) -> Tensor:
    """A row that may look nowhere (padding) looks everywhere alike instead of being no number."""
    if mask.dtype == torch.bool:
        return weights_BHQT.masked_fill(~mask, torch.finfo(weights_BHQT.dtype).min)
    return weights_BHQT + mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


# ---- masks without a look at values ------------------------------------------------------------

_are_packed: dict[int, bool] = {}  # threads inside `unread_masks` → whether rows hold several sequences


@contextmanager
def unread_masks(inputs: Mapping[str, Any], device: torch.device) -> Iterator[None]:
    """Inside, transformers makes its masks for `inputs` of a backbone without reading a tensor of an accelerator.

    It would look whether `position_ids`, which it makes itself where there are none, begin anew within a row, and
    whether a padding mask hides anything. Here they do where they are given, and it does: a mask is then made where it
    could have been left out, and says the same. Nor does it look for padding without a mask, to warn of it. On a CPU,
    where looking is free, nothing changes. This holds for the attention implementations sdpa (ours too) and eager;
    flash and flex attention look in ways of their own.
    """
    if device.type == "cpu":
        yield
        return
    thread = get_ident()  # a dictionary of them, because PyTorch's compiler follows no context variables
    _are_packed[thread] = "position_ids" in inputs
    try:
        yield
    finally:
        del _are_packed[thread]


def _sequence_numbers(of_transformers: Callable[[Tensor], Tensor | None], position_ids: Tensor) -> Tensor | None:
    """(B, T) of which sequence of its row each position is, None where every row is one."""
    are_packed = _known()
    if are_packed is None:
        return of_transformers(position_ids)
    if not are_packed:
        return None
    steps_BT = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps_BT != 1).cumsum(-1)


def _has_no_use(of_transformers: Callable[..., bool], padding_mask: Tensor | None, *args: Any, **options: Any) -> bool:
    """Whether a mask can be left out."""
    if padding_mask is not None and _known() is not None:
        return False
    return of_transformers(padding_mask, *args, **options)


def _warn_of_padding(of_transformers: Callable[..., None], model: PreTrainedModel, *args: Any, **options: Any) -> None:
    """GPT-2 and DeBERTa look at the first and last tokens of every row, in every pass, for a warning."""
    if _known() is None:
        of_transformers(model, *args, **options)


def _known() -> bool | None:
    """What this thread is told of the rows, if it is inside."""
    return _are_packed.get(get_ident()) if _are_packed else None


def _put_before(place: Any, name: str, instead: Callable[..., Any]) -> None:
    """Has `place`, of transformers, call `instead` with its own function `name`, if it is there, and the arguments."""
    own = getattr(place, name, None)
    if own is not None:
        setattr(place, name, lambda *args, **options: instead(own, *args, **options))


_put_before(masking_utils, "find_packed_sequence_indices", _sequence_numbers)
_put_before(masking_utils, "_ignore_causal_mask_sdpa", _has_no_use)
_put_before(masking_utils, "_ignore_bidirectional_mask_sdpa", _has_no_use)
_put_before(PreTrainedModel, "warn_if_padding_and_no_attention_mask", _warn_of_padding)
