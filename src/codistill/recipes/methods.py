"""The methods: functions from a size to a `Run`. Every method is data for the same training step.

The first line of a recipe's docstring is what `codistill recipes` prints.
"""

from dataclasses import replace

from codistill.config import BatchSize, DistillationConfig, Evaluation, MemberConfig, Run
from codistill.recipes.sizes import Size, teacher_path
from codistill.schedules import Spec

# Knowledge Inheritance guides BASE by MEDIUM for 35k of 125k steps (Qin et al. 2022, §4).
GUIDED_SHARE = 0.28
# Lu and Liu (2026) search 0.2 … 1.0; this is the middle of the range, and no finding of theirs.
_MIXED_SHARE = 0.5


def standalone(size: Size) -> Run:
    """One model, trained alone: the baseline."""
    return _run(size, {"large": _learner(size, "large")})


def kd(size: Size) -> Run:
    """Knowledge distillation: a large pre-trained teacher, a small student."""
    members = {"teacher": _teacher(size, "large"), "small": _learner(size, "small")}
    return _run(size, members, _edge("teacher", "small"))


def dwt(size: Size) -> Run:
    """Distillation from a weak teacher: a small pre-trained teacher, a larger student (soft weight 1)."""
    return _weak_teacher(size, weight=1.0)


def dwt_strong(size: Size) -> Run:
    """Distillation from a weak teacher with soft weight 4: faster early on, lower in the end (DWT, figure 3)."""
    return _weak_teacher(size, weight=4.0)


def dwt_decay(size: Size) -> Run:
    """Distillation from a weak teacher, soft weight falling from 4 to 1: what DWT advises and did not run."""
    return _weak_teacher(size, weight={"linear": [4.0, 1.0]})


def ctcd(size: Size) -> Run:
    """Co-training and co-distillation: a large and a small model from scratch, each teaching the other."""
    return _pair(size, _edge("large", "small"), _edge("small", "large"))


def one_way(size: Size) -> Run:
    """CTCD's ablation: both from scratch, only the large one teaches (online distillation)."""
    return _pair(size, _edge("large", "small"))


def reverse(size: Size) -> Run:
    """CTCD's ablation: both from scratch, only the small one teaches (online reverse distillation)."""
    return _pair(size, _edge("small", "large"))


def inherit(size: Size) -> Run:
    """Knowledge inheritance: (1 − a)·hard + a·soft, a falling from 1 to 0; then the teacher is left behind."""
    until = round(GUIDED_SHARE * size.steps)
    student = replace(_learner(size, "large"), hard_weight={"linear": [0.0, 1.0, until]})
    edge = replace(_edge("weak", "large", weight={"linear": [1.0, 0.0, until]}), temperature=2.0)
    return _run(size, {"weak": _teacher(size, "small"), "large": student}, edge)


def community(size: Size) -> Run:
    """Two pre-trained frozen models, a small and a large one, and two peers that learn from all."""
    members = {
        "teacher": _teacher(size, "large"),
        "weak": _teacher(size, "small"),
        "large": _learner(size, "large"),
        "small": _learner(size, "small"),
    }
    edges = [_edge(t, s) for s in ("large", "small") for t in members if t != s]
    return _run(size, members, *edges)


def mix(size: Size) -> Run:
    """A weak teacher mixed in: (1 − a)·hard + a·soft with a = 0.5 (the weaker the teacher, the smaller a)."""
    run = _weak_teacher(size, weight=_MIXED_SHARE)
    return replace(run, members=run.members | {"large": replace(run.members["large"], hard_weight=1 - _MIXED_SHARE)})


def quickstart(size: Size) -> Run:
    """CTCD beside a stand-alone twin of each model, on the same batches: does teaching one another help?"""
    run = ctcd(size)
    run = _shortened(run) if size.name == "tiny" else run
    twins = {f"{name}-alone": replace(member, twin_of=name) for name, member in run.members.items()}
    return replace(run, members=run.members | twins)


# ---- their parts -------------------------------------------------------------------------------


def _shortened(run: Run) -> Run:
    """`run` cut to what two cores do in about three minutes, twins included, on the two megabytes of built-in text."""
    layers = {"large": 4, "small": 2}
    return replace(
        run,
        members={
            name: replace(member, model=replace(member.model, layers=layers[name]))
            for name, member in run.members.items()
            if member.model is not None
        },
        steps=400,
        batch=BatchSize(sequences=32),
        evaluate=Evaluation(every=50, sequences=512),
    )


def _run(size: Size, members: dict[str, MemberConfig], *edges: DistillationConfig) -> Run:
    return Run(
        objective=size.objective,
        data=size.data,
        members=members,
        distillation=list(edges),
        steps=size.steps,
        batch=size.batch,
        checkpoint=size.checkpoint,
        evaluate=size.evaluate,
        log=size.log,
    )


def _pair(size: Size, *edges: DistillationConfig) -> Run:
    return _run(size, {name: _learner(size, name) for name in ("large", "small")}, *edges)


def _weak_teacher(size: Size, weight: Spec) -> Run:
    members = {"weak": _teacher(size, "small"), "large": _learner(size, "large")}
    return _run(size, members, _edge("weak", "large", weight))


def _learner(size: Size, role: str) -> MemberConfig:
    return replace(size.learner, model=size.models[role])


def _teacher(size: Size, role: str) -> MemberConfig:
    return MemberConfig(path=teacher_path(size, role), frozen=True)


def _edge(teacher: str, student: str, weight: Spec = 1.0) -> DistillationConfig:
    return DistillationConfig(teacher=teacher, student=student, weight=weight)
