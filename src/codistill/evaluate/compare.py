"""Models side by side: spread over seeds, paired differences, a bootstrap over examples, agreement.

Seeds and examples are two sources of chance and are kept apart: an interval over seeds says how far another
fine-tuning would fall, a bootstrap over examples how far another dev set would.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from codistill.evaluate.results import Cell
from codistill.evaluate.tasks import GLUE
from codistill.seeds import seed_of

SEEDS_FOR_A_HEADLINE = 5
_RESAMPLES = 1000
_CONFIDENCE = 0.95


def comparisons(cells: Sequence[Cell]) -> dict[str, Any]:
    """Per task: each model's `mean` and `sd` over seeds and interval over examples, and differences to the first model.

    The GLUE averages, with and without WNLI, stand beside them, each with the tasks it is made of.
    """
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    models = list(dict.fromkeys(cell.model for cell in cells))
    by = {(m, t): [c for c in cells if c.model == m and c.task == t] for m in models for t in tasks}
    found = {task: {m: _summary(by[m, task]) for m in models if by[m, task]} for task in tasks}
    return {
        "tasks": found,
        "averages": {m: averages({t: f[m] for t, f in found.items() if m in f}) for m in models},
        "paired": {t: {m: paired(by[models[0], t], by[m, t]) for m in models[1:] if by[m, t]} for t in tasks},
        "agreement": {t: {m: agreement(by[models[0], t], by[m, t]) for m in models[1:] if by[m, t]} for t in tasks},
        "reference": models[0] if models else None,
    }


def averages(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of a model's GLUE scores, with and without WNLI, and which tasks it is made of.

    A task that failed or was not asked for is left out and its absence shows in `of`; one whose metric has no number
    makes the mean NaN, and stands in `not_a_number`.
    """
    scored = {task.removeprefix("glue/"): s["mean"] for task, s in summaries.items() if task.startswith("glue/")}
    found = {}
    for name, left_out in (("with_wnli", ()), ("without_wnli", ("wnli",))):
        used = {t: scored[t] for t in GLUE if scored.get(t) is not None and t not in left_out}
        found[name] = {
            "mean": float(np.mean(list(used.values()))) if used else None,
            "of": list(used),
            "missing": [t for t in GLUE if t not in used and t not in left_out],
            "not_a_number": [t for t, value in used.items() if math.isnan(value)],
        }
    return found


def paired(reference: Sequence[Cell], other: Sequence[Cell]) -> dict[str, Any]:
    """Differences other − reference of the same seeds: mean, Student-t interval over seeds (None for a single one), and
    the interval of a bootstrap over examples of the mean difference."""
    pairs = _pairs(reference, other)
    differences = [b.score - a.score for a, b in pairs]  # type: ignore[operator]
    return {
        "seeds": len(differences),
        "mean": float(np.mean(differences)) if differences else None,
        "interval": t_interval(differences) if len(differences) > 1 else None,
        "examples_interval": _bootstrap([a for a, _ in pairs], [b for _, b in pairs]),
        "headline": len(differences) >= SEEDS_FOR_A_HEADLINE,
    }


def agreement(reference: Sequence[Cell], other: Sequence[Cell]) -> float | None:
    """Share of examples for which both predict the same, mean over seeds; for numbers their correlation."""
    pairs = _pairs(reference, other)
    found = [_agreement(a, b) for a, b in pairs if a.predictions and len(a.predictions) == len(b.predictions)]
    return float(np.mean(found)) if found else None


def t_interval(differences: Sequence[float]) -> tuple[float, float]:
    """mean ± t · sd / √n with Student's t of n − 1 degrees of freedom; needs n ≥ 2."""
    count = len(differences)
    half = t_quantile((1 + _CONFIDENCE) / 2, count - 1) * float(np.std(differences, ddof=1)) / math.sqrt(count)
    mean = float(np.mean(differences))
    return mean - half, mean + half


