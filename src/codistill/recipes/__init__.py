"""Recipes: functions from a size to a `Run`. Every method is data for the same training step.

The first line of a recipe's docstring is what `codistill recipes` prints.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from codistill.config import BatchSize, DistillationConfig, Evaluation, MemberConfig, ModelConfig, Run
from codistill.errors import UserError
from codistill.recipes.sizes import SIZES, Size
from codistill.schedules import Spec

# Knowledge Inheritance guides BASE by MEDIUM for 35k of 125k steps (Qin et al. 2022, §4).
_GUIDED_SHARE = 0.28


def find(name: str) -> Run:
    """The `Run` of `RECIPE` or `RECIPE:SIZE` (tiny where no size is given); raises UserError with the nearest name."""
    recipe, _, size = name.partition(":")
    if recipe not in RECIPES:
        close = difflib.get_close_matches(recipe, RECIPES, n=1, cutoff=0.4)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"there is no recipe or file {name!r}{hint}; `codistill recipes` lists the recipes")
    if size and size not in SIZES:
        raise UserError(f"recipe {recipe!r} has no size {size!r}; there are {', '.join(SIZES)}")
    return replace(RECIPES[recipe](size or "tiny"), recipe=f"{recipe}:{size or 'tiny'}")


def check_teachers(run: Run) -> None:
    """Raises UserError, with the command that makes one, where a recipe's own pre-trained teacher is not there yet."""
    for name, member in run.members.items():
        for size in SIZES:
            command = _made_by(size).get(member.path or "")
            if command and not Path(member.path or "").exists():
                raise UserError(
                    f"members.{name}.path: the recipe needs a pre-trained teacher at {member.path}; make it with "
                    f"`{command}`, or name another with --set members.{name}.path=FOLDER"
                )


# ---- recipes -----------------------------------------------------------------------------------


def standalone(size: str) -> Run:
    """One model, trained alone: the baseline."""
    return _run(size, {"large": _learner(size, "large")})


def kd(size: str) -> Run:
    """Knowledge distillation: a large pre-trained teacher, a small student."""
    members = {"teacher": _teacher(size, "large"), "small": _learner(size, "small")}
    return _run(size, members, _edge("teacher", "small"))


def dwt(size: str) -> Run:
    """Distillation from a weak teacher: a small pre-trained teacher, a larger student (soft weight 1)."""
    return _weak_teacher(size, weight=1.0)


def dwt_strong(size: str) -> Run:
    """Distillation from a weak teacher with soft weight 4: faster early on, lower in the end (DWT, figure 3)."""
    return _weak_teacher(size, weight=4.0)


def dwt_decay(size: str) -> Run:
    """Distillation from a weak teacher, soft weight falling from 4 to 1: what DWT advises and did not run."""
    return _weak_teacher(size, weight={"linear": [4.0, 1.0]})


def ctcd(size: str) -> Run:
    """Co-training and co-distillation: a large and a small model from scratch, each teaching the other."""
    return _pair(size, _edge("large", "small"), _edge("small", "large"))


def one_way(size: str) -> Run:
    """CTCD's ablation: both from scratch, only the large one teaches (online distillation)."""
    return _pair(size, _edge("large", "small"))


def reverse(size: str) -> Run:
    """CTCD's ablation: both from scratch, only the small one teaches (online reverse distillation)."""
    return _pair(size, _edge("small", "large"))


def inherit(size: str) -> Run:
    """Knowledge inheritance: (1 − a)·hard + a·soft, a falling from 1 to 0; then the teacher is left behind."""
    until = round(_GUIDED_SHARE * SIZES[size].steps)
    student = replace(_learner(size, "large"), hard_weight={"linear": [0.0, 1.0, until]})
    edge = replace(_edge("weak", "large", weight={"linear": [1.0, 0.0, until]}), temperature=2.0)
    return _run(size, {"weak": _teacher(size, "small"), "large": student}, edge)


def community(size: str) -> Run:
    """Two pre-trained frozen models, a small and a large one, and two peers that learn from all."""
    members = {
        "teacher": _teacher(size, "large"),
        "weak": _teacher(size, "small"),
        "large": _learner(size, "large"),
        "small": _learner(size, "small"),
    }
    edges = [_edge(t, s) for s in ("large", "small") for t in members if t != s]
    return _run(size, members, *edges)


def quickstart(size: str) -> Run:
    """CTCD beside a stand-alone twin of each model, on the same batches: does teaching one another help?"""
    run = ctcd(size)
    run = _shortened(run) if size == "tiny" else run
    twins = {f"{name}-alone": replace(member, twin_of=name) for name, member in run.members.items()}
    return replace(run, members=run.members | twins)


RECIPES: Mapping[str, Callable[[str], Run]] = {
    "quickstart": quickstart,
    "standalone": standalone,
    "kd": kd,
    "dwt": dwt,
    "dwt-strong": dwt_strong,
    "dwt-decay": dwt_decay,
    "ctcd": ctcd,
    "one-way": one_way,
    "reverse": reverse,
    "inherit": inherit,
    "community": community,
}


def _shortened(run: Run) -> Run:
    """`run` cut to what two cores do in about three minutes, twins included, on the two megabytes of built-in text."""
    layers = {"large": 4, "small": 2}
    return replace(
        run,
        members={name: replace(member, model=_model("tiny", layers[name])) for name, member in run.members.items()},
        steps=400,
        batch=BatchSize(sequences=32),
        evaluate=Evaluation(every=50, sequences=512),
    )


# ---- their parts -------------------------------------------------------------------------------


def _run(size: str, members: dict[str, MemberConfig], *edges: DistillationConfig) -> Run:
    s = SIZES[size]
    return Run(
        objective=s.objective,
        data=s.data,
        members=members,
        distillation=list(edges),
        steps=s.steps,
        batch=s.batch,
        checkpoint=s.checkpoint,
        evaluate=s.evaluate,
        log=s.log,
    )


def _pair(size: str, *edges: DistillationConfig) -> Run:
    return _run(size, {name: _learner(size, name) for name in ("large", "small")}, *edges)


def _weak_teacher(size: str, weight: Spec) -> Run:
    members = {"weak": _teacher(size, "small"), "large": _learner(size, "large")}
    return _run(size, members, _edge("weak", "large", weight))


def _learner(size: str, role: str) -> MemberConfig:
    s = SIZES[size]
    return MemberConfig(model=_model(size, s.layers[role]), lr=s.lr)


def _model(size: str, layers: int) -> ModelConfig:
    s: Size = SIZES[size]
    return ModelConfig(family=s.family, layers=layers, width=s.width, dropout=s.dropout)


def _teacher(size: str, role: str) -> MemberConfig:
    return MemberConfig(path=_teacher_path(size, role), frozen=True)


def _edge(teacher: str, student: str, weight: Spec = 1.0) -> DistillationConfig:
    return DistillationConfig(teacher=teacher, student=student, weight=weight)


def _teacher_path(size: str, role: str) -> str:
    return f"runs/standalone-{size}-{SIZES[size].layers[role]}-layers/members/large"


def _made_by(size: str) -> dict[str, str]:
    """The command that makes the model at each teacher path."""
    return {
        _teacher_path(size, role): f"codistill train standalone:{size} --set members.large.model.layers={layers} "
        f"--out runs/standalone-{size}-{layers}-layers"
        for role, layers in SIZES[size].layers.items()
    }


__all__ = ["RECIPES", "check_teachers", "find"]
