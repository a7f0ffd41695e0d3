"""From a chunk's logits to its row losses and gradients, as `codistill.kernels.rows`, fused by PyTorch's compiler.

The formulas stand there. Here they are written without buffers, so that the compiler makes of a block of rows one loop
that reads every logit from the cache; its roundings are its own. Shape suffixes: C rows of a chunk, R rows of a block,
V vocabulary, M members, E edges.
"""

import math
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from codistill.kernels.head import GivenHead, Head
from codistill.kernels.problem import Problem
from codistill.kernels.rows import Softmax, rows_per_block
from codistill.machine import allow_variants, compiler_failure


class _Edge(NamedTuple):
    """An edge between the members of the given places."""

    teacher: int
    student: int
    temperature: float
    divergence: str


class _Structure(NamedTuple):
    """What a compiled function is made for: which members are trained, and the edges without their weights."""

    trained: tuple[int, ...]
    edges: tuple[_Edge, ...]


def sweep(problem: Problem, heads: dict[str, Head | GivenHead], logits: dict[str, Tensor], rows: slice):
    """As `codistill.kernels.chunked.Sweep` says, where `Head.gradient` has the type of the logits."""
    labels_C, scale_C = problem.labels_N[rows], problem.scale_N[rows]
    structure = _structure(problem, heads)
    weights = [_scalars([problem.hard_weight[m] for m in heads], scale_C)]
    weights.append(_scalars([edge.weight for edge in problem.edges], scale_C))
    bias = [head.bias_V for head in heads.values()]
    hard_MC = scale_C.new_empty(len(heads), len(labels_C))
    soft_EC = scale_C.new_empty(len(problem.edges), len(labels_C))
    at_label_TC = scale_C.new_empty(len(structure.trained), len(labels_C))
    block_rows = rows_per_block(problem.vocabulary, scale_C.device.type)
    for start in range(0, len(labels_C), block_rows):
        part = slice(start, start + block_rows)
        block = [z_CV[part] for z_CV in logits.values()]
        given = (block, labels_C[part, None], scale_C[part, None])
        for tensor in (*block, *given[1:]):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        hard_MC[:, part], soft_EC[:, part], at_label_TC[:, part] = _solved(*given, bias, *weights, structure)
    names = list(heads)
    return hard_MC, soft_EC, {names[m]: at_label_TC[i] for i, m in enumerate(structure.trained)}


# Where PyTorch's compiler failed, by what it compiles anew for: a structure, and whether a block is a single row. So
# a run that is resumed fails, and goes on, where the straight one did.
_uncompiled: set[tuple[_Structure, bool]] = set()


def _solved(logits, labels_R1, *rest) -> tuple[Tensor, Tensor, Tensor]:
    """`solve_block`, compiled; as it is written where the compiler fails, which a line on stderr says once."""
    key = (rest[-1], len(labels_R1) == 1)
    if key not in _uncompiled:
        try:
            return _compiled()(logits, labels_R1, *rest)
        except RuntimeError as error:
            if not (failure := compiler_failure(error)):
                raise
            _uncompiled.add(key)
            print(
                f"codistill: continuing without compilation of the loss, in which PyTorch failed: {failure}",
                file=sys.stderr,
            )
    return solve_block(logits, labels_R1, *rest)


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    allow_variants()  # each structure of members and edges that weigh something is one
    # Everything in one loop over the logits, however often a softmax is read: faster than the compiler's own choice of
    # what to keep, and PyTorch 2.15 fails on what it would keep where a trained member only teaches.
    one_loop: dict[str, str | int | bool | Callable] = {
        "realize_reads_threshold": 1000,
        "realize_opcount_threshold": 1000,
    }
    return torch.compile(solve_block, fullgraph=True, options=one_loop)


