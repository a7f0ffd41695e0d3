"""Weak teachers and peers for causal language models."""

from dataclasses import replace

from codistill.evaluate.compare import SEEDS_FOR_A_HEADLINE
from codistill.recipes.methods import GUIDED_SHARE
from codistill.study.arms import Arm
from codistill.study.design import Contrast, Setting, Study, edge, frozen, settings
from codistill.study.scales import Scale

# Knowledge Inheritance guides BASE by MEDIUM for 35k of 125k steps (Qin et al. 2022, §4), at temperature 2 here.
_TEACHERS = {"weak": "small", "weaker": "extremely_weak"}
_SHARES = (0.2, 0.5, 0.8)
# What keeps models alone from overfitting in 20 passes at `tiny`, found with one model and seed (docs/log.md).
_DROPOUT, _WEIGHT_DECAY = 0.2, 1.0
_PASSES = 20


def _arms(scale: Scale, seed: int) -> list[Arm]:
    found = []
    for at in settings(scale.causal, seed, [1, _PASSES]):
        found += _pair(at)
        for teacher, role in _TEACHERS.items():
            found += [
                at.teacher(teacher, at.size.models[role]),
                _one_to_one(at, teacher),
                _inheriting(at, teacher),
                *(_mixed(at, teacher, share) for share in _SHARES),
            ]
    (at,) = settings(scale.causal, seed, [_PASSES])
    return found + _regularised(at)


def _pair(at: Setting) -> list[Arm]:
    """Both models without one another, and together."""
    large, small = (at.learner(at.size.models[role]) for role in ("large", "small"))
    return [
        at.arm("alone-large", {"large": large}),
        at.arm("alone-small", {"small": small}),
        at.arm("ctcd", {"large": large, "small": small}, edge("large", "small"), edge("small", "large")),
    ]


def _one_to_one(at: Setting, teacher: str) -> Arm:
    large = at.learner(at.size.models["large"])
    return at.arm(f"dwt-{teacher}", {"teacher": frozen(teacher), "large": large}, edge("teacher", "large"))


def _inheriting(at: Setting, teacher: str) -> Arm:
    """The teacher first, the labels after it."""
    until = round(GUIDED_SHARE * at.size.steps)
    large = at.learner(at.size.models["large"], hard_weight={"linear": [0.0, 1.0, until]})
    inherited = edge("teacher", "large", {"linear": [1.0, 0.0, until]}, temperature=2.0)
    return at.arm(f"inherit-{teacher}", {"teacher": frozen(teacher), "large": large}, inherited)


def _mixed(at: Setting, teacher: str, share: float) -> Arm:
    large = at.learner(at.size.models["large"], hard_weight=round(1 - share, 2))
    members = {"teacher": frozen(teacher), "large": large}
    return at.arm(f"mix-{round(100 * share)}-{teacher}", members, edge("teacher", "large", share))


def _regularised(at: Setting) -> list[Arm]:
    """The main arms with dropout and weight decay for all, teacher included, so that none overfits: does teaching
    still help?"""
    models = {role: replace(model, dropout=_DROPOUT) for role, model in at.size.models.items()}
    size = replace(at.size, models=models, learner=replace(at.size.learner, weight_decay=_WEIGHT_DECAY))
    at = replace(at, size=size, regime=f"{at.regime}, regularised")
    return [*_pair(at), at.teacher("weak", models["small"]), _one_to_one(at, "weak"), _mixed(at, "weak", _SHARES[-1])]


_METHODS = ("dwt", "inherit", *(f"mix-{round(100 * share)}" for share in _SHARES))

CAUSAL = Study(
    name="causal",
    question="Do weak teachers and peers make causal language models better?",
    arms=_arms,
    contrasts=[
        *(
            Contrast(f"large: {method}, {teacher} teacher − alone", f"{method}-{teacher}/large", "alone-large/large")
            for teacher in _TEACHERS
            for method in _METHODS
        ),
        Contrast("large: ctcd − alone", "ctcd/large", "alone-large/large"),
        Contrast("small: ctcd − alone", "ctcd/small", "alone-small/small"),
        Contrast("small: ctcd − large alone", "ctcd/small", "alone-large/large"),
    ],
    curves=["alone-large/large", "dwt-weak/large", "inherit-weak/large", "ctcd/large", "ctcd/small"],
    seeds=SEEDS_FOR_A_HEADLINE,
    along=True,
)
