"""Distillation from a weak teacher (DWT, ACL Findings 2023): the teacher's quality, the soft weight, the temperature,
and where the student starts. The arms of one name are the same runs in all of them, so that they are trained once.
"""

from dataclasses import replace

from codistill.config import InitConfig, MemberConfig, ModelConfig
from codistill.evaluate.compare import SEEDS_FOR_A_HEADLINE
from codistill.schedules import Spec
from codistill.study.arms import Arm, of_arm
from codistill.study.design import Contrast, Setting, Study, edge, frozen, settings, times
from codistill.study.scales import Scale

_TEACHERS = {"weak": "small", "very-weak": "very_weak", "extremely-weak": "extremely_weak"}
_UNDER_TRAINED = 0.25  # of the student's steps
ALONE = "alone-large/large"


def alone(at: Setting) -> Arm:
    """The student without a teacher."""
    return at.arm("alone-large", {"large": at.learner(at.size.models["large"])})


def teacher(at: Setting, name: str) -> Arm:
    """The arm that trains one of the weak teachers."""
    return at.teacher(f"teacher-{name}", at.size.models[_TEACHERS[name]])


def taught(at: Setting, name: str, by: str, weight: Spec = 1.0, temperature: float = 1.0, hard: Spec = 1.0) -> Arm:
    """The student of the teacher that the arm `by` trained."""
    large = at.learner(at.size.models["large"], hard_weight=hard)
    return _taught(at, name, by, large, weight, temperature)


def _taught(at: Setting, name: str, by: str, large: MemberConfig, weight: Spec = 1.0, temperature: float = 1.0) -> Arm:
    return at.arm(name, {"teacher": frozen(by), "large": large}, edge("teacher", "large", weight, temperature))


# ---- the teacher's quality -----------------------------------------------------------------------


def _quality(scale: Scale, seed: int) -> list[Arm]:
    found = []
    for at in settings(scale.masked, seed):
        under = at.teacher("teacher-under-trained", at.size.models["large"], round(_UNDER_TRAINED * at.size.steps))
        same = at.teacher("teacher-same-size", at.size.models["large"])
        found += [alone(at), *(teacher(at, name) for name in _TEACHERS), under, same]
        found += [taught(at, f"dwt-{name}", f"teacher-{name}") for name in (*_TEACHERS, "under-trained", "same-size")]
        found += [_smoothed(at, "smoothing", 1.0), _smoothed(at, "smoothing-tenth", 0.1)]
    return found


def _smoothed(at: Setting, name: str, weight: float) -> Arm:
    """Label smoothing: a teacher that knows nothing. A tiny untrained model, whose softmax is uniform but for a KL of
    less than a hundredth of a nat."""
    family = at.size.models["large"].family
    nobody = MemberConfig(model=ModelConfig(family=family, layers=1, width=8, heads=1), frozen=True)
    large = at.learner(at.size.models["large"])
    return at.arm(name, {"nobody": nobody, "large": large}, edge("nobody", "large", weight))


TEACHER_QUALITY = Study(
    name="dwt-teacher-quality",
    question="From which teachers does a larger masked LM learn more than from the text alone?",
    arms=_quality,
    contrasts=[
        *(Contrast(f"{name} teacher − alone", f"dwt-{name}/large", ALONE) for name in _TEACHERS),
        Contrast("under-trained teacher − alone", "dwt-under-trained/large", ALONE),
        Contrast("same-size teacher − alone", "dwt-same-size/large", ALONE),
        Contrast("label smoothing, weight 1 − alone", "smoothing/large", ALONE),
        Contrast("label smoothing, weight 0.1 − alone", "smoothing-tenth/large", ALONE),
    ],
    curves=[ALONE, "dwt-weak/large", "dwt-very-weak/large", "dwt-extremely-weak/large", "smoothing/large"],
    seeds=SEEDS_FOR_A_HEADLINE,
)


# ---- the soft weight -----------------------------------------------------------------------------

_SHARES = (0.2, 0.5, 0.8)


def _weights(scale: Scale, seed: int) -> list[Arm]:
    found = []
    for at in settings(scale.masked, seed):
        found += [alone(at), teacher(at, "weak"), taught(at, "dwt-weak", "teacher-weak")]
        found.append(taught(at, "dwt-4", "teacher-weak", 4.0))
        found.append(taught(at, "dwt-4-to-1", "teacher-weak", {"linear": [4.0, 1.0]}))
        found.append(taught(at, "dwt-1-to-0", "teacher-weak", {"linear": [1.0, 0.0]}))
        for share in _SHARES:
            name = f"mix-{round(100 * share)}"
            found.append(taught(at, name, "teacher-weak", share, hard=round(1 - share, 2)))
    return found


_WEIGHTED = {
    "weight 1": "dwt-weak",
    "weight 4": "dwt-4",
    "weight 4 → 1": "dwt-4-to-1",
    "weight 1 → 0": "dwt-1-to-0",
    **{f"mix {share:g}": f"mix-{round(100 * share)}" for share in _SHARES},
}

