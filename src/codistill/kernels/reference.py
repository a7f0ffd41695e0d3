"""The loss as its definition: plain autograd, any divergence, N × V tensors. Every kernel must match it."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from codistill.divergences import DIVERGENCES
from codistill.errors import UserError, first_line
from codistill.kernels.problem import Edge, Problem


def reference_loss(problem: Problem) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...]]:
    """(total, hard, soft) as in `codistill.kernels.loss.CohortLoss`, in at least float32 whatever autocast says."""
    scale_N, dtype = problem.scale_N, problem.dtype
    with torch.autocast(scale_N.device.type, enabled=False):
        logits = {member: _logits(problem, member, dtype) for member in problem.hidden}
        hard, soft, total = {}, [], torch.zeros((), dtype=dtype, device=scale_N.device)
        for member, logits_NV in logits.items():
            loss = (functional.cross_entropy(logits_NV, problem.labels_N, reduction="none") * scale_N).sum()
            hard[member] = loss.detach()
            total = total + problem.hard_weight[member] * loss
        for member, sparse in problem.given.items():
            empty_NV = torch.empty(len(scale_N), problem.vocabulary, dtype=dtype, device=scale_N.device)
            logits[member] = sparse.rows(slice(None), empty_NV)
        for edge in problem.edges:
            loss = (_rows(edge, logits, len(scale_N)) * scale_N).sum()
            soft.append(loss.detach())
            total = total + edge.weight * loss
    return total, hard, tuple(soft)


def _rows(edge: Edge, logits: Mapping[str, Tensor], count: int) -> Tensor:
    """(N,) the edge's loss of each row; UserError, naming the edge, for what a function of one's own cannot give."""
    divergence = DIVERGENCES[edge.divergence] if isinstance(edge.divergence, str) else edge.divergence
    student_NV = logits[edge.student]
    said = f"edge {edge.teacher!r} -> {edge.student!r}: divergence {getattr(divergence, '__name__', divergence)}"
    try:
        rows = divergence(student_NV, logits[edge.teacher].detach(), edge.temperature)
    except TypeError as error:
        raise UserError(
            f"{said} failed with {first_line(error)!r}; wanted a function of the student's logits, the teacher's "
            "logits and the temperature, in this order"
        ) from error
    # Any other shape would be broadcast against the rows' weights, (N, 1) to N × N.
    if not isinstance(rows, Tensor) or rows.shape != (count,):
        came = f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else f"a {type(rows).__name__}"
        raise UserError(
            f"{said} gave {came}; wanted the loss of each row, shape ({count},): sum over the vocabulary only"
        )
    if student_NV.requires_grad and not rows.requires_grad:
        raise UserError(
            f"{said} gave a loss without a gradient, so {edge.student!r} would not learn from it; detach no logits "
            "of the student, and compute it outside torch.no_grad"
        )
    return rows


def _logits(problem: Problem, member: str, dtype: torch.dtype) -> Tensor:
    weight_VD, bias_V = problem.weight[member], problem.bias[member]
    if weight_VD is None:
        return problem.hidden[member][:, : problem.vocabulary].to(dtype)
    logits_NV = problem.hidden[member].to(dtype) @ weight_VD[: problem.vocabulary].to(dtype).T
    return logits_NV if bias_V is None else logits_NV + bias_V[: problem.vocabulary].to(dtype)
