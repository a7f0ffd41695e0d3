"""Other libraries beside ours: the same gradients where they train the same thing, and a reason where they cannot."""

import importlib.util
import warnings

import pytest

from codistill.bench import step as bench
from runs import small_run

RANDOM_TEACHER = ["members.weak.path=null", "members.weak.model={family: modernbert, layers: 1, width: 16}"]
CAUSAL_TEACHER = ["members.weak.path=null", "members.weak.model={family: llama, layers: 1, width: 16}"]
MUTUAL, ONE_WAY = "pytorch-dml", ("textbrewer", "modelopt")
MODULES = {"textbrewer": "textbrewer", "modelopt": "modelopt", "pytorch-dml": "pydml"}


def row_of(peer: str, recipe: str, text, *more: str) -> dict:
    run = small_run(recipe, text, "batch={sequences: 4, accumulate: 2}", "precision=float32", *more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, of versions that they were not tested with and of old syntax
        (row,) = bench.bench_step(run, runs=1, providers=[peer])["results"]
    return row


def assert_same(row: dict) -> None:
    assert "reason" not in row
    assert row["cosine"] == pytest.approx(1, abs=1e-6)
    assert row["norm_ratio"] == pytest.approx(1, abs=1e-5)
    assert row["seconds"]["median"] > 0


def need(peer: str) -> None:
    if importlib.util.find_spec(MODULES[peer]) is None:
        pytest.skip(f"{bench.PROVIDERS[peer].package} is not installed")


@pytest.mark.parametrize("peer", ONE_WAY)
@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("dwt:tiny", [*RANDOM_TEACHER, "distillation.0.weight=3", "distillation.0.temperature=2"]),
        ("inherit:tiny", [*RANDOM_TEACHER, "members.large.hard_weight=0.25"]),
        ("dwt-clm:tiny", CAUSAL_TEACHER),
    ],
)
def test_a_one_way_peer_trains_the_same_student(peer, recipe, more, text):
    need(peer)
    assert_same(row_of(peer, recipe, text, *more))


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("ctcd:tiny", [f"distillation.{n}.{s}" for n in (0, 1) for s in ("weight=3", "temperature=2")]),
        ("ctcd-clm:tiny", ["members.large.hard_weight=0.5", "members.small.hard_weight=0.5"]),
    ],
)
def test_pytorch_dml_trains_the_same_pair(recipe, more, text):
    need(MUTUAL)
    assert_same(row_of(MUTUAL, recipe, text, *more))


@pytest.mark.parametrize(
    ("peer", "recipe", "more", "reason"),
    [
        *((peer, "ctcd:tiny", [], "it trains one student of one frozen teacher") for peer in ONE_WAY),
        *((peer, "one-way:tiny", [], "it trains one student of one frozen teacher") for peer in ONE_WAY),
        (MUTUAL, "dwt:tiny", RANDOM_TEACHER, "it trains models that all teach one another"),
        (MUTUAL, "one-way:tiny", [], "it trains models that all teach one another"),
        (MUTUAL, "ctcd:tiny", ["distillation.1.weight=2"], "two weights, which all its models share"),
        (MUTUAL, "ctcd:tiny", ["members.small.hard_weight=0.5"], "two weights, which all its models share"),
        (MUTUAL, "ctcd:tiny", ["distillation.0.divergence=reverse_kl"], "the forward KL of logits only"),
    ],
)
def test_what_a_peer_cannot_train_is_an_empty_row_with_its_reason(peer, recipe, more, reason, text):
    row = row_of(peer, recipe, text, *more)
    assert reason in row["reason"]
    assert "seconds" not in row
