"""Batches: a pure function of (seed, step, rank), the same text and masks for any number of ranks and micro-batches.

Shape suffixes: B sequences, T position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from codistill.data.corpus import Corpus
from codistill.data.order import keyed, permute
from codistill.data.packing import Packed, Padded, Rows, document_mask, document_positions
from codistill.data.tokenizers import Vocabulary
from codistill.errors import UserError
from codistill.seeds import seed_of

if TYPE_CHECKING:
    from codistill.objectives import Batch

PACKINGS = ("contiguous", "padded")
# Of every so many rows each corpus of a mixture gets its whole share, so a share is exact to 1 / 10000.
_MIXED = 10_000


class Objective(Protocol):
    """What makes a batch of rows; see `objectives.MaskedLM.batch`. `looks_ahead`: positions see those after them, so
    that padding and other documents have to be hidden by a mask."""

    looks_ahead: ClassVar[bool]

    def batch(self, ids_BT, lengths_B, key_B, vocabulary, inputs=None, sample_ids=()) -> Batch: ...


class Batches:
    """The batches of a run.

    `corpus`: one, or pairs of (corpus, weight), of which every batch takes its share. `sequences`: the rows of one
    optimizer step on all ranks together, in `accumulate` micro-batches. `packing`: "contiguous" or "padded" (one unit
    per row). `within_documents`: attention and positions are limited to one unit of a packed row. `tokens`: use only so
    many tokens of the text, taken evenly from all of it. Every row comes once an epoch, in an order that depends on
    the epoch; the end of one epoch and the beginning of the next may share a batch. UserError when the text is too
    short for one batch.
    """

    def __init__(
        self,
        corpus: Corpus | Sequence[tuple[Corpus, float]],
        objective: Objective,
        *,
        length: int,
        sequences: int,
        accumulate: int = 1,
        seed: int = 0,
        packing: str = "contiguous",
        within_documents: bool = False,
        tokens: int | None = None,
    ):
        self.objective, self.length, self.sequences, self.accumulate = objective, length, sequences, accumulate
        mixture = [(corpus, 1.0)] if isinstance(corpus, Corpus) else list(corpus)
        self.vocabulary = _shared_vocabulary([part for part, _ in mixture])
        self.within_documents = within_documents
        self.parts = [_rows_of(part, self.vocabulary, length, packing) for part, _ in mixture]
        self.used = _within_budget([part.num_rows for part in self.parts], length, tokens)
        self.shares = _shares([weight for _, weight in mixture])
        self.num_rows = sum(self.used)
        if self.num_rows < sequences:
            held = f"{self.num_rows} rows of {length} tokens"
            raise UserError(f"data.train: the text is too short, {held} for a batch of {sequences}; give more text")
        self.order_keys = np.array([seed_of(seed, "order", part) for part in range(len(mixture))], dtype=np.uint64)
        self.mask_keys = np.array([seed_of(seed, "mask", part) for part in range(len(mixture))], dtype=np.uint64)
        self.mixture_key = seed_of(seed, "mixture")
        # A step, and the sequences before it: a run that was resumed had other batches before.
        self.begun = (0, 0)
        # What is put on each micro-batch, given the running number of its first sequence. Set from outside: a teacher's
        # cache is checked against models, of which some are grown on these batches.
        self.attach: Callable[[int, Batch], Batch] = lambda first, batch: batch

    def at(self, step: int, *, rank: int = 0, world: int = 1) -> list[Batch]:
        """The `accumulate` micro-batches of one rank at one step (B = sequences / accumulate / world, T), on the CPU.
        UserError when the sequences cannot be shared out evenly."""
        micro, rest = divmod(self.sequences, self.accumulate * world)
        if rest or not micro:
            shares = f"{self.accumulate} micro-batches on {world} ranks"
            raise UserError(
                f"batch.sequences: {self.sequences} cannot be shared out evenly to {shares}; choose a multiple of "
                f"{self.accumulate * world}"
            )
        begun, before = self.begun
        first = before + (step - begun) * self.sequences + rank * micro
        firsts = [first + i * world * micro for i in range(self.accumulate)]
        return [self.attach(first, self._micro(first, micro)) for first in firsts]

    def _micro(self, first: int, count: int) -> Batch:
        part_B, epoch_B, row_B = self.locate(np.arange(first, first + count))
        rows = self._gather(part_B, row_B)
        key_B = keyed(self.mask_keys[part_B], epoch_B, row_B)
        return _masked(self, rows, key_B, tuple((self._firsts()[part_B] + row_B).tolist()))

    def locate(self, index_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which corpus, epoch and row the samples with these running numbers are."""
        part_B, number_B = self._share_out(index_B)
        used_B = np.array(self.used)[part_B]
        epoch_B, place_B = np.divmod(number_B, used_B)
        row_B = np.empty_like(place_B)
        for part, used in enumerate(self.used):
            here = np.flatnonzero(part_B == part)
            key = keyed(self.order_keys[part], epoch_B[here])
            place = permute(place_B[here], used, key)
            row_B[here] = place * self.parts[part].num_rows // used
        return part_B, epoch_B, row_B

    def _share_out(self, index_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corpus, and running number within it. Each stretch of `_MIXED` samples holds every corpus's exact share, in
        an order of its own."""
        if len(self.parts) == 1:
            return np.zeros_like(index_B), index_B
        stretch_B, place_B = np.divmod(index_B, _MIXED)
        part_B, number_B = np.empty_like(index_B), np.empty_like(index_B)
        for stretch in np.unique(stretch_B).tolist():
            here = np.flatnonzero(stretch_B == stretch)
            part_S, number_S = _mixed(self.mixture_key, stretch, tuple(self.shares))
            part_B[here], number_B[here] = part_S[place_B[here]], number_S[place_B[here]]
        return part_B, number_B

    def _gather(self, part_B: np.ndarray, row_B: np.ndarray) -> Rows:
        if len(self.parts) == 1:
            return self.parts[0].rows(row_B)
        ids_BT = np.empty((row_B.size, self.length), dtype=np.int64)
        lengths_B = np.empty(row_B.size, dtype=np.int64)
        for part in np.unique(part_B):
            here = np.flatnonzero(part_B == part)
            rows = self.parts[part].rows(row_B[here])
            ids_BT[here], lengths_B[here] = rows.ids_RT, rows.lengths_R
        return Rows(ids_BT, lengths_B)

    def _firsts(self) -> np.ndarray:
        return np.cumsum([0, *(part.num_rows for part in self.parts)])


@lru_cache(maxsize=4)
def _mixed(key: int, stretch: int, shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Of each sample of a stretch its corpus, and how many of that corpus came before it in all stretches: counted as
    they come, so that a corpus ends one epoch before it begins the next."""
    place_S = permute(np.arange(_MIXED), _MIXED, keyed(key, np.full(_MIXED, stretch)))
    part_S = np.searchsorted(np.cumsum(shares), place_S, side="right")
    number_S = np.empty_like(place_S)
    for part, share in enumerate(shares):
        number_S[part_S == part] = stretch * share + np.arange(share)
    return part_S, number_S


def held_out(
    corpus: Corpus,
    objective: Objective,
    *,
    length: int,
    sequences: int,
    seed: int = 0,
    limit: int | None = None,
    packing: str = "contiguous",
    within_documents: bool = False,
) -> list[Batch]:
    """Fixed masked batches for validation, in the order of the text, the last one smaller: every row, or `limit` of
    them taken evenly from all of the text. UserError when the text has not a single row."""
    batches = Batches(
        corpus,
        objective,
        length=length,
        sequences=0,
        seed=seed_of(seed, "held out"),
        packing=packing,
        within_documents=within_documents,
    )
    total = batches.num_rows
    if total == 0:
        raise UserError(f"data.validation: the text is too short, {corpus.num_tokens} tokens for rows of {length}")
    count = min(total, limit or total)
    row_all = np.arange(count) * total // count
    found = []
    for row_B in np.split(row_all, range(sequences, count, sequences)):
        key_B = keyed(batches.mask_keys[0], np.zeros_like(row_B), row_B)
        found.append(_masked(batches, batches.parts[0].rows(row_B), key_B, tuple(row_B.tolist())))
    return found


def _masked(batches: Batches, rows: Rows, key_B: np.ndarray, sample_ids: tuple[int, ...]) -> Batch:
    inputs: dict[str, np.ndarray] = {}
    if batches.within_documents:
        inputs["position_ids"] = document_positions(rows.ids_RT, batches.vocabulary)
    if batches.objective.looks_ahead:
        if batches.within_documents:
            inputs["attention_mask"] = document_mask(inputs["position_ids"])
        elif isinstance(batches.parts[0], Padded):
            inputs["attention_mask"] = (np.arange(batches.length) < rows.lengths_R[:, None]).astype(np.int64)
    return batches.objective.batch(rows.ids_RT, rows.lengths_R, key_B, batches.vocabulary, inputs, sample_ids)


def _shared_vocabulary(corpora: list[Corpus]) -> Vocabulary:
    tokenizer = corpora[0].tokenizer()
    for corpus in corpora[1:]:
        corpus.require(tokenizer, str(corpora[0].folder))
    return Vocabulary.of(tokenizer)


def _rows_of(corpus: Corpus, vocabulary: Vocabulary, length: int, packing: str) -> Packed | Padded:
    if packing not in PACKINGS:
        raise UserError(f"data.packing {packing!r}: unknown; there are {', '.join(PACKINGS)}")
    return (Padded if packing == "padded" else Packed)(corpus, vocabulary, length)


def _within_budget(rows: list[int], length: int, tokens: int | None) -> list[int]:
    """How many rows of each corpus are used: all, or their share of the token budget."""
    total = sum(rows)
    if tokens is None or tokens >= total * length:
        return rows
    return [max(1, count * (tokens // length) // total) for count in rows]


def _shares(weights: list[float]) -> list[int]:
    """Rows of each corpus in a stretch, by largest remainder; UserError for weights that are no shares."""
    if any(weight <= 0 for weight in weights):
        raise UserError(f"data: mixture weights {weights}: every weight must be above 0")
    exact = np.array(weights) / sum(weights) * _MIXED
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: _MIXED - shares.sum()]] += 1
    return shares.tolist()
