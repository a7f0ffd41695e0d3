"""BLiMP zero-shot (Warstadt et al. 2020): does a model find the grammatical sentence of a minimal pair likelier?

Shape suffixes: S sentences, T position, N scored tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from codistill.data.tokenizers import Vocabulary, encoder_of
from codistill.errors import UserError, first_line
from codistill.evaluate.spread import spread
from codistill.machine import autocast
from codistill.models import Predictor

COLUMNS = ("UID", "field", "sentence_good", "sentence_bad")
_TOKENS_AT_ONCE = 4096
_ROWS_AT_ONCE = 256  # bounds the logits held at once; has no influence on a row


@dataclass(frozen=True)
class Pairs:
    """`good` and `bad` sentences; each pair's paradigm and field."""

    good: Sequence[str]
    bad: Sequence[str]
    paradigm: Sequence[str]
    field: Sequence[str]

    def __len__(self) -> int:
        return len(self.good)


def read_pairs(data: Path | None, limit: int | None = None) -> Pairs:
    """The pairs in DATA/blimp/*.parquet, the first `limit` of each paradigm; UserError naming what is missing."""
    from pyarrow import ArrowException, parquet

    files = sorted((data / "blimp").glob("*.parquet")) if data else []
    if not files:
        given = "" if data is None else f"--data {data}: it has no blimp/*.parquet; "
        raise UserError(f"{given}blimp: give --data DIR, a folder with blimp/*.parquet")
    try:
        columns = parquet.ParquetDataset(files).read().to_pydict()
    except (OSError, ArrowException) as error:
        raise UserError(f"{files[0]}: cannot be read as Parquet ({first_line(error)})") from None
    for column in COLUMNS:
        if column not in columns:
            raise UserError(f"{files[0]}: no column {column!r}, only {', '.join(columns)}")
    taken = _first_of_each(columns["UID"], limit)
    paradigm, field, good, bad = ([columns[column][row] for row in taken] for column in COLUMNS)
    field = [name.replace("/", "_") for name in field]  # the published files write one of the fields both ways
    return Pairs(good, bad, paradigm, field)


def score_pairs(pairs: Pairs, likelihood_good: np.ndarray, likelihood_bad: np.ndarray) -> dict[str, Any]:
    """`score`: the share of pairs whose good sentence is strictly likelier; the same by field and paradigm; ties."""
    right = likelihood_good > likelihood_bad
    return {
        "score": float(right.mean()),
        "fields": _shares(right, pairs.field),
        "paradigms": _shares(right, pairs.paradigm),
        "ties": int((likelihood_good == likelihood_bad).sum()),
    }


@dataclass(frozen=True)
class Sentences:
    """`ids`: with the tokens that begin and end a text; of each, those from `first` to `last` (exclusive, from the
    end: −1 leaves out the last) are scored."""

    ids: list[np.ndarray]
    first: int
    last: int
    num_truncated: int


def encode_sentences(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, *, is_causal: bool, max_length: int
) -> Sentences:
    """[CLS] sentence [SEP] for a masked LM, start sentence for a causal one. UserError for a sentence of no token."""
    vocabulary = Vocabulary.of(tokenizer)
    if not is_causal and vocabulary.mask is None:
        raise UserError("the tokenizer has no mask token, which scoring with a masked LM needs")
    start = vocabulary.start if vocabulary.start is not None else vocabulary.separator
    ends = [] if is_causal else [vocabulary.separator]
    room = max_length - 1 - len(ends)
    ids, cut = [], 0
    for number, encoding in enumerate(encoder_of(tokenizer).encode_batch_fast(list(texts), add_special_tokens=False)):
        if not encoding.ids:
            raise UserError(f"sentence {number}: {texts[number]!r} has no token, so it has no likelihood")
        cut += len(encoding.ids) > room
        ids.append(np.array([start, *encoding.ids[:room], *ends], dtype=np.int64))
    return Sentences(ids, 1, -len(ends), cut)


