"""What a weak teacher and a peer gain as the models grow."""

from dataclasses import replace

from codistill.evaluate.compare import SEEDS_FOR_A_HEADLINE
from codistill.recipes.sizes import Size
from codistill.study.arms import Arm
from codistill.study.design import Contrast, Setting, Study, edge, frozen, settings, times
from codistill.study.grids.ctcd import both_ways
from codistill.study.scales import Scale

_FACTORS = (1, 2)  # of the scale's width
_WIDEST = _FACTORS[-1]


def _wider(size: Size, factor: int) -> Size:
    """`size` with models `factor` times as wide, their heads as wide as before, and a learning rate that falls as
    1 / width, as the hidden weights' does in μP (Yang et al. 2022, Tensor Programs V, table 3)."""
    models = {
        role: replace(model, width=factor * model.width, heads=factor * model.num_heads)
        for role, model in size.models.items()
    }
    return replace(size, models=models, learner=replace(size.learner, lr=times(size.learner.lr, 1 / factor)))


def _arms(scale: Scale, seed: int) -> list[Arm]:
    sizes = {factor: scale.masked if factor == 1 else _wider(scale.masked, factor) for factor in _FACTORS}
    return [arm for factor, size in sizes.items() for at in settings(size, seed) for arm in _at(at, factor)]


def _at(at: Setting, factor: int) -> list[Arm]:
    pair = {role: at.learner(at.size.models[role]) for role in ("large", "small")}
    weak = f"teacher-x{factor}"
    return [
        *(at.arm(f"alone-{role}-x{factor}", {role: member}) for role, member in pair.items()),
        at.arm(f"both-x{factor}", pair, *both_ways()),
        at.teacher(weak, at.size.models["small"]),
        at.arm(f"dwt-x{factor}", {"teacher": frozen(weak), "large": pair["large"]}, edge("teacher", "large")),
    ]


_QUESTIONS = {  # treated, control
    "large: weak teacher − alone": ("dwt-x{}/large", "alone-large-x{}/large"),
    "large: both ways − alone": ("both-x{}/large", "alone-large-x{}/large"),
    "small: both ways − alone": ("both-x{}/small", "alone-small-x{}/small"),
    "small: both ways − large alone": ("both-x{}/small", "alone-large-x{}/large"),
}


def _contrast(label: str, factor: int) -> Contrast:
    treated, control = _QUESTIONS[label]
    return Contrast(f"{label}, width × {factor}", treated.format(factor), control.format(factor))


def _growth(label: str) -> Contrast:
    """The interaction: by how much the difference of the widest models exceeds that of the narrowest."""
    widest = _contrast(label, _WIDEST)
    return replace(widest, label=f"{label}, × {_WIDEST} less × 1", than=_contrast(label, 1))


SIZE = Study(
    name="size",
    question="Does what a weak teacher and a peer gain or cost change as the models grow?",
    arms=_arms,
    contrasts=[
        contrast
        for label in _QUESTIONS
        for contrast in (*(_contrast(label, factor) for factor in _FACTORS), _growth(label))
    ],
    curves=[f"{arm}-x{factor}/large" for factor in (1, _WIDEST) for arm in ("alone-large", "dwt", "both")],
    seeds=SEEDS_FOR_A_HEADLINE,
)