def t_probability(differences: Sequence[float]) -> float:
    """How often chance alone, without any difference, has means as far from 0: the two-sided p of the paired t-test;
    needs n ≥ 2."""
    error = float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    if error == 0:
        return float(np.mean(differences) == 0)
    return 2 * (1 - _t_below(abs(float(np.mean(differences))) / error, len(differences) - 1))


def holm(probabilities: Sequence[float]) -> list[bool]:
    """Which of these are shown although they are so many: but for 5 % none is by chance (Holm 1979). The k-th smallest
    of m is held to 0.05 / (m − k + 1), and all after the first that fails fail."""
    found = [False] * len(probabilities)
    for k, at in enumerate(sorted(range(len(probabilities)), key=lambda at: probabilities[at])):
        if probabilities[at] > (1 - _CONFIDENCE) / (len(probabilities) - k):
            break
        found[at] = True
    return found


def t_quantile(probability: float, freedom: int) -> float:
    """The value that Student's t stays below with `probability` > ½, by bisection of its distribution."""
    low, high = 0.0, 1.0
    while _t_below(high, freedom) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _t_below(t: float, freedom: int) -> float:
    """P(T < t) for t ≥ 0 and whole degrees of freedom: the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = 1.0, 0.0
    if freedom % 2:
        term = cosine
        for k in range(1, freedom - 1, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        return 0.5 + (angle + sine * total) / math.pi
    for k in range(0, freedom - 1, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    return 0.5 + sine * total / 2


def _summary(cells: Sequence[Cell]) -> dict[str, Any]:
    scores = [cell.score for cell in cells if not cell.failed and cell.score is not None]
    return {
        "mean": float(np.mean(scores)) if scores else None,
        "sd": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
        "seeds": len(scores),
        "failed": [cell.failed for cell in cells if cell.failed],
        "examples_interval": _bootstrap([c for c in cells if not c.failed and c.predictions]),
    }


def _pairs(reference: Sequence[Cell], other: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """Of one seed, and scored in one way: a masked loss and a causal one, or losses over other tokens, say nothing of
    one another."""
    good = {cell.seed: cell for cell in other if not cell.failed}
    both = [(cell, good[cell.seed]) for cell in reference if not cell.failed and cell.seed in good]
    return [(a, b) for a, b in both if a.counted.get("scored_as") == b.counted.get("scored_as")]


def _bootstrap(cells: Sequence[Cell], others: Sequence[Cell] | None = None) -> tuple[float, float] | None:
    """The percentile interval of the score (or others − cells), mean over seeds, over resampled examples."""
    both = [*cells, *(others or [])]
    if not cells or len({len(cell.predictions) for cell in both}) != 1 or not both[0].predictions:
        return None
    count = len(both[0].predictions)
    arrays = [(np.array(cell.predictions), np.array(cell.labels)) for cell in both]
    sign = [-1 if others is not None and i < len(cells) else 1 for i in range(len(both))]
    draw = np.random.default_rng(seed_of("bootstrap"))
    means = []
    for _ in range(_RESAMPLES):
        rows = draw.integers(count, size=count)
        scores = [s * _score(cells[0].task, p[rows], y[rows]) for s, (p, y) in zip(sign, arrays, strict=True)]
        means.append(sum(scores) / len(cells))
    low, high = np.quantile(means, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)


def _score(task: str, predicted_N: np.ndarray, label_N: np.ndarray) -> float:
    if task == "blimp":
        return float(predicted_N.mean())
    return GLUE[task.removeprefix("glue/")].scores(predicted_N, label_N)["score"]


def _agreement(one: Cell, other: Cell) -> float:
    a, b = np.array(one.predictions), np.array(other.predictions)
    if one.task.startswith("glue/") and not GLUE[one.task.removeprefix("glue/")].classes:
        return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else math.nan
    return float(np.mean(a == b))
