"""Texts to token ids, and to batches with as little padding as can be.

Shape suffixes: B sequences, T position, N examples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from codistill.data.saved_tokenizer import closing_encoder_of
from codistill.data.tokenizers import starts_and_ends, template
from codistill.errors import UserError
from codistill.objectives import Batch
from codistill.seeds import seed_of

_TOKENS_AT_ONCE = 4096  # of a batch that is only predicted
_BATCHES_IN_A_POOL = 64  # of an epoch's shuffled examples, so many batches are sorted by length among themselves


@dataclass(frozen=True)
class Encoded:
    """`ids`: token ids of each example, int64; `types`: which text each token is of, or None for a model that does not
    ask; `num_truncated`: examples that were cut to the longest length."""

    ids: list[np.ndarray]
    types: list[np.ndarray] | None
    num_truncated: int
    pad: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def length_N(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.ids])


def encode(
    texts: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerFast, *, max_length: int, with_types: bool
) -> Encoded:
    """The ids of single texts (one column) or pairs (two), with the tokenizer's special tokens around them.

    Pairs are cut at the end of the longer text. A tokenizer that adds none gets its separator after each text. Special
    tokens spelled out in a text are text.
    """
    encoder = encoder_for(tokenizer)
    encoder.enable_truncation(max_length, strategy="longest_first")
    rows = list(texts[0]) if len(texts) == 1 else list(zip(*texts, strict=True))
    encodings = encoder.encode_batch_fast(rows)
    empty = next((row for row, encoding in enumerate(encodings) if not len(encoding.ids)), None)
    if empty is not None:
        raise UserError(f"row {empty}: the text {rows[empty]!r} has no token at all")
    return Encoded(
        [np.array(encoding.ids, dtype=np.int64) for encoding in encodings],
        [np.array(encoding.type_ids, dtype=np.int64) for encoding in encodings] if with_types else None,
        sum(bool(encoding.overflowing) for encoding in encodings),
        tokenizer.pad_token_id or 0,
    )


def training_order(length_N: np.ndarray, batch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of an epoch as row numbers: a shuffle by (seed, epoch), sorted by length within pools of batches."""
    draw = np.random.default_rng(seed_of(seed, "order", epoch))
    order_N = draw.permutation(len(length_N))
    batches = []
    for at in range(0, len(order_N), batch * _BATCHES_IN_A_POOL):
        pool = order_N[at : at + batch * _BATCHES_IN_A_POOL]
        pool = pool[np.argsort(length_N[pool], kind="stable")]
        batches += np.split(pool, range(batch, len(pool), batch))
    return [batches[index] for index in draw.permutation(len(batches))]


def prediction_order(length_N: np.ndarray) -> Iterator[np.ndarray]:
    """Row numbers by length, in batches of about `_TOKENS_AT_ONCE` tokens, padding included."""
    order_N = np.argsort(length_N, kind="stable")
    at = 0
    while at < len(order_N):
        most = max(_TOKENS_AT_ONCE // int(length_N[order_N[at]]), 1)
        longest = int(length_N[order_N[min(at + most, len(order_N)) - 1]])
        count = max(_TOKENS_AT_ONCE // longest, 1)
        yield order_N[at : at + count]
        at += count


def batch_of(encoded: Encoded, rows: np.ndarray, label_N: np.ndarray | None) -> Batch:
    """These examples, padded to the longest of them; the predicted rows are the sequences themselves."""
    length_B = np.array([len(encoded.ids[row]) for row in rows])
    inputs = {"input_ids": _padded(encoded.ids, rows, length_B, encoded.pad)}
    if encoded.types is not None:
        inputs["token_type_ids"] = _padded(encoded.types, rows, length_B, 0)
    if length_B.min() < length_B.max():
        inputs["attention_mask"] = (np.arange(length_B.max()) < length_B[:, None]).astype(np.int64)
    labels = np.zeros(len(rows), dtype=np.int64) if label_N is None else label_N[rows]
    return Batch(
        {name: torch.from_numpy(array) for name, array in inputs.items()},
        torch.arange(len(rows)),
        torch.from_numpy(labels),
    )


def _padded(ids: Sequence[np.ndarray], rows: np.ndarray, length_B: np.ndarray, pad: int) -> np.ndarray:
    ids_BT = np.full((len(rows), length_B.max()), pad, dtype=np.int64)
    ids_BT[np.arange(length_B.max()) < length_B[:, None]] = np.concatenate([ids[row] for row in rows])
    return ids_BT


def encoder_for(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """What gives single texts and pairs their ids: the tokenizer, with a separator after each text if it adds none."""
    encoder = closing_encoder_of(tokenizer)
    if not encoder.num_special_tokens_to_add(is_pair=True):
        _, end = starts_and_ends(tokenizer)
        encoder.post_processor = template(None, end)
    return encoder
