"""Co-training and co-distillation (CTCD, EMNLP Findings 2023): the pair against its members alone and its ablations,
and the pair inside other recipes."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from codistill.config import DistillationConfig, ModelConfig
from codistill.evaluate.compare import SEEDS_FOR_A_HEADLINE
from codistill.recipes.sizes import Size
from codistill.schedules import Spec
from codistill.study.arms import Arm
from codistill.study.design import Contrast, Setting, Study, edge, frozen, settings
from codistill.study.scales import Scale, rows_of, vocabulary_of

_BURN_IN = 0.3  # of the steps before the edges begin to weigh


def _pair(at: Setting, name: str, *edges: DistillationConfig, small: ModelConfig | None = None) -> Arm:
    models = at.size.models
    members = {"large": at.learner(models["large"]), "small": at.learner(small or models["small"])}
    return at.arm(name, members, *edges)


def both_ways(weight: Spec = 1.0) -> Sequence[DistillationConfig]:
    """Each teaches the other."""
    return edge("large", "small", weight), edge("small", "large", weight)


def alone(at: Setting) -> list[Arm]:
    """Both models without one another, at equal steps."""
    models = at.size.models
    return [at.arm(f"alone-{role}", {role: at.learner(models[role])}) for role in ("large", "small")]


def _at_equal_flops(at: Setting) -> list[Arm]:
    """Each model alone, for as many steps as the pair's FLOPs pay for."""
    models, found = at.size.models, []
    cost = _step_flops(at.size, ("large", "small"))
    for role in cost:
        steps = round(at.size.steps * sum(cost.values()) / cost[role])
        found.append(at.arm(f"longer-{role}", {role: at.learner(models[role])}, steps=steps))
    return found


@cache
def _flops_of(model: ModelConfig, vocabulary: int, sequences: int, length: int, rows: int) -> int:
    from codistill.costs import shape_flops  # imports torch, which a mistyped name should not wait for

    return shape_flops(model, vocabulary=vocabulary, sequences=sequences, length=length, rows=rows)


def _step_flops(size: Size, roles: Sequence[str]) -> dict[str, int]:
    sizes = (vocabulary_of(size), size.batch.sequences, size.data.length, rows_of(size))
    return {role: _flops_of(size.models[role], *sizes) for role in roles}


def _arms(scale: Scale, seed: int) -> list[Arm]:
    found = []
    for at in settings(scale.masked, seed):
        begin = round(_BURN_IN * at.size.steps)
        models = at.size.models
        found += [
            *alone(at),
            _pair(at, "both", *both_ways()),
            _pair(at, "one-way", edge("large", "small")),
            _pair(at, "reverse", edge("small", "large")),
            _pair(at, "both-4-to-1", *both_ways({"linear": [4.0, 1.0]})),
            _pair(at, "both-burn-in", *both_ways({"step": {0: 0.0, begin: 1.0}})),
            at.teacher("teacher-same-size", models["large"]),
            at.teacher("teacher-weak", models["small"]),
            _offline(at, "offline", models["small"]),
            _community(at),
            *_at_equal_flops(at),
        ]
    return found


def _offline(at: Setting, name: str, small: ModelConfig) -> Arm:
    members = {"teacher": frozen("teacher-same-size"), "small": at.learner(small)}
    return at.arm(name, members, edge("teacher", "small"))


def _community(at: Setting) -> Arm:
    models = at.size.models
    members = {
        "teacher": frozen("teacher-same-size"),
        "weak": frozen("teacher-weak"),
        "large": at.learner(models["large"]),
        "small": at.learner(models["small"]),
    }
    edges = [edge(teacher, student) for student in ("large", "small") for teacher in members if teacher != student]
    return at.arm("community", members, *edges)


CTCD = Study(
    name="ctcd",
    question="Do a large and a small masked LM that teach one another from scratch both become better?",
    arms=_arms,
    contrasts=[
        Contrast("large: both ways − alone", "both/large", "alone-large/large"),
        Contrast("small: both ways − one-way online", "both/small", "one-way/small"),
        Contrast("small: both ways − large alone", "both/small", "alone-large/large"),
        Contrast("small: both ways − alone", "both/small", "alone-small/small"),
        Contrast("large: reverse only − alone", "reverse/large", "alone-large/large"),
        Contrast("small: one-way online − alone", "one-way/small", "alone-small/small"),
        Contrast("small: one-way offline − alone", "offline/small", "alone-small/small"),
        Contrast("large: both ways, 4 → 1 − alone", "both-4-to-1/large", "alone-large/large"),
        Contrast("small: both ways, 4 → 1 − alone", "both-4-to-1/small", "alone-small/small"),
        Contrast("large: both ways, burn-in − alone", "both-burn-in/large", "alone-large/large"),
        Contrast("small: both ways, burn-in − alone", "both-burn-in/small", "alone-small/small"),
        Contrast("large: community − alone", "community/large", "alone-large/large"),
        Contrast("small: community − alone", "community/small", "alone-small/small"),
        Contrast("large: both ways − alone at the pair's FLOPs", "both/large", "longer-large/large"),
        Contrast("small: both ways − alone at the pair's FLOPs", "both/small", "longer-small/small"),
    ],
    curves=["alone-large/large", "alone-small/small", "both/large", "both/small"],
    seeds=SEEDS_FOR_A_HEADLINE,
    along=True,
)


# ---- inside other recipes ------------------------------------------------------------------------


def deep_thin(size: Size) -> ModelConfig:
    """A small model twice as deep, of about as many parameters in its layers: width / √2, in whole heads."""
    small = size.models["small"]
    of_head = 64 if small.width >= 256 else 32
    heads = max(1, round(small.width / 2**0.5 / of_head))
    return replace(small, layers=2 * small.layers, width=heads * of_head, heads=heads)


def _combined(scale: Scale, seed: int) -> list[Arm]:
    found = []
    for at in settings(scale.masked, seed):
        thin = deep_thin(at.size)
        found += [
            *alone(at),
            at.arm("alone-deep-thin", {"small": at.learner(thin)}),
            at.teacher("teacher-same-size", at.size.models["large"]),
            _offline(at, "offline", at.size.models["small"]),
            _pair(at, "both", *both_ways()),
            _offline(at, "offline-deep-thin", thin),
            _pair(at, "both-deep-thin", *both_ways(), small=thin),
        ]
    return found


COMBINED = Study(
    name="ctcd-combined",
    question="Does co-distillation replace one-way distillation inside another recipe, a deep and thin student?",
    arms=_combined,
    contrasts=[
        Contrast("plain: co-distilled − one-way", "both/small", "offline/small"),
        Contrast("plain: co-distilled − alone", "both/small", "alone-small/small"),
        Contrast("deep-thin: co-distilled − one-way", "both-deep-thin/small", "offline-deep-thin/small"),
        Contrast("deep-thin: co-distilled − alone", "both-deep-thin/small", "alone-deep-thin/small"),
        Contrast("alone: deep-thin − plain", "alone-deep-thin/small", "alone-small/small"),
    ],
    curves=["alone-small/small", "offline/small", "both/small", "offline-deep-thin/small", "both-deep-thin/small"],
    seeds=SEEDS_FOR_A_HEADLINE,
)

PAIRS = (CTCD, COMBINED)
