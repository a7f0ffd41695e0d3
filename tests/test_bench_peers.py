"""Other libraries beside ours: the same gradients where they train the same thing, and a reason where they cannot."""

import importlib.util
import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from codistill.bench import step as bench
from codistill.bench.step_providers import plain
from codistill.build import build
from codistill.config import Run
from codistill.errors import UserError
from runs import small_run

CPU = torch.device("cpu")
MODULES = {"textbrewer": "textbrewer", "modelopt": "modelopt", "pytorch-dml": "pydml"}
ONE_STUDENT, MUTUAL = "trains one student of one frozen teacher", "trains models that all teach one another"
SHARED = "one temperature and two weights, which all its models share"
# Recipes that they can train, with weights and temperatures that show what each does with them.
WEAK = ["members.weak.path=null", "members.weak.model={family: modernbert, layers: 1, width: 16}"]
WEAK_CAUSAL = [setting.replace("modernbert", "llama") for setting in WEAK]
SOFT = ["distillation.0.weight=3", "distillation.0.temperature=2"]
BOTH_SOFT = [*SOFT, *(setting.replace(".0.", ".1.") for setting in SOFT)]
EDGES = [{"teacher": t, "student": s} for t, s in itertools.permutations(("large", "small", "third"), 2)]
THIRD = ["members.third={model: {family: modernbert, width: 16}}"]
THREE = [*THIRD, f"distillation={json.dumps(EDGES)}"]
TO_THIRD = "distillation=[{teacher: weak, student: third}, {teacher: large, student: third}]"
ALIKE = [
    *((peer, "dwt:tiny", [*WEAK, *SOFT]) for peer in ("textbrewer", "modelopt")),
    *((peer, "inherit:tiny", [*WEAK, "members.large.hard_weight=0.25"]) for peer in ("textbrewer", "modelopt")),
    *((peer, "dwt-clm:tiny", WEAK_CAUSAL) for peer in ("textbrewer", "modelopt")),
    ("pytorch-dml", "ctcd:tiny", BOTH_SOFT),
    ("pytorch-dml", "ctcd:tiny", THREE),
    ("pytorch-dml", "ctcd-clm:tiny", ["members.large.hard_weight=0.5", "members.small.hard_weight=0.5"]),
]
UNLIKE = [
    *((peer, "ctcd:tiny", [], ONE_STUDENT) for peer in ("textbrewer", "modelopt")),
    *((peer, "one-way:tiny", [], ONE_STUDENT) for peer in ("textbrewer", "modelopt")),
    *((peer, "standalone:tiny", [], ONE_STUDENT) for peer in ("textbrewer", "modelopt")),
    ("textbrewer", "dwt:tiny", [*WEAK, *THIRD], ONE_STUDENT),
    ("modelopt", "dwt:tiny", [*WEAK, "members.large.frozen=true", *THIRD, TO_THIRD], ONE_STUDENT),
    ("textbrewer", "dwt:tiny", [*WEAK, "distillation.0.divergence=reverse_kl"], "the forward KL of logits only"),
    ("pytorch-dml", "dwt:tiny", WEAK, MUTUAL),
    ("pytorch-dml", "one-way:tiny", [], MUTUAL),
    ("pytorch-dml", "standalone:tiny", [], MUTUAL),
    ("pytorch-dml", "ctcd:tiny", ["distillation.1.weight=2"], SHARED),
    ("pytorch-dml", "ctcd:tiny", ["members.small.hard_weight=0.5"], SHARED),
]


def run_of(recipe: str, text, *more: str) -> Run:
    return small_run(recipe, text, "batch={sequences: 4, accumulate: 2}", "precision=float32", *more)


@pytest.mark.filterwarnings("ignore")  # theirs: old syntax, versions that they were not tested with
@pytest.mark.parametrize(("peer", "recipe", "more"), ALIKE)
def test_a_peer_trains_the_same_models(peer, recipe, more, text):
    if importlib.util.find_spec(MODULES[peer]) is None:
        pytest.skip(f"{bench.PROVIDERS[peer].package} is not installed")
    run = run_of(recipe, text, *more)
    (row,) = bench.bench_step(run, runs=1, providers=[peer])["results"]
    assert "reason" not in row
    assert row["cosine"] == pytest.approx(1, abs=1e-6)
    assert row["norm_ratio"] == pytest.approx(1, abs=1e-5)
    theirs, by_hand = moved(bench.PROVIDERS[peer].make, run), moved(plain(), run)
    assert torch.cosine_similarity(theirs, by_hand, dim=0) > 0.99  # AdamW makes much of the smallest gradients
    assert theirs.norm() == pytest.approx(float(by_hand.norm()), rel=1e-3)


def moved(make, run: Run) -> Tensor:
    """How far two steps moved the trained members."""
    without_dropout = replace(run, members={n: bench._without_dropout(m) for n, m in run.members.items()})
    loop = make(without_dropout, CPU)
    parameters = [p for name in run.trained for p in loop.models[name].parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    batches = build(run, CPU).batches
    for step in (1, 2):
        loop.step(step, batches.at(step))
    return torch.cat([(p.detach() - b).flatten() for p, b in zip(parameters, before, strict=True)])


@pytest.mark.parametrize(("peer", "recipe", "more", "reason"), UNLIKE)
def test_a_peer_is_not_asked_for_what_it_cannot_train(peer, recipe, more, reason, text):
    with pytest.raises(UserError, match=reason):
        bench.PROVIDERS[peer].make(run_of(recipe, text, *more), CPU)


def test_rows_may_all_be_empty(text):
    (row,) = bench.bench_step(run_of("ctcd:tiny", text), runs=1, providers=["textbrewer"])["results"]
    assert ONE_STUDENT in row["reason"]
    assert "seconds" not in row
