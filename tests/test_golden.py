"""Golden losses: the numbers of three small cohorts, committed, which no change may move by more than rounding.

`python tests/test_golden.py` writes them anew, for a change that means to move them and says so in the changelog.
"""

import json
from pathlib import Path

import pytest
import torch

from codistill.cohort import Cohort, Distillation
from codistill.schedules import build
from cohorts import batch, member

FILE = Path(__file__).with_name("golden") / "losses.json"
STEPS = 20
NAMES = ("standalone", "dwt", "ctcd", "causal")


def new_cohort(name: str) -> Cohort:
    large, small = member("large", 2, dropout=0.0), member("small", 1, family="bert", dropout=0.0)
    if name == "causal":
        large, small = member("large", 2, family="llama", dropout=0.0), member("small", 1, family="gpt2", dropout=0.0)
        return Cohort([large, small], [Distillation("small", "large"), Distillation("large", "small", temperature=2.0)])
    if name == "standalone":
        return Cohort([large])
    if name == "dwt":
        weak = member("weak", 1, dropout=0.0, trained=False)
        return Cohort([weak, large], [Distillation("weak", "large", weight=build({"linear": [4, 1]}, STEPS))])
    edges = [
        Distillation("small", "large", "reverse_kl", temperature=2.0),
        Distillation("large", "small", "jensen_shannon", weight=build({"cosine": [2, 0]}, STEPS)),
    ]
    return Cohort([large, small], edges)


def losses(name: str) -> list[dict[str, float]]:
    cohort = new_cohort(name)
    metrics = [cohort.step(step, [batch(2 * step), batch(2 * step + 1, rows=9)]) for step in range(STEPS)]
    return [{key: value.item() for key, value in line.items() if not key.endswith("grad_norm")} for line in metrics]


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_the_golden_ones(name):
    if name != "causal" and torch.__version__ < "2.13":  # compares versions, not words
        pytest.skip("PyTorch before 2.13 draws other initial values (trunc_normal_) from the same seed")
    golden = json.loads(FILE.read_text())[name]
    got = losses(name)
    assert len(got) == len(golden) == STEPS
    for step, (line, expected) in enumerate(zip(got, golden, strict=True)):
        assert line == pytest.approx(expected, rel=1e-5), f"step {step}"


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: losses(name) for name in NAMES}, indent=1) + "\n")
