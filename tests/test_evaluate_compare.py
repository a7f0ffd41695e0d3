"""Intervals against scipy and simulation, averages and agreement against arithmetic."""

import io
import math

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from codistill.evaluate.compare import (
    agreement,
    averages,
    comparisons,
    holm,
    paired,
    t_interval,
    t_probability,
    t_quantile,
)
from codistill.evaluate.results import Cell
from codistill.evaluate.table import tables
from codistill.evaluate.tasks import GLUE
from codistill.evaluate.zero_shot import short_name


def cell(model="one", task="glue/rte", seed=0, score=0.5, **more):
    return Cell(model, task, seed, score, **more)


@pytest.mark.parametrize("count", [2, 3, 4, 9])
def test_the_probability_is_that_of_a_t_test(count):
    values = np.random.default_rng(count).normal(0.7, 1, count).tolist()
    assert t_probability(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-9)


def test_differences_without_spread_are_certain_or_nothing():
    assert (t_probability([0.5, 0.5]), t_probability([0.0, 0.0])) == (0.0, 1.0)


def test_holm_stops_at_the_first_that_fails():
    """Of four: 0.005 ≤ 0.05 / 4 and 0.01 ≤ 0.05 / 3, then 0.03 > 0.05 / 2 ends it, though 0.04 ≤ 0.05."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert holm([]) == []


def test_holm_asks_less_of_the_second():
    """0.015 ≤ 0.05 / 3, though not ≤ 0.05 / 4, which is asked of the first of four."""
    assert holm([0.015, 0.9, 0.001, 0.5]) == [True, False, True, False]
    assert holm([0.015, 0.9, 0.9, 0.9]) == [False] * 4


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 30, 101])
@pytest.mark.parametrize("probability", [0.6, 0.95, 0.975, 0.999])
def test_the_quantile_of_student(freedom, probability):
    assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-9)


def test_the_interval_over_seeds_is_scipys():
    draw = np.random.default_rng(0)
    for count in (2, 3, 5, 10):
        differences = draw.normal(size=count)
        wanted = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        assert t_interval(differences.tolist()) == pytest.approx((wanted.low, wanted.high), rel=1e-9)


def test_losses_over_other_tokens_or_of_another_kind_are_not_compared():
    way = {"tokens_a_row": 128, "objective": "mlm", "tokenizer": "a"}
    one = [cell(task="mlm", seed=None, counted={"scored_as": way})]
    for change in ({"tokens_a_row": 64}, {"objective": "clm"}, {"tokenizer": "b"}):
        other = [cell("two", "mlm", None, 0.4, counted={"scored_as": way | change})]
        assert paired(one, other)["mean"] is None
    assert paired(one, [cell("two", "mlm", None, 0.4, counted={"scored_as": dict(way)})])["mean"] == pytest.approx(-0.1)


def test_differences_are_of_the_same_seeds():
    one = [cell(seed=s, score=v) for s, v in enumerate([0.5, 0.6, 0.7])]
    two = [cell("two", seed=s, score=v) for s, v in [(2, 0.8), (0, 0.7), (5, 0.1)]]
    two.append(Cell("two", "glue/rte", 1, failed="why"))
    found = paired(one, two)
    assert found["seeds"] == 2
    assert found["mean"] == pytest.approx(0.15)
    assert found["interval"] == pytest.approx(stats.ttest_1samp([0.2, 0.1], 0).confidence_interval(0.95))
    assert not found["headline"]
    assert paired(one[:1], two)["interval"] is None


def test_five_seeds_may_be_a_headline():
    one, two = ([cell(name, seed=s, score=0.1 * s) for s in range(5)] for name in ("one", "two"))
    assert paired(one, two)["headline"]


def test_the_bootstrap_is_over_examples():
    """Of accuracy its interval is that of a binomial share."""
    label = [1] * 400
    predicted = [1] * 300 + [0] * 100
    found = comparisons([cell(score=0.75, predictions=predicted, labels=label)])
    low, high = found["tasks"]["glue/rte"]["one"]["examples_interval"]
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.008)


@pytest.mark.parametrize("right", [0, 3])
def test_the_bootstrap_draws_every_example_with_repetition(right):
    """Right about one of four: of Binomial(4, ¼) a share of 0.316 is 0, of 0.949 at most 2 and of 0.996 at most 3."""
    predicted = [int(at == right) for at in range(4)]
    found = comparisons([cell(score=0.25, predictions=predicted, labels=[1] * 4)])
    assert found["tasks"]["glue/rte"]["one"]["examples_interval"] == (0, 0.75)


def test_the_bootstrap_of_a_difference_is_paired():
    """Two models that err on the same examples differ by exactly as much on every resample."""
    draw = np.random.default_rng(0)
    label = draw.integers(2, size=300).tolist()
    one = [int(y) if draw.random() < 0.8 else 1 - int(y) for y in label]
    found = paired([cell(predictions=one, labels=label)], [cell("two", predictions=one, labels=label)])
    assert found["examples_interval"] == (0, 0)


def test_the_bootstrap_of_a_difference_is_of_the_other_less_the_reference_a_seed():
    """Right on 200 of 400, and on 100 more, with each of two seeds: +1 on a quarter of the examples."""
    ask = {"labels": [1] * 400}
    one = [cell(seed=s, score=0.5, predictions=[1] * 200 + [0] * 200, **ask) for s in (0, 1)]
    two = [cell("two", seed=s, score=0.75, predictions=[1] * 300 + [0] * 100, **ask) for s in (0, 1)]
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    for sign, found in ((1, paired(one, two)), (-1, paired(two, one))):
        assert found["mean"] == sign * 0.25
        wanted = sorted([sign * (0.25 - half), sign * (0.25 + half)])
        assert found["examples_interval"] == pytest.approx(wanted, abs=0.008)


def test_the_averages_state_their_members():
    means = {f"glue/{name}": {"mean": 0.1 * i} for i, name in enumerate(GLUE)}
    found = averages(means | {"blimp": {"mean": 9.0}})
    assert found["with_wnli"]["mean"] == pytest.approx(0.4)
    assert found["without_wnli"]["mean"] == pytest.approx(0.35)
    assert found["with_wnli"]["of"] == list(GLUE)
    assert found["without_wnli"]["missing"] == []


def test_a_missing_task_is_left_out_and_named():
    found = averages({"glue/cola": {"mean": 0.2}, "glue/rte": {"mean": None}})["with_wnli"]
    assert (found["mean"], found["of"]) == (0.2, ["cola"])
    assert "rte" in found["missing"]


def test_what_is_not_a_number_makes_the_average_none():
    found = averages({"glue/cola": {"mean": 0.2}, "glue/stsb": {"mean": math.nan}})["with_wnli"]
    assert math.isnan(found["mean"])
    assert found["not_a_number"] == ["stsb"]


def test_agreement():
    one, two = cell(predictions=[0, 1, 1, 0]), cell("two", predictions=[0, 1, 1, 1])
    assert agreement([one], [two]) == 0.75
    numbers = [cell(m, "glue/stsb", predictions=p) for m, p in (("one", [1.0, 2, 3]), ("two", [3.0, 2, 1]))]
    assert agreement(numbers[:1], numbers[1:]) == pytest.approx(-1)


def test_every_model_has_its_own_mean():
    found = comparisons([cell(score=0.4), cell("two", score=0.8), cell("two", "glue/cola", score=0.1)])["tasks"]
    assert {m: s["mean"] for m, s in found["glue/rte"].items()} == {"one": 0.4, "two": 0.8}
    assert {m: s["mean"] for m, s in found["glue/cola"].items()} == {"two": 0.1}


def test_the_spread_over_seeds_is_that_of_a_sample():
    """Squares of −0.2, 0 and 0.2: their sum 0.08 over two degrees of freedom is 0.2²."""
    found = comparisons([cell(seed=s, score=v) for s, v in enumerate([0.4, 0.6, 0.8])])["tasks"]["glue/rte"]["one"]
    assert (found["mean"], found["sd"]) == (pytest.approx(0.6), pytest.approx(0.2))


def test_failed_seeds_do_not_count_as_scores():
    found = comparisons([cell(score=0.4), Cell("one", "glue/rte", 1, failed="no memory")])["tasks"]["glue/rte"]["one"]
    assert (found["mean"], found["seeds"], found["failed"]) == (0.4, 1, ["no memory"])


def test_sources_keep_as_much_of_their_path_as_tells_them_apart():
    paths = ["/data/a/x/test.parquet", "/data/b/x/test.parquet", "/data/b/y/test.parquet"]
    assert [short_name(path, paths) for path in paths] == ["a/x/test.parquet", "b/x/test.parquet", "y/test.parquet"]


@pytest.mark.parametrize(("count", "width", "fit"), [(2, 80, True), (8, 80, False), (8, 300, True), (2, 70, False)])
def test_models_that_do_not_fit_side_by_side_are_rows(count, width, fit):
    """Each by its whole name in every case, and beside it its own score."""
    found = {f"run-{n}/large": 0.5 + n / 100 for n in range(count)}
    cells = [cell(name, task, score=score) for task in ("glue/rte", "glue/sst2") for name, score in found.items()]
    console = Console(width=width, file=io.StringIO())
    console.print(tables({"comparisons": comparisons(cells), "cells": []}, width))
    scores = console.file.getvalue().split("Differences")[0].splitlines()
    assert max(len(line) for line in scores) <= width
    if fit:
        assert [line.split() for line in scores if "task" in line] == [["task", *found]]
        assert [line.split()[1:] for line in scores if "glue/rte" in line] == [
            [f"{x * 100:.1f}" for x in found.values()]
        ]
    else:
        rows = [line.split()[-2:] for line in scores if "/large" in line]
        assert rows[: 2 * count] == [[name, f"{score * 100:.1f}"] for name, score in found.items()] * 2
        assert [line.split()[0] for line in scores if "glue/" in line] == ["glue/rte", "glue/sst2"]
