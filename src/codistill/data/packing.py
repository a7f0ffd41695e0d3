"""Corpora as rows of equal length: cut from the running text, or one unit to a row.

Shape suffixes: R rows, T position.
"""

from dataclasses import dataclass

import numpy as np

from codistill.data.corpus import Corpus
from codistill.data.tokenizers import Vocabulary
from codistill.errors import UserError


@dataclass(frozen=True)
class Rows:
    """Token ids (R, T) int64, and how many positions of each row are no padding (R,) int64."""

    ids_RT: np.ndarray
    lengths_R: np.ndarray


class Packed:
    """Rows of a start token ([CLS], where the tokenizer has one) and the next T - 1 tokens of the text, in which a
    separator ends every unit. Nothing is padded; the fewer than T - 1 last tokens of each shard are left out.
    """

    def __init__(self, corpus: Corpus, vocabulary: Vocabulary, length: int):
        self.start, self.length = vocabulary.start, length
        body = length - (self.start is not None)
        if body < 1:
            raise UserError(f"data.length: {length}; wanted at least 2 positions")
        counts = [len(tokens) // body for tokens in corpus.shards]
        self.shards = [tokens[: n * body].reshape(n, body) for tokens, n in zip(corpus.shards, counts, strict=True)]
        self.firsts = np.cumsum([0, *counts])
        self.num_rows = int(self.firsts[-1])

    def rows(self, row_R: np.ndarray) -> Rows:
        """The named rows, in the order named."""
        ids_RT = np.empty((row_R.size, self.length), dtype=np.int64)
        body_RT = ids_RT
        if self.start is not None:
            ids_RT[:, 0] = self.start
            body_RT = ids_RT[:, 1:]
        for shard, here in _by_shard(self.firsts, row_R):
            body_RT[here] = self.shards[shard][row_R[here] - self.firsts[shard]]
        return Rows(ids_RT, np.full(row_R.size, self.length))


class Padded:
    """Rows of one unit each: start token, the unit's first tokens, separator, padding."""

    def __init__(self, corpus: Corpus, vocabulary: Vocabulary, length: int):
        if vocabulary.pad is None:
            raise UserError(
                "data.packing: padded; the tokenizer has no padding token: give one that has, or packing: contiguous"
            )
        self.corpus, self.length, self.vocabulary = corpus, length, vocabulary
        self.starts = int(vocabulary.start is not None)
        if length < self.starts + 2:
            raise UserError(f"data.length: {length}; wanted at least {self.starts + 2} positions")
        self.firsts = np.cumsum([0, *(len(ends) for ends in corpus.unit_ends)])
        self.num_rows = int(self.firsts[-1])

    def rows(self, row_R: np.ndarray) -> Rows:
        """The named units, cut to the row's length."""
        ids_RT = np.full((row_R.size, self.length), self.vocabulary.pad, dtype=np.int64)
        lengths_R = np.empty(row_R.size, dtype=np.int64)
        for shard, here in _by_shard(self.firsts, row_R):
            ids_RT[here, self.starts :], lengths_R[here] = self._units(shard, row_R[here] - self.firsts[shard])
        if self.vocabulary.start is not None:
            ids_RT[:, 0] = self.vocabulary.start
        return Rows(ids_RT, lengths_R + self.starts)

    def _units(self, shard: int, unit_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and separator of units of one shard, padded; and how many positions they take."""
        ends = self.corpus.unit_ends[shard]
        start_R = np.where(unit_R > 0, ends[np.maximum(unit_R - 1, 0)], 0).astype(np.int64)
        room = self.length - self.starts
        taken_R = np.minimum(ends[unit_R].astype(np.int64) - start_R, room)
        offset_T = np.arange(room)
        inside_RT = offset_T < taken_R[:, None]
        tokens = self.corpus.shards[shard]
        ids_RT = tokens[np.minimum(start_R[:, None] + offset_T, len(tokens) - 1)].astype(np.int64)
        ids_RT[np.arange(unit_R.size), taken_R - 1] = self.vocabulary.separator
        ids_RT[~inside_RT] = self.vocabulary.pad
        return ids_RT, taken_R


def _by_shard(firsts: np.ndarray, row_R: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """For each shard that holds some of the rows: its number, and which of the rows."""
    shard_R = np.searchsorted(firsts, row_R, side="right") - 1
    return [(int(shard), np.flatnonzero(shard_R == shard)) for shard in np.unique(shard_R)]


def document_positions(ids_RT: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """The position of each token in its unit (R, T), from 0; a separator still belongs to what it ends.

    A start token belongs to what it begins, also where a tokenizer has one token for both ends of a text.
    """
    begins_RT = np.ones_like(ids_RT, dtype=bool)
    begins_RT[:, 1:] = ids_RT[:, :-1] == vocabulary.separator
    if vocabulary.start == vocabulary.separator:
        begins_RT[:, 1:2] = False
    position_T = np.arange(ids_RT.shape[1])
    return position_T - np.maximum.accumulate(np.where(begins_RT, position_T, 0), axis=1)


def document_mask(positions_RT: np.ndarray) -> np.ndarray:
    """(R, 1, T, T) bool, true where both positions lie in one unit, of what `document_positions` gives."""
    numbers_RT = np.cumsum(positions_RT == 0, axis=1)
    return numbers_RT[:, None, :, None] == numbers_RT[:, None, None, :]
