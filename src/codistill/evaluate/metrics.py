"""The metrics of GLUE: of predictions and labels, plain numpy.

Equal to scikit-learn's and scipy's, degenerate cases included: Matthews and F1 are 0 where nothing of a class was
predicted, correlations are NaN where one side is constant.
Shape suffixes: N examples, K classes, G groups of equal values.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], float]


def accuracy(predicted_N: np.ndarray, label_N: np.ndarray) -> float:
    """Share of examples whose class was predicted; NaN of none."""
    return float(np.mean(predicted_N == label_N)) if len(label_N) else math.nan


def f1(predicted_N: np.ndarray, label_N: np.ndarray) -> float:
    """2 · right / (predicted + present) of class 1; 0 where neither occurs."""
    predicted, present = predicted_N == 1, label_N == 1
    both = int(predicted.sum()) + int(present.sum())
    return 2 * int((predicted & present).sum()) / both if both else 0.0


def matthews(predicted_N: np.ndarray, label_N: np.ndarray) -> float:
    """Correlation of predicted and true class (Matthews 1975; for several classes Gorodkin 2004).

    With counts c right, s in all, p_k predicted and t_k true of class k:

        (c s − Σ p_k t_k) / √((s² − Σ p_k²) (s² − Σ t_k²)),  0 where either side is constant
    """
    count, right = len(label_N), int((predicted_N == label_N).sum())
    _, class_2N = np.unique(np.concatenate([predicted_N, label_N]), return_inverse=True)
    predicted_K, true_K = (
        np.bincount(half, minlength=int(class_2N.max(initial=0)) + 1) for half in (class_2N[:count], class_2N[count:])
    )
    spread = float(count**2 - (predicted_K**2).sum()) * float(count**2 - (true_K**2).sum())
    return float(count * right - (predicted_K * true_K).sum()) / math.sqrt(spread) if spread > 0 else 0.0


def pearson(predicted_N: np.ndarray, label_N: np.ndarray) -> float:
    """Linear correlation; NaN where either side is constant or there are fewer than two examples."""
    if len(label_N) < 2 or np.ptp(predicted_N) == 0 or np.ptp(label_N) == 0:
        return math.nan
    x_N, y_N = (values.astype(np.float64) - values.mean(dtype=np.float64) for values in (predicted_N, label_N))
    x_N, y_N = x_N / np.linalg.norm(x_N), y_N / np.linalg.norm(y_N)
    return float(np.clip(x_N @ y_N, -1, 1))


def spearman(predicted_N: np.ndarray, label_N: np.ndarray) -> float:
    """Pearson correlation of the ranks, ties sharing their mean rank; NaN as there."""
    return pearson(_ranks(predicted_N), _ranks(label_N))


METRICS: Mapping[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def _ranks(values_N: np.ndarray) -> np.ndarray:
    """Rank of each value from 0; equal values have the mean of the ranks they take up."""
    _, group_N, size_G = np.unique(values_N, return_inverse=True, return_counts=True)
    last_G = np.cumsum(size_G)
    return (last_G - (size_G + 1) / 2)[group_N]
