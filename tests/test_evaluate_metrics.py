"""The metrics of GLUE against scikit-learn and scipy, and against arithmetic."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from codistill.evaluate.metrics import METRICS
from codistill.evaluate.tasks import GLUE, read_split

ORACLES = {
    "accuracy": lambda p, y: sklearn_metrics.accuracy_score(y, p),
    "f1": lambda p, y: sklearn_metrics.f1_score(y, p),
    "matthews": lambda p, y: sklearn_metrics.matthews_corrcoef(y, p),
    "pearson": lambda p, y: stats.pearsonr(np.double(p), np.double(y)).statistic,
    "spearman": lambda p, y: stats.spearmanr(np.double(p), np.double(y)).statistic,
}
REAL = Path(__file__).parents[2] / "shared" / "data"


def same(name: str, predicted: np.ndarray, label: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs of constant input: the value is what counts
        wanted = ORACLES[name](predicted, label)
    np.testing.assert_allclose(METRICS[name](predicted, label), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["accuracy", "matthews"])
@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 7, 200])
def test_of_classes(name, classes, count):
    draw = np.random.default_rng(count)
    for _ in range(20):
        same(name, draw.integers(classes, size=count), draw.integers(classes, size=count))


@pytest.mark.parametrize("predicted", [[0, 0, 0], [1, 1, 1], [0, 1, 1]])
@pytest.mark.parametrize("label", [[0, 0, 0], [1, 1, 1], [1, 0, 1]])
@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews"])
def test_of_classes_that_do_not_occur(name, predicted, label):
    same(name, np.array(predicted), np.array(label))


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_of_numbers_with_ties(name, levels):
    draw = np.random.default_rng(levels)
    for count in (2, 3, 50, 400):
        predicted = np.round(draw.normal(size=count) * levels) / levels
        label = draw.integers(levels, size=count).astype(np.float32) / levels
        same(name, predicted.astype(np.float32), label)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize(("one", "other"), [([1.0, 1, 1], [1.0, 2, 3]), ([1.0, 2, 3], [4.0, 4, 4]), ([1.0], [2.0])])
def test_a_constant_has_no_correlation(name, one, other):
    assert math.isnan(METRICS[name](np.array(one), np.array(other)))
    if len(one) > 1:
        same(name, np.array(one), np.array(other))


def counts(name: str) -> np.ndarray:
    """Made-up labels of a task, uneven and with every class."""
    task = GLUE[name]
    if not task.classes:
        return np.linspace(0, 5, 101, dtype=np.float32)
    return np.repeat(np.arange(task.outputs), [60, 30, 10][: task.outputs])


@pytest.mark.parametrize("name", GLUE)
def test_a_perfect_oracle_scores_100(name):
    assert GLUE[name].scores(counts(name), counts(name))["score"] == pytest.approx(1, abs=1e-12)


def test_the_score_of_numbers_is_the_mean_of_both_correlations():
    """In the right order, so that Spearman's is 1; Pearson's is 11 / √(5 · 29)."""
    found = GLUE["stsb"].scores(np.array([0.0, 1, 2, 7]), np.array([0.0, 1, 2, 3]))
    assert found == pytest.approx({"pearson": 11 / 145**0.5, "spearman": 1, "score": (1 + 11 / 145**0.5) / 2})


@pytest.mark.parametrize("name", GLUE)
def test_a_majority_model_scores_what_arithmetic_says(name):
    label = counts(name)
    score = GLUE[name].scores(np.full_like(label, 0), label)["score"]
    share = {2: 60 / 90, 3: 0.6}.get(GLUE[name].outputs)
    wanted = {"cola": 0.0, "stsb": math.nan, "mrpc": share and share / 2, "qqp": share and share / 2}.get(name, share)
    np.testing.assert_allclose(score, wanted)


@pytest.mark.parametrize(
    ("name", "wanted"),
    # of the published label counts: the larger class's share, and half of it plus half of F1 = 2s/(1 + s) where the
    # larger class is the one that F1 is of
    [
        ("cola", 0.0),
        ("sst2", 444 / 872),
        ("mrpc", (279 / 408 + 2 * 279 / (279 + 408)) / 2),
        ("stsb", math.nan),
        ("mnli", 3479 / 9815),
        ("qnli", 2761 / 5463),
        ("rte", 146 / 277),
        ("wnli", 40 / 71),
    ],
)
def test_a_majority_model_on_the_real_dev_sets(name, wanted):
    if not (REAL / "glue").is_dir():
        pytest.skip("the real GLUE is not beside the repository")
    label = read_split(REAL, name, GLUE[name].splits[0]).label_N
    values, times = np.unique(label, return_counts=True)
    score = GLUE[name].scores(np.full_like(label, values[times.argmax()]), label)["score"]
    np.testing.assert_allclose(score, wanted, rtol=1e-12)


@pytest.mark.parametrize("name", GLUE)
def test_predictions_of_other_examples_score_as_chance(name):
    label = np.repeat(counts(name), 30)
    found = [GLUE[name].scores(np.random.default_rng(seed).permutation(label), label)["score"] for seed in range(20)]
    _, times = np.unique(label, return_counts=True)
    share = times / len(label)
    chance = {"cola": 0.0, "stsb": 0.0}.get(name, (share**2).sum())
    if name in ("mrpc", "qqp"):
        chance = (chance + share[1]) / 2  # F1 of a guess that keeps the shares is the share of class 1
    assert np.mean(found) == pytest.approx(chance, abs=0.015)
