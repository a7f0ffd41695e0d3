"""The loss in chunks of rows: one pass over them serves every member and edge, and forms the gradients on the way.

What happens to a chunk's logits is a `sweep`: `codistill.kernels.rows` (PyTorch) or `.triton_rows`.
Shape suffixes: N predicted rows, C rows of one chunk, M members, E edges, V vocabulary.
"""

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from codistill.kernels.head import GivenHead, Head
from codistill.kernels.problem import Problem

# (problem, heads, logits of the chunk without bias, its rows) -> row losses hard (M, C) and soft (E, C), and of each
# trained member the gradient at the labels (C,); writes the rest of the gradient into `Head.gradient`.
Sweep = Callable[
    [Problem, dict[str, Head | GivenHead], dict[str, Tensor], slice], tuple[Tensor, Tensor, dict[str, Tensor]]
]


def chunked_loss(problem: Problem, chunk_rows: int | None, sweep: Sweep):
    """(total, hard, soft) as in `codistill.kernels.loss.CohortLoss`."""
    chunk_rows = chunk_rows or rows_per_chunk(problem.vocabulary, problem.labels_N.device.type)
    parameters = _parameters(problem)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in parameters):
        total, hard_M, soft_E = _ChunkedLoss.apply(problem, chunk_rows, sweep, *parameters)
    else:
        with torch.no_grad():
            total, hard_M, soft_E, _ = _solve(problem, chunk_rows, sweep, [False] * len(parameters))
    return total, dict(zip(problem.hidden, hard_M.unbind(), strict=False)), soft_E.unbind()


def rows_per_chunk(vocabulary: int, device: str) -> int:
    """Rows of one chunk: enough for fast products, and a function of nothing that a member's company could change.

    A CPU takes about 32 MB of logits a member, an accelerator 256 MB; fewer than 128 and 2048 rows starve the products.
    """
    if device == "cpu":
        return min(512, max(128, 2**23 // vocabulary // 32 * 32))
    return min(8192, max(2048, 2**26 // vocabulary // 256 * 256))


def buffer_bytes(rows: int, vocabulary: int, members: int, device: str) -> int:
    """The chunk of logits that the loss holds for each member, in float32."""
    return 4 * min(rows, rows_per_chunk(vocabulary, device)) * vocabulary * members


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem: Problem, chunk_rows: int, sweep: Sweep, *parameters: Tensor | None):
        wants = [tensor is not None and tensor.requires_grad for tensor in parameters]
        total, hard_M, soft_E, ctx.gradients = _solve(problem, chunk_rows, sweep, wants)
        ctx.mark_non_differentiable(hard_M, soft_E)
        return total, hard_M, soft_E

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, *_):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were handed out already; compute the loss again")
        # Let go of them, so that autograd can make them the parameters' .grad without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        if upstream.device.type != "cpu" or upstream.item() != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream)
        return None, None, None, *gradients


def _parameters(problem: Problem) -> list[Tensor | None]:
    return [*problem.hidden.values(), *problem.weight.values(), *problem.bias.values()]


def _solve(problem: Problem, chunk_rows: int, sweep: Sweep, wants: list[bool]):
    """(total, hard (M,), soft (E,), the gradient of each of `_parameters` or None)."""
    rows, device = len(problem.labels_N), problem.labels_N.device
    heads = _heads(problem, min(chunk_rows, rows), wants)
    hard_M = torch.zeros(len(heads), dtype=problem.dtype, device=device)
    soft_E = torch.zeros(len(problem.edges), dtype=problem.dtype, device=device)
    with torch.autocast(device.type, enabled=False):
        for start in range(0, rows, chunk_rows):
            _add_chunk(problem, heads, slice(start, start + chunk_rows), sweep, hard_M, soft_E)
        total = _weighted(problem.hard_weight.values(), hard_M)
        total = total + _weighted([edge.weight for edge in problem.edges], soft_E)
    return total, hard_M, soft_E, _gradients(problem, heads)


def _heads(problem: Problem, chunk_rows: int, wants: list[bool]) -> dict[str, Head | GivenHead]:
    count = len(problem.hidden)
    given = {m: GivenHead(logits, problem.vocabulary, chunk_rows, problem.dtype) for m, logits in problem.given.items()}
    heads = {
        member: Head(
            problem.hidden[member],
            cast(Tensor, problem.weight[member]),
            problem.bias[member],
            problem.vocabulary,
            chunk_rows,
            (wants[index], wants[count + index], wants[2 * count + index]),
        )
        for index, member in enumerate(problem.hidden)
    }
    return {**heads, **given}


def _add_chunk(
    problem, heads: dict[str, Head | GivenHead], rows: slice, sweep: Sweep, hard_M: Tensor, soft_E: Tensor
) -> None:
    logits = {member: head.logits(rows) for member, head in heads.items()}
    hard_MC, soft_EC, at_label = sweep(problem, heads, logits, rows)
    scale_C = problem.scale_N[rows]
    hard_M += (hard_MC * scale_C).sum(1)
    soft_E += (soft_EC * scale_C).sum(1)
    for member, head in heads.items():
        if isinstance(head, Head) and head.trained:
            head.absorb(rows, problem.labels_N[rows], at_label[member])


def _weighted(weights: Iterable[float | Tensor], losses: Tensor) -> Tensor:
    return sum((weight * loss for weight, loss in zip(weights, losses, strict=True)), losses.new_zeros(()))


def _gradients(problem: Problem, every: dict[str, Head | GivenHead]) -> list[Tensor | None]:
    heads = {member: head for member, head in every.items() if isinstance(head, Head)}
    hidden = [head.d_hidden_ND for head in heads.values()]
    weight = [_as(head.d_weight_VD, problem.weight[member]) for member, head in heads.items()]
    bias = [_as(head.d_bias_V, problem.bias[member]) for member, head in heads.items()]
    return [*hidden, *weight, *bias]


def _as(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or parameter is None else gradient.to(parameter.dtype)
