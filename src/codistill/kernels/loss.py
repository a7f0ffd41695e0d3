"""One function for the loss of a whole cohort, and the implementations it dispatches to.

Shape suffixes: N predicted rows, D width of a member, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from codistill.kernels.reference import reference_loss


class Edge(NamedTuple):
    """`teacher` teaches `student`: adds weight · divergence(student, teacher detached) to the student's loss.

    `weight` is a float or a 0-d tensor; `temperature` > 0 is fixed; `divergence` is a key of
    `codistill.divergences.DIVERGENCES`.
    """

    teacher: str
    student: str
    weight: float | Tensor = 1.0
    temperature: float = 1.0
    divergence: str = "forward_kl"


class CohortLoss(NamedTuple):
    """`total` carries gradients; `hard[member]` and `soft[i]` (edge i, unweighted, τ² included) are detached, in nats.

    All are 0-d float32: weighted sums over rows ÷ the denominator.
    """

    total: Tensor
    hard: dict[str, Tensor]
    soft: tuple[Tensor, ...]


def linear_cohort_loss(
    hidden: Mapping[str, Tensor],
    weight: Mapping[str, Tensor],
    bias: Mapping[str, Tensor | None],
    labels: Tensor,
    *,
    hard_weight: Mapping[str, float | Tensor],
    edges: Sequence[Edge] = (),
    row_weight: Tensor | None = None,
    denominator: Tensor | None = None,
    chunk_rows: int | None = None,
    impl: str | None = None,
) -> CohortLoss:
    """The cohort's loss on N predicted rows, with gradients to each trained member's features, weight and bias."""
    if row_weight is None:
        row_weight = torch.ones(labels.shape, dtype=torch.float32, device=labels.device)
    if denominator is None:
        denominator = row_weight.sum()
    total, hard, soft = reference_loss(hidden, weight, bias, labels, hard_weight, edges, row_weight, denominator)
    return CohortLoss(total, hard, soft)
