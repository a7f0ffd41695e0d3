"""What the committed studies found about whether to distil, for `codistill train --plan`.

The numbers are those of studies/ctcd, studies/when-it-pays, studies/dwt-soft-weight, studies/dwt-teacher-quality and
studies/causal (a test compares them): held-out loss of the taught model minus its twin's alone, in nats, with 95 %
intervals over seeds, by passes over the text at equal steps, soft weight 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from codistill.config import DistillationConfig, Run

WHERE = {
    "mlm": "in our studies of masked models of 1 M parameters at weight 1 (docs/studies.md)",
    "clm": "in our study of causal models of 0.3 M parameters at weight 1 (docs/studies.md)",
}


@dataclass(frozen=True)
class Finding:
    """What distilling changed in a `study` at so many `passes` over the text, of models that are `regularised` or as
    they are: mean and 95 % interval over `seeds`."""

    study: str
    passes: int
    mean: float
    low: float
    high: float
    seeds: int
    regularised: bool = False

    @property
    def regime(self) -> str:
        """What the study calls it."""
        often = "one pass" if self.passes == 1 else f"{self.passes} passes"
        return f"{often}, regularised" if self.regularised else often

    def __str__(self) -> str:
        shown = "lower" if self.high < 0 else "higher" if self.low > 0 else "not shown"
        return f"{self.regime}: {self.mean:+.3f} nats [{self.low:+.3f}, {self.high:+.3f}], {shown} ({self.seeds} seeds)"


WEAK_TEACHER = "a model taught by a frozen one of 0.75 times its size that is 0.1 to 0.2 nats worse"
TOO_WEAK_TEACHER = "a model taught by a frozen one of 0.3 times its size that is 0.8 to 1.0 nats worse"
LARGE_OF_A_PAIR = "the larger one of a pair that teaches both ways"
SMALL_OF_A_PAIR = "the smaller one of a pair that teaches both ways"
_OVERFITS = "alone it overfits in 20, unless regularised by dropout and weight decay"
CAUSAL_WEAK_TEACHER = (
    f"a model taught by a frozen one of 0.7 times its size that is 0.07 nats worse in one pass; {_OVERFITS}"
)
CAUSAL_TOO_WEAK_TEACHER = (
    f"a model taught by a frozen one of half its size that is 0.25 nats worse in one pass; {_OVERFITS}"
)
CAUSAL_LARGE_OF_A_PAIR = f"the larger one of a causal pair that teaches both ways; {_OVERFITS}"
CAUSAL_SMALL_OF_A_PAIR = f"the smaller one of a causal pair that teaches both ways; {_OVERFITS}"
FINDINGS: Mapping[str, tuple[Finding, ...]] = {
    WEAK_TEACHER: (
        Finding("dwt-soft-weight", 1, -0.079, -0.139, -0.018, seeds=5),
        Finding("when-it-pays", 5, -0.097, -0.117, -0.077, seeds=5),
        Finding("dwt-soft-weight", 20, -0.131, -0.154, -0.109, seeds=5),
    ),
    TOO_WEAK_TEACHER: (
        Finding("dwt-teacher-quality", 1, 0.218, 0.159, 0.277, seeds=5),
        Finding("dwt-teacher-quality", 20, 0.072, 0.05, 0.095, seeds=5),
    ),
    LARGE_OF_A_PAIR: (
        Finding("ctcd", 1, 0.056, 0.015, 0.096, seeds=5),
        Finding("when-it-pays", 5, 0.027, -0.008, 0.062, seeds=5),
        Finding("ctcd", 20, -0.005, -0.02, 0.011, seeds=5),
    ),
    SMALL_OF_A_PAIR: (
        Finding("ctcd", 1, -0.088, -0.136, -0.039, seeds=5),
        Finding("when-it-pays", 5, -0.049, -0.095, -0.004, seeds=5),
        Finding("ctcd", 20, -0.031, -0.082, 0.019, seeds=5),
    ),
    CAUSAL_WEAK_TEACHER: (
        Finding("causal", 1, -0.039, -0.05, -0.028, seeds=5),
        Finding("causal", 20, -0.494, -0.547, -0.442, seeds=5),
        Finding("causal", 20, -0.063, -0.071, -0.054, seeds=5, regularised=True),
    ),
    CAUSAL_TOO_WEAK_TEACHER: (
        Finding("causal", 1, 0.026, -0.018, 0.07, seeds=5),
        Finding("causal", 20, -0.502, -0.568, -0.436, seeds=5),
    ),
    CAUSAL_LARGE_OF_A_PAIR: (
        Finding("causal", 1, 0.05, 0.033, 0.067, seeds=5),
        Finding("causal", 20, -0.503, -0.591, -0.415, seeds=5),
        Finding("causal", 20, -0.028, -0.031, -0.024, seeds=5, regularised=True),
    ),
    CAUSAL_SMALL_OF_A_PAIR: (
        Finding("causal", 1, -0.03, -0.173, 0.112, seeds=5),
        Finding("causal", 20, -0.201, -0.258, -0.144, seeds=5),
        Finding("causal", 20, -0.018, -0.031, -0.005, seeds=5, regularised=True),
    ),
}
_OF = {
    "mlm": (WEAK_TEACHER, TOO_WEAK_TEACHER, LARGE_OF_A_PAIR, SMALL_OF_A_PAIR),
    "clm": (CAUSAL_WEAK_TEACHER, CAUSAL_TOO_WEAK_TEACHER, CAUSAL_LARGE_OF_A_PAIR, CAUSAL_SMALL_OF_A_PAIR),
}


def advice(run: Run, parameters: Mapping[str, int], passes: float | None) -> list[str]:
    """What was found for edges like those of `run`, in lines; nothing for other edges.

    `parameters` of each member; `passes`: how often the run sees its text, None where that is not known.
    """
    asked = {name for edge in run.distillation for name in _alike(edge, run, parameters)}
    found = [name for name in FINDINGS if name in asked]
    if not found:
        return []
    often = "it depends on how often the text is seen" if passes is None else f"the text is seen {passes:.3g} times"
    where = WHERE[run.objective.name]
    lines = [f"does it pay? {often}; held-out loss minus that of the same model alone, {where}:"]
    for name in found:
        lines += [f"  {name}", *(f"    {finding}" for finding in FINDINGS[name])]
    return lines


def _alike(edge: DistillationConfig, run: Run, parameters: Mapping[str, int]) -> Sequence[str]:
    """The findings whose teacher and student are to one another as those of `edge`.

    How good a frozen teacher is decides, and is not known here: both findings, each with what it was.
    """
    weak, too_weak, large, small = _OF[run.objective.name]
    larger = parameters[edge.student] > parameters[edge.teacher]
    if edge.kind != "logits" or parameters[edge.student] == parameters[edge.teacher]:
        return ()
    if run.members[edge.teacher].frozen:
        return (weak, too_weak) if larger else ()
    back = any((e.teacher, e.student, e.kind) == (edge.student, edge.teacher, "logits") for e in run.distillation)
    return ((large if larger else small),) if back else ()
