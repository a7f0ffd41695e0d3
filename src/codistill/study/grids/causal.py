"""Weak teachers and peers for causal language models."""

from dataclasses import replace

from codistill.study.arms import Arm
from codistill.study.design import SEEDS_FOR_A_HEADLINE, Contrast, Setting, Study, edge, frozen, settings
from codistill.study.scales import Scale

# Knowledge Inheritance guides BASE by MEDIUM for 35k of 125k steps (Qin et al. 2022, §4), at temperature 2 here.
_GUIDED_SHARE = 0.28
_TEACHERS = {"weak": "small", "weaker": "extremely_weak"}
_SHARES = (0.2, 0.5, 0.8)


def _arms(scale: Scale, seed: int) -> list[Arm]:
    models = scale.causal.models
    found = []
    for at in settings(scale.causal, seed):
        large, small = (at.learner(models[role]) for role in ("large", "small"))
        both = [edge("large", "small"), edge("small", "large")]
        found.append(at.arm("alone-large", {"large": large}))
        found.append(at.arm("alone-small", {"small": small}))
        found.append(at.arm("ctcd", {"large": large, "small": small}, *both))
        for teacher, role in _TEACHERS.items():
            found.append(at.teacher(teacher, models[role]))
            found += _taught(at, teacher)
    return found


def _taught(at: Setting, teacher: str) -> list[Arm]:
    large, until = at.learner(at.size.models["large"]), round(_GUIDED_SHARE * at.size.steps)
    inheriting = replace(large, hard_weight={"linear": [0.0, 1.0, until]})
    falling = {"linear": [1.0, 0.0, until]}
    inherited = edge("teacher", "large", falling, temperature=2.0)
    arms = [
        at.arm(f"dwt-{teacher}", {"teacher": frozen(teacher), "large": large}, edge("teacher", "large")),
        at.arm(f"inherit-{teacher}", {"teacher": frozen(teacher), "large": inheriting}, inherited),
    ]
    for share in _SHARES:
        mixed = replace(large, hard_weight=round(1 - share, 2))
        members = {"teacher": frozen(teacher), "large": mixed}
        arms.append(at.arm(f"mix-{round(100 * share)}-{teacher}", members, edge("teacher", "large", share)))
    return arms


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
