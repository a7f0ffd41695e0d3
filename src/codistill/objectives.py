"""What is predicted: an objective names the rows to predict and their labels, and nothing else.

Heads are applied to those rows only, so masked, causal and classification objectives share every loss: no ignore
index, no shift. Shape suffixes: B sequences, T position, K predicted positions of one sequence, N = B · K predicted
rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from codistill.data.order import GOLDEN, fraction_below, keyed, mix
from codistill.errors import UserError

if TYPE_CHECKING:
    from codistill.data.tokenizers import Vocabulary
    from codistill.kernels import SparseLogits

IGNORED = -100  # Hugging Face's label of what is not predicted
_NEVER = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Batch:
    """What one micro-step consumes.

    `inputs`: keyword arguments of a backbone, `input_ids` (B, T) int64 among them; `rows_N`: int64 indices into the
    flattened (B · T) positions; `labels_N`: int64 token ids (of whole texts: classes, or float32 numbers);
    `row_weight_N`: float32, 0 for a slot that a short sequence leaves unfilled (None: all 1); `sample_ids`: which rows
    of the data these are, for error messages; `cached`: by member, what a teacher said about the rows when it was run:
    features (N, D), or sparse logits; `lengths_B`: int64, the positions of each sequence that are not padding, where
    some are and no `attention_mask` (B, T) among the inputs says which; `copies_inputs`: every label is the token that
    stands at its own row, which asks a causal model to copy, so that a cohort refuses it; `shows_next`: every label is
    the token that stands one after its row, which a model that looks there would copy, so that a cohort refuses that.
    """

    inputs: Mapping[str, Tensor]
    rows_N: Tensor
    labels_N: Tensor
    row_weight_N: Tensor | None = None
    sample_ids: tuple[int, ...] = ()
    cached: Mapping[str, Tensor | SparseLogits] = field(default_factory=dict)
    lengths_B: Tensor | None = None
    copies_inputs: bool = False
    shows_next: bool = False

    @classmethod
    def from_labels(cls, given: Mapping[str, Tensor], *, causal: bool = False) -> Batch:
        """The batch that a Hugging Face collator gave: `labels` (B, T) int64, −100 where nothing is predicted; the rest
        goes to the backbones.

        `causal`: a label is that of its own position, as their causal models take it, and is predicted from the
        position before. Waits for the device if the labels are on one. Raises UserError for labels that do not fit.
        """
        inputs = {name: tensor for name, tensor in given.items() if name != "labels"}
        labels_BT = _labels(given)
        if causal:
            labels_BT = torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
        rows_N = (labels_BT.flatten() != IGNORED).nonzero()[:, 0]
        labels_N = labels_BT.flatten()[rows_N]
        here, after = _stand_at(0, inputs, rows_N, labels_N), _stand_at(1, inputs, rows_N, labels_N)
        # Shifted by hand they are those of nearly all positions; a few masked ones may be so by chance.
        is_shifted = causal or 2 * len(rows_N) > labels_BT.numel()
        return cls(
            inputs,
            rows_N,
            labels_N,
            copies_inputs=here and not after and not causal,
            shows_next=after and not here and is_shifted,
        )

    @property
    def weight_N(self) -> Tensor:
        """(N,) float32: `row_weight_N`, or 1 for every row where there is none."""
        return torch.ones_like(self.labels_N, dtype=torch.float32) if self.row_weight_N is None else self.row_weight_N

    def to(self, device: torch.device | str) -> Batch:
        """This batch with its tensors on `device`; from pinned memory the copies do not wait."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """This batch in page-locked memory, from which a GPU copies while the host goes on."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, move: Callable[[Tensor], Tensor]) -> Batch:
        weight = None if self.row_weight_N is None else move(self.row_weight_N)
        lengths = None if self.lengths_B is None else move(self.lengths_B)
        inputs = {name: move(tensor) for name, tensor in self.inputs.items()}
        cached = {
            name: move(given) if isinstance(given, Tensor) else type(given)(*map(move, given))
            for name, given in self.cached.items()
        }
        return replace(
            self,
            inputs=inputs,
            rows_N=move(self.rows_N),
            labels_N=move(self.labels_N),
            row_weight_N=weight,
            cached=cached,
            lengths_B=lengths,
        )


