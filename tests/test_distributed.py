"""One process, two with DDP, two with FSDP2: the same step, the same run, the same checkpoint."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from codistill.cohort import Cohort, Distillation, Member
from codistill.distributed import ALONE, Ranks, start, whole
from codistill.errors import FailedElsewhere, MachineError, UserError
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


def placed(
    ranks: Ranks, name: str, layers: int = 1, *, optimizer=Descent, clip: float = 1e9, tied=True, **kwargs
) -> Member:
    built = predictor(name, layers, dropout=kwargs.pop("dropout", 0.0), **kwargs)
    if not tied:
        output = built._parts.output
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
        "llama": {"family": "llama"},
        "dropout": {"dropout": 0.1},
    }[kind]
    guide = placed(ranks, "guide", **settings | {"optimizer": None})
    members = [placed(ranks, "large", 2, **settings), placed(ranks, "small", **settings), guide]
    return Cohort(members, GUIDED, ranks=ranks)


def share(step: int, ranks: Ranks, world: int) -> list:
    """Two micro-batches for each of `world` ranks, of different sizes; one process takes all of them."""
    every = [batch(100 * step + i, sequences=2 + i % 2, rows=20 - 3 * i) for i in range(2 * world)]
    return every[ranks.rank :: ranks.world] if ranks.world > 1 else every


def state(cohort: Cohort) -> dict[str, list[torch.Tensor]]:
    """Of the members, whole and on every rank."""
    cohort.ranks.release([member.predictor for member in cohort.members.values()])
    return {m.name: [whole(p.detach()).clone() for p in m.predictor.parameters()] for m in cohort.members.values()}


def stepped(engine: str, kind: str, world: int, steps: int = 5) -> dict:
    ranks = start(engine, "cpu")
    cohort = new_cohort(ranks, kind)
    metrics = [cohort.step(step, share(step, ranks, world)) for step in range(steps)]
    assert cohort.failure() is None
    return {"state": state(cohort), "metrics": metrics}


def assert_close(one: dict, other: dict, tolerance: float = 1e-6) -> None:
    for name, tensors in one["state"].items():
        for a, b in zip(tensors, other["state"][name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    for mine, theirs in zip(one["metrics"], other["metrics"], strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "clipped", "untied", "bert", "llama"])
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_make_the_step_of_one(engine, kind):
    one = stepped("single", kind, world=2)
    first, second = on_ranks(stepped, engine, kind, 2)
    assert_close(one, first)
    assert_close(first, second, tolerance=0)


def test_shards_need_not_be_even():
    """32 units and 50 tokens on three ranks."""
    one = stepped("single", "adamw", world=3, steps=2)
    for result in on_ranks(stepped, "fsdp2", "adamw", 3, 2, world=3):
        assert_close(one, result)


def company(engine: str, names: list[str]) -> dict:
    ranks = start(engine, "cpu")
    layers = {"large": 2, "small": 1, "guide": 3}
    edges = [Distillation("large", "small")] if "small" in names else []
    adamw = {"optimizer": partial(AdamW, fused=True), "dropout": 0.1}
    cohort = Cohort([placed(ranks, name, layers[name], **adamw) for name in names], edges, ranks=ranks)
    for step in range(3):
        cohort.step(step, share(step, ranks, 2))
    return state(cohort)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_members_bits_do_not_depend_on_its_company(engine):
    alone = on_ranks(company, engine, ["large"])[0]
    among = on_ranks(company, engine, ["guide", "small", "large"])[0]
    for a, b in zip(alone["large"], among["large"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def broken_on_rank_1(engine: str) -> dict:
    ranks = start(engine, "cpu")
    cohort = new_cohort(ranks, "adamw")
    cohort.step(0, share(0, ranks, 2))
    if ranks.rank == 1:
        with torch.no_grad():
            bias = cohort.members["small"].predictor.output_bias
            (bias.to_local() if isinstance(bias, DTensor) else bias)[0] = float("nan")
    before = state(cohort)
    cohort.step(1, share(1, ranks, 2))
    cohort.step(2, share(2, ranks, 2))
    return {"before": before, "after": state(cohort), "failure": str(cohort.failure())}


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_not_finite_on_one_rank_changes_no_parameter_on_any(engine):
    for result in on_ranks(broken_on_rank_1, engine):
        assert "step 1: the loss or gradient of small was not finite" in result["failure"]
        for name, tensors in result["before"].items():
            for a, b in zip(tensors, result["after"][name], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def exchanges(engine: str, micro_batches: int) -> int:
    """How many sums over the ranks one step takes."""
    calls = []

    def counted(collective):
        return lambda *args, **kwargs: (calls.append(1), collective(*args, **kwargs))[1]

    ranks = start(engine, "cpu")
    cohort = new_cohort(ranks)
    cohort.step(0, [batch(ranks.rank)])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "reduce_scatter_single", "reduce_scatter_tensor"):  # torch 2.13, and before
            if hasattr(dist, name):
                patch.setattr(dist, name, counted(getattr(dist, name)))
        cohort.step(1, [batch(10 * i + ranks.rank) for i in range(micro_batches)])
    return len(calls)


@pytest.mark.parametrize(("engine", "expected"), [("ddp", 2 + 2), ("fsdp2", 3 + 5)])
def test_accumulation_exchanges_no_more_gradients(engine, expected):
    """Rows and losses, and for FSDP2 norms; a bucket of each of two members, or their three layers and two rests."""
    assert on_ranks(exchanges, engine, 1) == on_ranks(exchanges, engine, 4) == [expected] * 2


def words_and_numbers() -> dict:
    ranks = start("ddp", "cpu")
    said = [ranks.any_late(flag and ranks.rank == 1) for flag in (False, True, False, False)]
    number = ranks.broadcast_int(40 + ranks.rank)
    table = ranks.sum_on_host(
        torch.tensor([[0.1], [0.2]], dtype=torch.float64) * (torch.arange(2) == ranks.rank)[:, None]
    )
    together = ranks.together(lambda: "both")
    errors = []
    for work in (fails_on(ranks, 1, UserError), fails_on(ranks, 0, MachineError), lambda: ranks.on_main(no_space)):
        with pytest.raises((UserError, MachineError, FailedElsewhere)) as failure:
            ranks.together(work) if work.__name__ == "work" else work()
        errors.append(f"{type(failure.value).__name__} {failure.value}")
    ranks.check_same("text", "data")
    with pytest.raises((UserError, FailedElsewhere)) as failure:
        ranks.check_same(f"text {ranks.rank}", "data")
    errors.append(f"{type(failure.value).__name__} {failure.value}")
    with pytest.raises((UserError, FailedElsewhere)):
        ranks.check_same("x" * 5000 + str(ranks.rank), "data")
    return {"said": said, "number": number, "table": table, "together": together, "errors": errors}


def no_space() -> None:
    raise MachineError("no space")


def fails_on(ranks: Ranks, rank: int, error: type[Exception]):
    def work() -> None:
        if ranks.rank == rank:
            raise error("no such file")

    return work


def test_ranks_agree_and_fail_together():
    main, other = on_ranks(words_and_numbers)
    for result in (main, other):
        assert result["said"] == [False, False, True, False]  # one call late, on both
        assert result["number"] == 40
        assert result["together"] == "both"
        assert result["table"].tolist() == [[0.1], [0.2]]
    assert main["errors"] == [
        "UserError rank 1: no such file",
        "MachineError no such file",
        "MachineError no space",
        "UserError data: rank 1 has text 1, rank 0 has text 0; give every node the same",
    ]
    assert other["errors"] == ["FailedElsewhere 2", "FailedElsewhere 1", "FailedElsewhere 1", "FailedElsewhere 2"]


def test_one_process_needs_no_network():
    assert ALONE.any_late(True)
    assert ALONE.broadcast_int(3) == 3
    assert ALONE.together(lambda: 4) == 4
    ranks = start("auto", "cpu")
    assert (ranks.engine, ranks.world, ranks.is_main) == ("single", 1, True)


@pytest.mark.parametrize(
    ("engine", "world", "message"),
    [
        ("ddp", None, "distributed: ddp needs several processes; start them with `torchrun"),
        ("fsdp2", None, "distributed: fsdp2 needs several processes"),
        ("single", "2", "distributed: single, but torchrun started 2 processes; use auto, ddp or fsdp2"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused(engine, world, message, monkeypatch):
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UserError, match=message):
        start(engine, "cpu")


def test_a_gpu_that_is_named_is_the_current_one(monkeypatch):
    """Triton launches on the current GPU, and so would everything else that names none."""
    chosen: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    assert start("single", "cuda:1").device == torch.device("cuda:1")
    assert start("single", "cuda").device == torch.device("cuda")
    assert start("single", "cpu").device == torch.device("cpu")
    assert chosen == [torch.device("cuda:1")]
