"""When it pays: the gain of distilling from a weak teacher and from a peer over passes and soft weight."""

from codistill.evaluate.compare import SEEDS_FOR_A_HEADLINE
from codistill.study.arms import Arm
from codistill.study.design import Contrast, Setting, Study, settings
from codistill.study.grids.ctcd import alone, both_ways
from codistill.study.grids.dwt import taught, teacher
from codistill.study.scales import Scale

PASSES = (1, 5, 20)
_WEIGHTS = (0.25, 1.0)


def _named(method: str, weight: float) -> str:
    return method if weight == 1 else f"{method}-{weight:g}".replace(".", "_")


def _arms(scale: Scale, seed: int) -> list[Arm]:
    return [arm for at in settings(scale.masked, seed, PASSES) for arm in _at(at)]


def _at(at: Setting) -> list[Arm]:
    models = at.size.models
    found = [*alone(at), teacher(at, "weak")]
    for weight in _WEIGHTS:
        found.append(taught(at, _named("dwt-weak", weight), "teacher-weak", weight))
        pair = {"large": at.learner(models["large"]), "small": at.learner(models["small"])}
        found.append(at.arm(_named("both", weight), pair, *both_ways(weight)))
    return found


WHEN_IT_PAYS = Study(
    name="when-it-pays",
    question="At how many passes over the text, and with which soft weight, does distilling while pre-training pay?",
    arms=_arms,
    contrasts=[
        Contrast(f"{role}: {label}, weight {weight:g} − alone", f"{_named(arm, weight)}/{role}", f"alone-{role}/{role}")
        for label, arm, roles in (("DWT", "dwt-weak", ("large",)), ("CTCD", "both", ("large", "small")))
        for role in roles
        for weight in _WEIGHTS
    ],
    seeds=SEEDS_FOR_A_HEADLINE,
    over_passes=True,
    along=True,
    curves=["alone-large/large", "dwt-weak/large", "both/large", "alone-small/small", "both/small"],
)
