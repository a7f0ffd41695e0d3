"""Schedules: values that are pure functions of the step. Durations are in steps, counted from 0.

A schedule is written as a number or as a mapping with one entry, its kind:

    0.5                             constant
    {linear: [4, 1]}                from 4 at step 0 to 1 at the run's end
    {linear: [1, 0, 2000]}          from 1 to 0 at step 2000, then flat
    {cosine: [1, 0, 2000]}          the same along half a cosine
    {step: {0: 0, 300: 1}}          0 until step 300, then 1
    {warmup_linear: [5e-4, 0.05]}   linearly up to 5e-4 over the first 5 % of the run, then linearly down to 0
    {warmup_cosine: [5e-4, 0.05]}   the same, down along half a cosine

Needs nothing but the standard library: configurations are checked without importing torch.
"""

import math
import sys
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from codistill.errors import UserError

_LARGEST = sys.float_info.max

Schedule = Callable[[int], float]
Spec = float | dict[str, Any]


def constant(value: float) -> Schedule:
    """The schedule that is `value` at every step."""
    return lambda step: value


def value_at(value: float | Schedule, step: int) -> float:
    """A number as it is, or a schedule's value at `step`."""
    return value(step) if callable(value) else value


def problem(value: Any) -> str | None:
    """What keeps `value` from being a finite number ≥ 0 or a function of the step, in words, or None. A 0-d tensor may
    be on a device, which is not asked."""
    if isinstance(value, Real):
        number = value if isinstance(value, int) else float(value)  # no float has room for the largest of whole numbers
        return None if 0 <= number <= _LARGEST else f"{value!r}; wanted a finite number of at least 0"
    if callable(value) or getattr(value, "ndim", None) == 0:
        return None
    made = "codistill.schedules.build(specification, steps) makes one of what stands in YAML"
    return f"{value!r}; wanted a number or a function of the step ({made})"


def build(spec: Spec, steps: int) -> Schedule:
    """step -> value for a run of `steps` steps. `spec` has passed `check`."""
    if not isinstance(spec, Mapping):
        return constant(spec)
    [(kind, values)] = spec.items()
    if kind == "step":
        marks = sorted(values.items())
        return lambda step: [value for start, value in marks if start <= step][-1]
    if kind in ("linear", "cosine"):
        start, end, *until = values
        return _between(start, end, until[0] if until else steps, kind)
    return _warmup(values[0], round(values[1] * steps), steps, kind.removeprefix("warmup_"))


def check(spec: Any, field: str) -> Spec:
    """`spec` as a valid schedule of finite values ≥ 0; raises UserError naming `field` where it is none."""
    if _is_value(spec):
        return spec
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise _refused(field, spec)
    [(kind, values)] = spec.items()
    if kind not in _IS_WELL_FORMED or not _IS_WELL_FORMED[kind](values):
        raise _refused(field, spec)
    return {kind: values}


def _between(start: float, end: float, until: int, shape: str) -> Schedule:
    def value(step: int) -> float:
        passed = min(step / until, 1.0)
        if shape == "cosine":
            passed = (1 - math.cos(math.pi * passed)) / 2
        return start + (end - start) * passed

    return value


def _warmup(peak: float, warmup: int, steps: int, shape: str) -> Schedule:
    """Reaches `peak` at the last warm-up step; the first step already moves, and so does the last."""
    fall = _between(peak, 0.0, max(steps - warmup, 1), shape)
    return lambda step: peak * (step + 1) / warmup if step < warmup else fall(step - warmup)


def _is_value(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _is_ramp(values: Any) -> bool:
    if not isinstance(values, list) or len(values) not in (2, 3) or not all(map(_is_value, values)):
        return False
    return len(values) == 2 or (isinstance(values[2], int) and values[2] > 0)


def _is_step(values: Any) -> bool:
    return (
        isinstance(values, Mapping)
        and 0 in values
        and all(isinstance(start, int) and start >= 0 and _is_value(value) for start, value in values.items())
    )


def _is_warmup(values: Any) -> bool:
    return isinstance(values, list) and len(values) == 2 and all(map(_is_value, values)) and values[1] <= 1


_IS_WELL_FORMED: Mapping[str, Callable[[Any], bool]] = {
    "linear": _is_ramp,
    "cosine": _is_ramp,
    "step": _is_step,
    "warmup_linear": _is_warmup,
    "warmup_cosine": _is_warmup,
}


def _refused(field: str, spec: Any) -> UserError:
    return UserError(
        f"{field}: {spec!r} is no schedule; write a number ≥ 0, or one of {{linear: [from, to]}}, "
        "{linear: [from, to, until_step]}, {cosine: …} likewise, {step: {0: value, 300: value}}, "
        "{warmup_linear: [peak, fraction]}, {warmup_cosine: [peak, fraction]}"
    )
