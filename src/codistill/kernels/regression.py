"""The cohort's loss where labels are numbers: squared errors, to the labels and along the edges.

Shape suffixes: N predicted rows, D width of a member.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from codistill.divergences import squared_error
from codistill.errors import UserError
from codistill.kernels.loss import CohortLoss
from codistill.kernels.problem import Edge


def linear_cohort_regression(
    hidden: Mapping[str, Tensor],
    weight: Mapping[str, Tensor],
    bias: Mapping[str, Tensor | None],
    labels: Tensor,
    *,
    hard_weight: Mapping[str, float | Tensor],
    edges: Sequence[Edge] = (),
    row_weight: Tensor | None = None,
    denominator: Tensor | None = None,
) -> CohortLoss:
    """As `linear_cohort_loss`, of N rows with one number each: labels y (N,) float32, `weight[m]` (1, D_m).

        z_m = hidden_m weight_mᵀ + bias_m
        total = Σ_i r_i [Σ_m h_m (z_m − y)²_i + Σ_e w_e (z_student − z_teacher detached)²_i] ÷ denominator

    Plain autograd in float32, whatever autocast says. Raises UserError for an edge whose divergence is not
    squared_error: the others compare distributions.
    """
    row_weight = torch.ones_like(labels) if row_weight is None else row_weight
    denominator = row_weight.sum() if denominator is None else denominator
    scale_N = row_weight / denominator.clamp_min(torch.finfo(row_weight.dtype).tiny)
    with torch.autocast(labels.device.type, enabled=False):
        found = {m: functional.linear(hidden[m].float(), weight[m].float(), _float(bias[m])) for m in hidden}
        hard = {m: (squared_error(found[m], labels[:, None]) * scale_N).sum() for m in hidden}
        soft = [(_along(edge, found) * scale_N).sum() for edge in edges]
        total = sum(
            [hard_weight[m] * loss for m, loss in hard.items()]
            + [edge.weight * loss for edge, loss in zip(edges, soft, strict=True)],
            torch.zeros((), device=labels.device),
        )
    return CohortLoss(total, {m: loss.detach() for m, loss in hard.items()}, tuple(loss.detach() for loss in soft))


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def _along(edge: Edge, found: Mapping[str, Tensor]) -> Tensor:
    if edge.divergence != "squared_error":
        raise UserError(
            f"edge {edge.teacher!r} -> {edge.student!r}: {edge.divergence!r} compares distributions, and the labels "
            "are numbers; use squared_error"
        )
    return squared_error(found[edge.student], found[edge.teacher].detach())