def solve_block(
    logits: Sequence[Tensor],
    labels_R1: Tensor,
    scale_R1: Tensor,
    bias: Sequence[Tensor | None],
    hard_weight_M: Tensor,
    edge_weight_E: Tensor,
    structure: _Structure,
) -> tuple[Tensor, Tensor, Tensor]:
    """(hard (M, R), soft (E, R), the gradients at the labels (trained, R)); the rest of each trained member's gradient
    replaces its logits (R, V)."""
    biased = [z_RV if b_V is None else z_RV + b_V for z_RV, b_V in zip(logits, bias, strict=True)]
    softmaxes = _softmaxes(biased, structure.edges)
    hard_MR = torch.stack([-softmaxes[m, 1.0][0].gather(1, labels_R1)[:, 0] for m in range(len(biased))])
    gradients = {m: softmaxes[m, 1.0][1] * (scale_R1 * hard_weight_M[m]) for m in structure.trained}
    soft = []
    for e, edge in enumerate(structure.edges):
        loss_R, slope_RV = _divergence(edge, biased, softmaxes)
        soft.append(loss_R)
        if edge.student in gradients:
            gradients[edge.student] = gradients[edge.student] + slope_RV * (scale_R1 * edge_weight_E[e])
    at_label = []
    is_label_RV = torch.arange(logits[0].shape[1], device=labels_R1.device)[None] == labels_R1
    for m, gradient_RV in gradients.items():
        at_label.append((gradient_RV.gather(1, labels_R1) - scale_R1 * hard_weight_M[m])[:, 0])
        logits[m].copy_(torch.where(is_label_RV, 0.0, gradient_RV))
    return hard_MR, _stacked(soft, scale_R1), _stacked(at_label, scale_R1)


def _softmaxes(biased: Sequence[Tensor], edges: Sequence[_Edge]) -> dict[tuple[int, float], Softmax]:
    """Of every member and temperature, once: the compiler does not see that two reductions are the same."""
    wanted = [(m, 1.0) for m in range(len(biased))]
    soft = [edge for edge in edges if edge.divergence != "squared_error"]
    wanted += [(m, edge.temperature) for edge in soft for m in (edge.student, edge.teacher)]
    found = {}
    for m, temperature in dict.fromkeys(wanted):
        log_p_RV = torch.log_softmax(biased[m] if temperature == 1 else biased[m] / temperature, -1)
        found[m, temperature] = log_p_RV, log_p_RV.exp()
    return found


def _divergence(
    edge: _Edge, biased: Sequence[Tensor], softmaxes: dict[tuple[int, float], Softmax]
) -> tuple[Tensor, Tensor]:
    """(row losses (R,), τ² included; their slopes at the student's logits (R, V))."""
    if edge.divergence == "squared_error":
        change_RV = biased[edge.student] - biased[edge.teacher]
        return change_RV.square().mean(-1), change_RV * (2 / change_RV.shape[1])
    student, teacher = (softmaxes[m, edge.temperature] for m in (edge.student, edge.teacher))
    of = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jensen_shannon": _jensen_shannon}
    loss_R1, slope_RV = of[edge.divergence](student, teacher)
    return loss_R1[:, 0] * edge.temperature**2, slope_RV * edge.temperature


def _forward_kl(student: Softmax, teacher: Softmax) -> tuple[Tensor, Tensor]:
    (log_p, p), (log_t, t) = student, teacher
    return (t * (log_t - log_p) + (p - t)).sum(-1, keepdim=True), p - t


def _reverse_kl(student: Softmax, teacher: Softmax) -> tuple[Tensor, Tensor]:
    (log_p, p), (log_t, t) = student, teacher
    terms = p * (log_p - log_t)
    loss_R1 = (terms - p + t).sum(-1, keepdim=True)
    return loss_R1, terms - p * loss_R1


def _jensen_shannon(student: Softmax, teacher: Softmax) -> tuple[Tensor, Tensor]:
    (log_p, p), (log_t, t) = student, teacher
    log_m = torch.logaddexp(log_p, log_t) - math.log(2)
    m = log_m.exp()
    from_teacher_R1 = (t * (log_t - log_m) - t + m).sum(-1, keepdim=True)
    terms = p * (log_p - log_m)
    from_student_R1 = (terms - p + m).sum(-1, keepdim=True)
    return (from_student_R1 + from_teacher_R1) / 2, (terms - p * from_student_R1) / 2


def _structure(problem: Problem, heads: dict[str, Head | GivenHead]) -> _Structure:
    place = {member: index for index, member in enumerate(heads)}
    edges = [_Edge(place[e.teacher], place[e.student], e.temperature, str(e.divergence)) for e in problem.edges]
    return _Structure(tuple(place[m] for m, head in heads.items() if head.trained), tuple(edges))


def _scalars(values: Sequence[float | Tensor], like: Tensor) -> Tensor:
    """One tensor of all: a number that varies with the step would be compiled anew."""
    found = [torch.as_tensor(value, dtype=like.dtype, device=like.device) for value in values]
    return torch.stack(found) if found else like.new_empty(0)


def _stacked(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(tensors)) if tensors else like.new_empty(0, len(like))
