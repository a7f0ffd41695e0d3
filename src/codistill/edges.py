"""Distillation edges: who teaches whom, and what the student is to match."""

from dataclasses import dataclass
from typing import Literal

from codistill.config import Layers, edge_problem
from codistill.divergences import Divergence
from codistill.errors import UserError
from codistill.schedules import Schedule, problem, value_at


@dataclass(frozen=True)
class Distillation:
    """An edge: `teacher` teaches `student`, whose loss gains weight · what `kind` says; the teacher gets no gradient.

    - "logits": divergence(student, teacher; τ) at the predicted rows. `divergence` is a name of
      `codistill.divergences.DIVERGENCES`, which have τ² in them, or a function of student's and teacher's logits (N, V)
      and τ that gives (N,), with τ² or without as you want it; a function goes through plain autograd.
    - "hidden": squared error between the states that chosen layers give, through a learned projection where the
      widths differ.
    - "relation": KL between the attention relations of chosen layers (MiniLMv2: Wang et al. 2021), in
      `relation_heads` heads, by default as many as the student's layers have.

    `layers` pairs layers, counted from 1; by default the last of each. `weight` is a number or a function of the step.
    The equations are in docs/equations.md. Raises UserError for settings that do not go together.
    """

    teacher: str
    student: str
    divergence: str | Divergence = "forward_kl"
    weight: float | Schedule = 1.0
    temperature: float = 1.0
    kind: Literal["logits", "hidden", "relation"] = "logits"
    layers: Layers | None = None
    relation_heads: int | None = None

    def __post_init__(self) -> None:
        not_a_weight = problem(self.weight)
        wrong = edge_problem(self) if not_a_weight is None else f"weight {not_a_weight}"
        if wrong is not None:
            raise UserError(f"edge {self.teacher!r} -> {self.student!r}: {wrong}")

    @property
    def name(self) -> str:
        """What its loss is called in the metrics."""
        prefix = "" if self.kind == "logits" else f"{self.kind}_"
        return f"{self.student}/{prefix}from_{self.teacher}"

    def weight_at(self, step: int) -> float:
        """The weight in step `step`."""
        return value_at(self.weight, step)
