"""One process, two with DDP, two with FSDP2: the same step, the same run, the same checkpoint."""

from functools import partial

import pytest
import torch
from torch.optim import AdamW, Optimizer

from codistill.cohort import Cohort, Distillation, Member
from codistill.distributed import ALONE, Ranks, started, whole
from codistill.schedules import constant
from cohorts import batch, predictor
from ranks import on_ranks

ENGINES = ["ddp", "fsdp2"]
BOTH_WAYS = [Distillation("large", "small"), Distillation("small", "large")]
GUIDED = [*BOTH_WAYS, Distillation("guide", "large", "reverse_kl")]


class Descent(Optimizer):
    """θ ← θ − lr · g, for shards too, of which PyTorch's fused SGD knows nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.0})

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(parameter.grad, alpha=-self.param_groups[0]["lr"])


def placed(ranks: Ranks, name: str, layers: int = 1, *, optimizer=Descent, clip: float = 1e9, tied=True, **kwargs) -> Member:
    built = predictor(name, layers, dropout=kwargs.pop("dropout", 0.0), **kwargs)
    if not tied:
        output = built._output[0]
        output.weight = torch.nn.Parameter(output.weight.detach().clone())
    if ranks.rank:  # what rank 0 has must win
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.zero_()
    ranks.place(built)
    learner = None if optimizer is None else optimizer(built.parameters())
    return Member(name, built, learner, lr=constant(0.1 if optimizer is Descent else 1e-3), clip=clip)


def new_cohort(ranks: Ranks, kind: str = "sgd") -> Cohort:
    settings = {
        "sgd": {},
        "adamw": {"optimizer": partial(AdamW, fused=True), "clip": 0.1},
        "clipped": {"clip": 0.1},
        "untied": {"tied": False},
        "bert": {"family": "bert"},
        "dropout": {"dropout": 0.1},
    }[kind]
    guide = placed(ranks, "guide", **settings | {"optimizer": None})
    members = [placed(ranks, "large", 2, **settings), placed(ranks, "small", **settings), guide]
    return Cohort(members, GUIDED, ranks=ranks)


def share(step: int, ranks: Ranks, world: int) -> list:
    """Two micro-batches for each of `world` ranks, of different sizes; one process takes all of them."""
    every = [batch(100 * step + i, sequences=2 + i % 2, rows=20 - 5 * i) for i in range(2 * world)]
    return every[ranks.rank :: ranks.world] if ranks.world > 1 else every


def state(cohort: Cohort) -> dict[str, list[torch.Tensor]]:
    """Of the members, whole and on every rank."""
    cohort.ranks.release([member.predictor for member in cohort.members.values()])
    return {m.name: [whole(p.detach()).clone() for p in m.predictor.parameters()] for m in cohort.members.values()}


def stepped(engine: str, kind: str, world: int, steps: int = 5) -> dict:
    with started(engine, "cpu") as ranks:
        cohort = new_cohort(ranks, kind)
        metrics = [cohort.step(step, share(step, ranks, world)) for step in range(steps)]
        cohort.raise_failure()
        return {"state": state(cohort), "metrics": metrics}


def assert_close(one: dict, other: dict, tolerance: float = 1e-6) -> None:
    for name, tensors in one["state"].items():
        for a, b in zip(tensors, other["state"][name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    for mine, theirs in zip(one["metrics"], other["metrics"], strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "clipped", "untied", "bert"])
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_make_the_step_of_one(engine, kind):
    one = stepped("single", kind, world=2)
    first, second = on_ranks(stepped, engine, kind, 2)
    assert_close(one, first)
    assert_close(first, second, tolerance=0)
