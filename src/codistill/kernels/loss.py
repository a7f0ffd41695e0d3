"""One function for the loss of a whole cohort, and the implementations it dispatches to.

Shape suffixes: N predicted rows, D width of a member, V vocabulary.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

from torch import Tensor

from codistill.errors import UserError
from codistill.kernels.problem import Edge, Problem, SparseLogits, checked, is_fused
from codistill.machine import why_not_triton

IMPLEMENTATIONS = ("reference", "chunked", "triton")


class CohortLoss(NamedTuple):
    """`total` carries gradients; `hard[member]` and `soft[i]` (edge i, unweighted, τ² included) are detached, in nats.

    All are 0-d float32 (float64 for float64 members): weighted sums over rows ÷ the denominator.
    """

    total: Tensor
    hard: dict[str, Tensor]
    soft: tuple[Tensor, ...]


def linear_cohort_loss(
    hidden: Mapping[str, Tensor | SparseLogits],
    weight: Mapping[str, Tensor | None],
    bias: Mapping[str, Tensor | None],
    labels: Tensor,
    *,
    hard_weight: Mapping[str, float | Tensor],
    edges: Sequence[Edge] = (),
    row_weight: Tensor | None = None,
    denominator: Tensor | None = None,
    vocabulary: int | None = None,
    chunk_rows: int | None = None,
    impl: str | None = None,
    compiled: bool = False,
) -> CohortLoss:
    """The cohort's loss on N predicted rows, with gradients to each trained member's features, weight and bias.

        z_m = hidden_m weight_mᵀ + bias_m
        total = Σ_i r_i [Σ_m h_m CE(z_m, y)_i + Σ_e w_e divergence_e(z_student, z_teacher detached)_i] ÷ denominator

    `hidden[m]` (N, D_m), `weight[m]` (at least V, D_m), `bias[m]` (as many, or None), `labels` y (N,) int64,
    `row_weight` r (N,), `hard_weight[m]` h. `vocabulary` V says how many rows of the weights are tokens: rows added
    for alignment are cut, take no part in any softmax and get gradient 0 (default: the rows of the weights, which then
    must agree). `denominator` is a 0-d tensor, by default Σ r. No rows give 0. Weights that vary enter as 0-d tensors.
    Where `weight[m]` is None, `hidden[m]` (N, at least V) are the logits z_m: those take "reference".

    A teacher may be given by `SparseLogits` in place of features: it then has no weight, bias, or hard loss.
    A member is trained if grad mode is on and its hidden, weight or bias requires a gradient; any other costs one
    matrix product. `impl`: "reference" is plain autograd and takes any divergence, a function of
    `codistill.divergences.Divergence`'s type too; "chunked" and "triton" form the gradients here, in the forward pass,
    `chunk_rows` rows at a time, hold nothing of size N × V, and hand the gradients out to one backward pass. They
    round as `torch.nn.functional.linear` would, to the features' type or autocast's, except that logits and sums are
    float32. With `compiled`, what "chunked" does on a CPU between the products is fused by PyTorch's compiler, which
    needs a C++ compiler and some seconds at the first call. Raises UserError for what cannot be computed as asked.
    """
    if chunk_rows is not None and chunk_rows < 1:
        raise UserError(f"chunk_rows: {chunk_rows}; wanted at least 1, or None for the default")
    problem = checked(hidden, weight, bias, labels, hard_weight, edges, row_weight, denominator, vocabulary)
    impl = _chosen(impl, problem)
    if impl == "reference":
        from codistill.kernels.reference import reference_loss

        return CohortLoss(*reference_loss(problem))
    from codistill.kernels.chunked import chunked_loss

    return CohortLoss(*chunked_loss(problem, chunk_rows, _sweep(impl, compiled and labels.device.type == "cpu")))


def _chosen(impl: str | None, problem: Problem) -> str:
    custom = [edge.divergence for edge in problem.edges if not is_fused(edge.divergence)]
    logits = [member for member, weight in problem.weight.items() if weight is None]
    device = problem.labels_N.device.type
    squared = any(edge.divergence == "squared_error" for edge in problem.edges)
    if impl is None:
        fused = "triton" if device == "cuda" and not squared and _has_triton() else "chunked"
        return "reference" if custom or logits else fused
    if impl not in IMPLEMENTATIONS:
        raise UserError(f"impl: {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if custom and impl != "reference":
        raise UserError(f"impl: {impl!r} does not know the divergence {custom[0]!r}; leave impl out or use 'reference'")
    if logits and impl != "reference":
        raise UserError(f"impl: {impl!r} takes no logits, as {logits[0]!r} gives; leave impl out or use 'reference'")
    if impl == "triton" and squared:
        raise UserError("impl: 'triton' does not know the divergence 'squared_error'; leave impl out or use 'chunked'")
    if impl == "triton" and not _interpreted():
        if device != "cuda":
            raise UserError(f"impl: 'triton' needs a CUDA device, not {device}; use 'chunked'")
        if reason := why_not_triton():
            raise UserError(f"impl: 'triton' cannot run on this machine: {reason}; use 'chunked'")
    return impl


def _sweep(impl: str, compiled: bool):
    if impl == "triton":
        from codistill.kernels.triton_rows import sweep
    elif compiled:
        from codistill.kernels.compiled_rows import sweep
    else:
        from codistill.kernels.rows import sweep
    return sweep


@cache
def _has_triton() -> bool:
    """Whether this machine runs Triton's kernels; a line on stderr says once why it does not."""
    if reason := why_not_triton():
        print(f"codistill: continuing without the loss in Triton, which is faster: {reason}", file=sys.stderr)
    return reason is None


def _interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU, as in tests."""
    if not find_spec("triton"):
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)
