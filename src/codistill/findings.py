"""What the committed studies found about whether to distil, for `codistill train --plan`.

The numbers are those of studies/when-it-pays (a test compares them): held-out loss of the taught model minus its twin's
alone, in nats, with 95 % intervals over seeds, by passes over the text at equal steps, soft weight 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from codistill.config import DistillationConfig, Run

SOURCE = "studies/when-it-pays: masked models of 1 M parameters, 3 seeds"


@dataclass(frozen=True)
class Finding:
    """What distilling changed at so many `passes` over the text: mean and 95 % interval."""

    passes: int
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        shown = "" if self.high < 0 or self.low > 0 else ", not shown"
        often = "one pass" if self.passes == 1 else f"{self.passes} passes"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]{shown} in {often}"


# Contrast of the study → what it showed.
WEAK_TEACHER = "large: DWT, weight 1 − alone"
PEER_OF_LARGE = "large: CTCD, weight 1 − alone"
PEER_OF_SMALL = "small: CTCD, weight 1 − alone"
FINDINGS: Mapping[str, tuple[Finding, ...]] = {
    WEAK_TEACHER: (
        Finding(1, -0.049, -0.144, 0.045),
        Finding(5, -0.095, -0.148, -0.042),
        Finding(20, -0.128, -0.185, -0.072),
    ),
    PEER_OF_LARGE: (
        Finding(1, 0.056, -0.058, 0.17),
        Finding(5, 0.01, -0.034, 0.055),
        Finding(20, 0.004, -0.004, 0.013),
    ),
    PEER_OF_SMALL: (
        Finding(1, -0.093, -0.227, 0.041),
        Finding(5, -0.041, -0.162, 0.079),
        Finding(20, -0.024, -0.098, 0.05),
    ),
}
_WORDS = {
    WEAK_TEACHER: "a smaller frozen teacher changed the loss of the model it taught by",
    PEER_OF_LARGE: "co-training changed the loss of the larger model by",
    PEER_OF_SMALL: "co-training changed the loss of the smaller model by",
}


def advice(run: Run, parameters: Mapping[str, int], passes: float | None) -> list[str]:
    """What was found for edges like those of `run`, in a line each; nothing for other edges and for causal models.

    `parameters` of each member; `passes`: how often the run sees its text, None where that is not known.
    """
    asked = {_alike(edge, run, parameters) for edge in run.distillation} if run.objective.name == "mlm" else set()
    found = [f"{_WORDS[name]} {'; '.join(map(str, FINDINGS[name]))}" for name in FINDINGS if name in asked]
    if not found:
        return []
    often = "it depends on how often the text repeats" if passes is None else f"the text is seen {passes:.3g} times"
    return [f"does it pay? {often}. In {SOURCE}, weight 1:", *(f"  {line}" for line in found)]


def _alike(edge: DistillationConfig, run: Run, parameters: Mapping[str, int]) -> str:
    """The contrast whose teacher and student are to one another as those of `edge`; "" if there is none."""
    larger = parameters[edge.student] > parameters[edge.teacher]
    if edge.kind != "logits" or parameters[edge.student] == parameters[edge.teacher]:
        return ""
    if run.members[edge.teacher].frozen:
        return WEAK_TEACHER if larger else ""
    back = any((e.teacher, e.student, e.kind) == (edge.student, edge.teacher, "logits") for e in run.distillation)
    return (PEER_OF_LARGE if larger else PEER_OF_SMALL) if back else ""
