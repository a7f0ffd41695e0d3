"""What the committed studies found about whether to distil, for `codistill train --plan`.

The numbers are those of studies/ctcd, studies/when-it-pays and studies/dwt-teacher-quality (a test compares them):
held-out loss of the taught model minus its twin's alone, in nats, with 95 % intervals over seeds, by passes over the
text at equal steps, soft weight 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from codistill.config import DistillationConfig, Run

WHERE = "in our studies of masked models of 1 M parameters at weight 1 (docs/studies.md)"


@dataclass(frozen=True)
class Finding:
    """What distilling changed in a `study` at so many `passes` over the text: mean and 95 % interval over `seeds`."""

    study: str
    passes: int
    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        often = "one pass" if self.passes == 1 else f"{self.passes} passes"
        shown = "lower" if self.high < 0 else "higher" if self.low > 0 else "not shown"
        return f"{often}: {self.mean:+.3f} nats [{self.low:+.3f}, {self.high:+.3f}], {shown} ({self.seeds} seeds)"


WEAK_TEACHER = "a model taught by a frozen one of 0.75 times its size that is 0.1 to 0.2 nats worse"
TOO_WEAK_TEACHER = "a model taught by a frozen one of 0.3 times its size that is 0.8 to 1.0 nats worse"
LARGE_OF_A_PAIR = "the larger one of a pair that teaches both ways"
SMALL_OF_A_PAIR = "the smaller one of a pair that teaches both ways"
FINDINGS: Mapping[str, tuple[Finding, ...]] = {
    WEAK_TEACHER: (
        Finding("when-it-pays", 1, -0.049, -0.144, 0.045, seeds=3),
        Finding("when-it-pays", 5, -0.095, -0.148, -0.042, seeds=3),
        Finding("when-it-pays", 20, -0.128, -0.185, -0.072, seeds=3),
    ),
    TOO_WEAK_TEACHER: (
        Finding("dwt-teacher-quality", 1, 0.218, 0.053, 0.383, seeds=3),
        Finding("dwt-teacher-quality", 20, 0.07, 0.017, 0.123, seeds=3),
    ),
    LARGE_OF_A_PAIR: (
        Finding("ctcd", 1, 0.056, 0.015, 0.096, seeds=5),
        Finding("when-it-pays", 5, 0.01, -0.034, 0.055, seeds=3),
        Finding("ctcd", 20, -0.005, -0.02, 0.011, seeds=5),
    ),
    SMALL_OF_A_PAIR: (
        Finding("ctcd", 1, -0.088, -0.136, -0.039, seeds=5),
        Finding("when-it-pays", 5, -0.041, -0.162, 0.079, seeds=3),
        Finding("ctcd", 20, -0.031, -0.082, 0.019, seeds=5),
    ),
}


def advice(run: Run, parameters: Mapping[str, int], passes: float | None) -> list[str]:
    """What was found for edges like those of `run`, in lines; nothing for other edges and for causal models.

    `parameters` of each member; `passes`: how often the run sees its text, None where that is not known.
    """
    edges = run.distillation if run.objective.name == "mlm" else []
    asked = {name for edge in edges for name in _alike(edge, run, parameters)}
    found = [name for name in FINDINGS if name in asked]
    if not found:
        return []
    often = "it depends on how often the text is seen" if passes is None else f"the text is seen {passes:.3g} times"
    lines = [f"does it pay? {often}; held-out loss minus that of the same model alone, {WHERE}:"]
    for name in found:
        lines += [f"  {name}", *(f"    {finding}" for finding in FINDINGS[name])]
    return lines


def _alike(edge: DistillationConfig, run: Run, parameters: Mapping[str, int]) -> Sequence[str]:
    """The findings whose teacher and student are to one another as those of `edge`.

    How good a frozen teacher is decides, and is not known here: both findings, each with what it was.
    """
    larger = parameters[edge.student] > parameters[edge.teacher]
    if edge.kind != "logits" or parameters[edge.student] == parameters[edge.teacher]:
        return ()
    if run.members[edge.teacher].frozen:
        return (WEAK_TEACHER, TOO_WEAK_TEACHER) if larger else ()
    back = any((e.teacher, e.student, e.kind) == (edge.student, edge.teacher, "logits") for e in run.distillation)
    return ((LARGE_OF_A_PAIR if larger else SMALL_OF_A_PAIR),) if back else ()
