"""Schedules against values worked out by hand."""

import math

import pytest

from codistill.errors import UserError
from codistill.schedules import build, check


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (0.5, {0: 0.5, 99: 0.5}),
        ({"linear": [4, 1]}, {0: 4, 25: 3.25, 50: 2.5, 100: 1}),
        ({"linear": [1, 0, 20]}, {0: 1, 5: 0.75, 20: 0, 99: 0}),
        ({"cosine": [1, 0]}, {0: 1, 25: (1 + math.sqrt(0.5)) / 2, 50: 0.5, 100: 0}),
        ({"step": {0: 0, 30: 2.5, 60: 1}}, {0: 0, 29: 0, 30: 2.5, 59: 2.5, 60: 1, 99: 1}),
        ({"step": {60: 1, 0: 0, 30: 2.5}}, {0: 0, 29: 0, 30: 2.5, 60: 1}),
        ({"warmup_linear": [8, 0.2]}, {0: 0.4, 9: 4, 19: 8, 20: 8, 60: 4, 99: 0.1}),
        ({"warmup_cosine": [8, 0.2]}, {0: 0.4, 19: 8, 60: 4, 100: 0}),
        ({"warmup_linear": [8, 0]}, {0: 8, 50: 4}),
    ],
)
def test_values(spec, expected):
    schedule = build(check(spec, "lr"), 100)
    assert {step: pytest.approx(value) for step, value in expected.items()} == {s: schedule(s) for s in expected}


@pytest.mark.parametrize(
    "spec",
    [
        -1,
        "fast",
        True,
        None,
        float("nan"),
        float("inf"),
        {},
        {"linear": [1]},
        {"linear": [1, -1]},
        {"linear": [1, 0, 0]},
        {"linear": [1, 0, 2.5]},
        {"step": {5: 1}},
        {"step": {0: "a"}},
        {"warmup_linear": [1, 1.5]},
        {"polynomial": [1, 0]},
        {"linear": [1, 0], "cosine": [1, 0]},
    ],
)
def test_what_is_no_schedule_is_refused_by_field(spec):
    with pytest.raises(UserError, match=r"^members\.a\.lr: .*is no schedule; write a number ≥ 0"):
        check(spec, "members.a.lr")