def likelihoods(
    predictor: Predictor,
    sentences: Sentences,
    *,
    mask: int | None,
    precision: torch.dtype,
    advance: Callable[[int], None] = lambda sentences: None,
) -> np.ndarray:
    """(S,) summed log-probabilities of each sentence's tokens, float64, in nats.

    With a `mask` token the pseudo-log-likelihood (Salazar et al. 2020, eq. 1): each token is masked in turn and
    predicted from all others. Without, the log-likelihood of a causal LM. Equal sentences are scored once; those of
    one length go together, so that nothing is padded.
    """
    unique, inverse_S = _distinct(sentences.ids)
    score = partial(_score_rows, predictor, unique, sentences, mask, precision)
    found_S = np.zeros(len(unique))
    batches = list(_by_length(unique, masked=mask is not None))
    for rows, scores in zip(batches, spread(score, batches, predictor.device), strict=True):
        found_S[rows] = scores
        advance(len(rows))
    return found_S[inverse_S]


def _score_rows(
    predictor: Predictor,
    ids: Sequence[np.ndarray],
    sentences: Sentences,
    mask: int | None,
    precision: torch.dtype,
    rows: np.ndarray,
) -> np.ndarray:
    """Likelihoods of sentences of one length."""
    ids_ST = torch.from_numpy(np.stack([ids[row] for row in rows])).to(predictor.device)
    last = ids_ST.shape[1] + sentences.last
    inputs, rows_N, labels_N = (_masked if mask is not None else _shifted)(ids_ST, sentences.first, last, mask)
    with autocast(ids_ST.device.type, precision):
        features_ND = predictor({"input_ids": inputs}, rows_N)
    log_p_N = _log_probabilities(predictor, features_ND, labels_N)
    return log_p_N.double().view(len(rows), -1).sum(1).cpu().numpy()


def _masked(ids_ST: Tensor, first: int, last: int, mask: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Every sentence once for each scored token, with that token masked: inputs, predicted rows, their labels."""
    count, length = ids_ST.shape
    place_K = torch.arange(first, last, device=ids_ST.device)
    inputs = ids_ST.repeat_interleave(len(place_K), 0)
    rows_N = torch.arange(len(inputs), device=ids_ST.device) * length + place_K.repeat(count)
    inputs.view(-1)[rows_N] = cast(int, mask)
    return inputs, rows_N, ids_ST[:, first:last].flatten()


def _shifted(ids_ST: Tensor, first: int, last: int, _: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Every sentence once; each scored token is predicted at the position before it."""
    count, length = ids_ST.shape
    place_K = torch.arange(first - 1, last - 1, device=ids_ST.device)
    rows_N = (torch.arange(count, device=ids_ST.device)[:, None] * length + place_K).flatten()
    return ids_ST, rows_N, ids_ST[:, first:last].flatten()


def _log_probabilities(predictor: Predictor, features_ND: Tensor, labels_N: Tensor) -> Tensor:
    found = []
    for at in range(0, len(labels_N), _ROWS_AT_ONCE):
        logits_NV = predictor.logits(features_ND[at : at + _ROWS_AT_ONCE])
        gold_N = logits_NV.gather(1, labels_N[at : at + _ROWS_AT_ONCE, None]).squeeze(1)
        top_N1 = logits_NV.amax(1, keepdim=True)
        found.append(gold_N - top_N1.squeeze(1) - logits_NV.sub_(top_N1).exp_().sum(1).log_())
    return torch.cat(found)


def _distinct(ids: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """The different ones in order of appearance, and which of them each is."""
    seen: dict[bytes, int] = {}
    inverse = np.array([seen.setdefault(one.tobytes(), len(seen)) for one in ids])
    return [np.frombuffer(key, dtype=np.int64) for key in seen], inverse


def _by_length(ids: Sequence[np.ndarray], masked: bool) -> Iterator[np.ndarray]:
    length_S = np.array([len(one) for one in ids])
    for length in np.unique(length_S):
        rows = np.flatnonzero(length_S == length)
        count = max(_TOKENS_AT_ONCE // int(length * (length if masked else 1)), 1)
        yield from np.split(rows, range(count, len(rows), count))


def _first_of_each(paradigms: Sequence[str], limit: int | None) -> list[int]:
    seen: dict[str, int] = {}
    taken = []
    for row, paradigm in enumerate(paradigms):
        seen[paradigm] = seen.get(paradigm, 0) + 1
        if limit is None or seen[paradigm] <= limit:
            taken.append(row)
    return taken


def _shares(right: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    of = np.array(names)
    return {str(name): float(right[of == name].mean()) for name in sorted(set(names))}
