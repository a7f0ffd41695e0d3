"""Held-out scores of members on given batches. Shape suffixes: N predicted rows, D width, V vocabulary."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from codistill.distributed import ALONE, Ranks
from codistill.machine import autocast
from codistill.models import Predictor
from codistill.objectives import Batch

_ROWS_AT_ONCE = 512  # bounds the logits held at once; has no influence on a row's loss


class Score(NamedTuple):
    """`loss`: mean cross-entropy of the predicted rows in nats; `accuracy`: share of rows whose top guess is right."""

    loss: float
    accuracy: float
    rows: int

    @property
    def perplexity(self) -> float:
        """exp(loss): over masked rows for a masked LM, which is not comparable with a causal perplexity."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def held_out(
    predictor: Predictor, batches: Sequence[Batch], precision: torch.dtype = torch.float32, ranks: Ranks = ALONE
) -> Score:
    """The score of `predictor` in evaluation mode; rows of weight 0 do not count.

    Every rank gives all `batches` and scores its share of them; the score's bits do not depend on how many ranks.
    """
    was_training = predictor.training
    predictor.eval()
    sums_K3 = torch.zeros(len(batches), 3, dtype=torch.float64)
    for first in range(0, len(batches), ranks.world):
        # A rank that has run out of batches takes part all the same: shards of a model are put together by all ranks.
        index = min(first + ranks.rank, len(batches) - 1)
        sums_3 = _sums_of(predictor, batches[index], precision)
        if index == first + ranks.rank:
            sums_K3[index] = sums_3.cpu()
    predictor.train(was_training)
    ranks.release([predictor])
    loss, right, rows = sum(ranks.sum_on_host(sums_K3).unbind(), torch.zeros(3, dtype=torch.float64)).tolist()
    return Score(loss / rows, right / rows, round(rows)) if rows else Score(math.nan, math.nan, 0)


def unigram_cross_entropy(counts_V: np.ndarray, batches: Sequence[Batch], asked_V: np.ndarray) -> float:
    """Cross-entropy in nats of the predicted labels under the training text's token frequencies (add-one smoothed),
    among those tokens only that a model is ever asked for (`asked_V`, bool).

    What a model reaches that knows how often each token occurs, and nothing else.
    """
    smoothed_V = np.where(asked_V, counts_V + 1.0, 0.0)
    with np.errstate(divide="ignore"):
        log_p_V = np.log(smoothed_V / smoothed_V.sum())
    labels, weights = zip(*((_numpy(b.labels_N), _numpy(b.weight_N)) for b in batches), strict=True)
    label_N, weight_N = np.concatenate(labels), np.concatenate(weights)
    counts_N = weight_N > 0  # the others' labels may be of tokens that are never asked for
    return float(-np.average(log_p_V[label_N[counts_N]], weights=weight_N[counts_N]))


def _sums_of(predictor: Predictor, batch: Batch, precision: torch.dtype) -> Tensor:
    with autocast(batch.labels_N.device.type, precision):
        features_ND = predictor(batch.inputs, batch.rows_N)
    return _sums(predictor, features_ND, batch)


def _sums(predictor: Predictor, features_ND: Tensor, batch: Batch) -> Tensor:
    """(3,) float64: summed loss, right guesses, rows."""
    loss = right = torch.zeros((), dtype=torch.float64, device=features_ND.device)
    for at in range(0, len(features_ND), _ROWS_AT_ONCE):
        rows = slice(at, at + _ROWS_AT_ONCE)
        logits_NV = predictor.logits(features_ND[rows])
        labels_N, weight_N = batch.labels_N[rows], batch.weight_N[rows].double()
        loss = loss + functional.cross_entropy(logits_NV, labels_N, reduction="none").double() @ weight_N
        right = right + (logits_NV.argmax(-1) == labels_N).double() @ weight_N
    return torch.stack([loss, right, batch.weight_N.double().sum()])


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