SOFT_WEIGHT = Study(
    name="dwt-soft-weight",
    question="How should a weak teacher's soft loss be weighted over time?",
    arms=_weights,
    contrasts=[
        *(Contrast(f"{label} − alone", f"{arm}/large", ALONE) for label, arm in _WEIGHTED.items()),
        Contrast("weight 4 − weight 1", "dwt-4/large", "dwt-weak/large"),
        Contrast("weight 4 → 1 − weight 1", "dwt-4-to-1/large", "dwt-weak/large"),
        Contrast("weight 1 → 0 − weight 1", "dwt-1-to-0/large", "dwt-weak/large"),
    ],
    curves=[ALONE, "dwt-weak/large", "dwt-4/large", "dwt-4-to-1/large", "dwt-1-to-0/large"],
    seeds=SEEDS_FOR_A_HEADLINE,
    along=True,
)


# ---- the temperature -----------------------------------------------------------------------------

_TEMPERATURES = (1.0, 2.0, 4.0, 8.0)


def _heat(name: str, temperature: float) -> str:
    return f"dwt-{name}" if temperature == 1 else f"dwt-{name}-at-{temperature:g}"


def _temperatures(scale: Scale, seed: int) -> list[Arm]:
    found = []
    for at in settings(scale.masked, seed):
        found.append(alone(at))
        for name in ("very-weak", "extremely-weak"):
            found.append(teacher(at, name))
            found += [taught(at, _heat(name, t), f"teacher-{name}", temperature=t) for t in _TEMPERATURES]
    return found


TEMPERATURE = Study(
    name="dwt-temperature",
    question="Does a higher temperature make a very weak teacher useful?",
    arms=_temperatures,
    contrasts=[
        Contrast(f"{name} teacher, τ = {t:g} − alone", f"{_heat(name, t)}/large", ALONE)
        for name in ("very-weak", "extremely-weak")
        for t in _TEMPERATURES
    ],
    curves=[ALONE, *(f"{_heat('extremely-weak', t)}/large" for t in _TEMPERATURES)],
    seeds=SEEDS_FOR_A_HEADLINE,
)


# ---- where the student starts --------------------------------------------------------------------

# Of the recipe's learning rate: what starts trained may want a lower one. At half of it a random student does not leave
# the unigram plateau in 20 passes (1.44 nats below it for one seed).
_LOWER = 0.7
_STARTS = {
    "random": None,
    "repeat-last": InitConfig(from_=of_arm("teacher-weak", "teacher"), depth="repeat-last"),
    "stack": InitConfig(from_=of_arm("teacher-weak", "teacher"), depth="stack"),
    "interpolate": InitConfig(from_=of_arm("teacher-weak", "teacher"), depth="interpolate"),
    "replicate": InitConfig(from_=of_arm("teacher-narrow", "teacher"), width="replicate"),
}


def _starts(scale: Scale, seed: int) -> list[Arm]:
    found = []
    for at in settings(scale.masked, seed):
        narrow = replace(at.size.models["large"], width=at.size.models["large"].width // 2)
        found += [alone(at), teacher(at, "weak"), at.teacher("teacher-narrow", narrow)]
        for start, init in _STARTS.items():
            for rate in (1.0, _LOWER):
                large = at.learner(at.size.models["large"], init=init, lr=times(at.size.learner.lr, rate))
                if (start, rate) != ("random", 1.0):
                    found.append(at.arm(_start(start, rate, False), {"large": large}))
                found.append(_taught(at, _start(start, rate, True), "teacher-weak", large))
    return found


def _start(start: str, rate: float, is_taught: bool) -> str:
    if (start, rate) == ("random", 1.0):
        return "dwt-weak" if is_taught else "alone-large"
    return ("dwt-" if is_taught else "") + start + ("" if rate == 1 else "-low")


def _how(rate: float, is_taught: bool) -> str:
    return f"{'taught' if is_taught else 'alone'}, {_rate(rate)}"


def _rate(rate: float) -> str:
    return "whole rate" if rate == 1 else f"rate × {rate:g}"


REMAPPING = Study(
    name="dwt-remapping",
    question="Does starting a student from its weak teacher help, with and without distillation?",
    arms=_starts,
    contrasts=[
        *(
            Contrast(
                f"{start} − random, {_how(rate, is_taught)}",
                f"{_start(start, rate, is_taught)}/large",
                f"{_start('random', rate, is_taught)}/large",
            )
            for rate in (1.0, _LOWER)
            for is_taught in (False, True)
            for start in _STARTS
            if start != "random"
        ),
        *(
            Contrast(
                f"{start}: taught − not, {_rate(rate)}",
                f"{_start(start, rate, True)}/large",
                f"{_start(start, rate, False)}/large",
            )
            for rate in (1.0, _LOWER)
            for start in _STARTS
        ),
        Contrast(f"random: rate × {_LOWER:g} − whole", "random-low/large", ALONE),
    ],
    curves=[ALONE, "dwt-weak/large", "repeat-last/large", "dwt-repeat-last/large", "stack/large", "replicate/large"],
    seeds=SEEDS_FOR_A_HEADLINE,
)

DWT = (TEACHER_QUALITY, SOFT_WEIGHT, TEMPERATURE, REMAPPING)