def _stand_at(ahead: int, inputs: Mapping[str, Tensor], rows_N: Tensor, labels_N: Tensor) -> bool:
    """Whether the labels are the tokens that stand so many positions after their own rows."""
    ids = inputs.get("input_ids")
    return ids is not None and len(rows_N) > 1 and torch.equal(ids.roll(-ahead, 1).flatten()[rows_N], labels_N)


def _lengths(lengths_B: np.ndarray, length: int) -> Tensor | None:
    return torch.from_numpy(lengths_B.astype(np.int64)) if (lengths_B < length).any() else None


def _labels(given: Mapping[str, Tensor]) -> Tensor:
    labels, ids = given.get("labels"), given.get("input_ids")
    if labels is None:
        raise UserError(f"batch: {', '.join(given)}; wanted labels too, −100 where nothing is predicted")
    if labels.dtype != torch.int64 or labels.dim() != 2 or (ids is not None and labels.shape != ids.shape):
        wanted = "(sequences, positions)" if ids is None else str(tuple(ids.shape))
        raise UserError(f"labels: {labels.dtype} of shape {tuple(labels.shape)}; wanted int64 of shape {wanted}")
    return labels


@dataclass(frozen=True)
class MaskedLM:
    """Masked language modelling as in BERT (Devlin et al., 2019): of every sequence, round(mask_rate · T) tokens are
    predicted; of these 80 % are shown as [MASK], 10 % as a random ordinary token, 10 % as they are.

    A sequence of fewer tokens (padding) has round(mask_rate · its tokens) of them, at least one; whole-word masking
    takes whole words while they fit. Slots that stay unfilled have row weight 0. Special tokens are never chosen.
    """

    mask_rate: float = 0.15
    whole_word: bool = False
    name: ClassVar[str] = "mlm"
    looks_ahead: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.mask_rate < 1:
            raise UserError(f"objective.mask_rate: {self.mask_rate}; wanted a number above 0 and below 1")

    def slots(self, length: int) -> int:
        """Predicted rows of a sequence of `length` positions; UserError below two positions."""
        if length < 2:
            raise UserError(f"data.length: {length}; wanted at least 2 positions")
        return min(max(1, round(self.mask_rate * length)), length - 1)

    def batch(
        self,
        ids_BT: np.ndarray,
        lengths_B: np.ndarray,
        key_B: np.ndarray,
        vocabulary: Vocabulary,
        inputs: Mapping[str, np.ndarray] | None = None,
        sample_ids: tuple[int, ...] = (),
    ) -> Batch:
        """The masked batch: a pure function of the token ids (int64), the lengths without padding and a uint64 key for
        each sequence. `inputs`: further inputs of the backbone, passed on. UserError when there is no [MASK]."""
        if vocabulary.mask is None:
            raise UserError("objective.name mlm: the tokenizer has no mask token; give one that has, or train one")
        place_BK, filled_BK, noise_BK = self._choose(ids_BT, lengths_B, key_B, vocabulary)
        labels_BK = np.take_along_axis(ids_BT, place_BK, axis=1)
        shown_BK = np.where(filled_BK, _shown(labels_BK, noise_BK, vocabulary), labels_BK)
        masked_BT = ids_BT.copy()
        np.put_along_axis(masked_BT, place_BK, shown_BK, axis=1)
        rows_BK = place_BK + np.arange(0, ids_BT.size, ids_BT.shape[1])[:, None]
        tensors = {"input_ids": masked_BT, **(inputs or {})}
        return Batch(
            inputs={name: torch.from_numpy(array) for name, array in tensors.items()},
            rows_N=torch.from_numpy(rows_BK.reshape(-1)),
            labels_N=torch.from_numpy(labels_BK.reshape(-1)),
            row_weight_N=torch.from_numpy(filled_BK.reshape(-1).astype(np.float32)),
            sample_ids=sample_ids,
            lengths_B=_lengths(lengths_B, ids_BT.shape[1]),
        )

    def _choose(
        self, ids_BT: np.ndarray, lengths_B: np.ndarray, key_B: np.ndarray, vocabulary: Vocabulary
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The chosen positions (B, K), all distinct; which slots are filled; noise for each.

        Every position (or word) has a hash; the K smallest are chosen, in that order. The position sits in the low
        bits of the hash, so sorting plain integers gives the choice, ties included, and words stay together.
        """
        length, slots = ids_BT.shape[1], self.slots(ids_BT.shape[1])
        position_T = np.arange(length)
        low = np.uint64(2 ** int(length - 1).bit_length() - 1)
        owner_BT = _word_starts(ids_BT, vocabulary) if self.whole_word else position_T[None]
        hash_BT = mix(key_B[:, None] + (owner_BT.astype(np.uint64) + np.uint64(1)) * GOLDEN)
        hash_BT[vocabulary.special_V[ids_BT] | (position_T >= lengths_B[:, None])] = _NEVER
        hash_BT = (hash_BT & ~low) | position_T.astype(np.uint64)
        # One more than is taken: it tells whether the last word was taken whole.
        order_BK = np.sort(np.partition(hash_BT, slots, axis=1)[:, : slots + 1], axis=1)
        place_BK = (order_BK & low).astype(np.int64)
        wanted_B = np.clip(np.rint(self.mask_rate * lengths_B).astype(np.int64), 1, slots)[:, None]
        filled_BK = (order_BK < (_NEVER & ~low)) & (np.arange(slots + 1) < wanted_B)
        if self.whole_word:
            word_BK = np.take_along_axis(owner_BT, place_BK, axis=1)
            filled_BK &= word_BK != np.take_along_axis(word_BK, wanted_B, axis=1)
        return place_BK[:, :slots], filled_BK[:, :slots], keyed(order_BK[:, :slots], 1)


@dataclass(frozen=True)
class CausalLM:
    """Every token is predicted from those before it: of a sequence of T positions, T − 1 rows.

    Rows whose token is padding have weight 0, and so have those whose token begins a document where documents are kept
    apart (its position is 0). No mask is handed on: a causal model sees no padding, which comes after the text, and
    takes positions that begin anew for documents that must not see one another (tests/test_causal.py holds it to it).
    """

    name: ClassVar[str] = "clm"
    looks_ahead: ClassVar[bool] = False

    def batch(
        self,
        ids_BT: np.ndarray,
        lengths_B: np.ndarray,
        key_B: np.ndarray,
        vocabulary: Vocabulary,
        inputs: Mapping[str, np.ndarray] | None = None,
        sample_ids: tuple[int, ...] = (),
    ) -> Batch:
        """The batch of token ids (int64) and lengths without padding; chance has no part in it. `inputs`: further
        inputs of the backbone, passed on. UserError below two positions."""
        length = ids_BT.shape[1]
        if length < 2:
            raise UserError(f"data.length: {length}; wanted at least 2 positions")
        tensors = {"input_ids": ids_BT, **(inputs or {})}
        filled_BK = np.arange(1, length) < lengths_B[:, None]
        if "position_ids" in tensors:
            filled_BK &= tensors["position_ids"][:, 1:] > 0
        rows_BK = np.arange(length - 1) + np.arange(0, ids_BT.size, length)[:, None]
        return Batch(
            inputs={name: torch.from_numpy(array) for name, array in tensors.items()},
            rows_N=torch.from_numpy(rows_BK.reshape(-1)),
            labels_N=torch.from_numpy(ids_BT[:, 1:].reshape(-1)),
            row_weight_N=torch.from_numpy(filled_BK.reshape(-1).astype(np.float32)),
            sample_ids=sample_ids,
            lengths_B=_lengths(lengths_B, ids_BT.shape[1]),
        )


def _word_starts(ids_BT: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """For each position the one at which its word begins."""
    starts_BT = ~vocabulary.continues_V[ids_BT]
    starts_BT[:, 0] = True
    starts_BT[:, 1:] |= vocabulary.special_V[ids_BT[:, :-1]]
    return np.maximum.accumulate(np.where(starts_BT, np.arange(ids_BT.shape[1]), 0), axis=1)


def _shown(labels_BK: np.ndarray, noise_BK: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """What stands in the input instead of the labels: 80 % [MASK], 10 % any ordinary token, 10 % the label."""
    assert vocabulary.mask is not None
    tenth_BK = fraction_below(noise_BK, 10)
    other_BK = vocabulary.ordinary[fraction_below(noise_BK << np.uint64(32), vocabulary.ordinary.size)]
    return np.where(tenth_BK < 8, vocabulary.mask, np.where(tenth_BK == 8, other_BK, labels_BK))
