"""What is asked of the vocabulary loss, checked: every implementation takes a `Problem` and may trust it.

Shape suffixes: N predicted rows, D width of a member, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from codistill.divergences import DIVERGENCES, Divergence
from codistill.errors import UserError


class Edge(NamedTuple):
    """`teacher` teaches `student`: adds weight · divergence(student, teacher detached) to the student's loss.

    `weight` is a float or a 0-d tensor; `temperature` > 0 is fixed; `divergence` is a key of
    `codistill.divergences.DIVERGENCES`, or a function of its type (plain autograd only: impl "reference").
    """

    teacher: str
    student: str
    weight: float | Tensor = 1.0
    temperature: float = 1.0
    divergence: str | Divergence = "forward_kl"


class SparseLogits(NamedTuple):
    """A teacher given by its log-probabilities on K tokens of every row: `ids` (N, K) int64, `log_p` (N, K) floating.
    Each other token has `log_rest` (N,). A token that stands twice in a row has the same value both times."""

    ids: Tensor
    log_p: Tensor
    log_rest: Tensor

    def rows(self, rows: slice, out_CV: Tensor) -> Tensor:
        """Fills `out_CV` with the log-probabilities of the named rows, which are logits too, and returns it."""
        out_CV.copy_(self.log_rest[rows, None])
        return out_CV.scatter_(1, self.ids[rows], self.log_p[rows].to(out_CV.dtype))


@dataclass(frozen=True)
class Problem:
    """Arguments of `linear_cohort_loss` after `checked`; `scale_N` is row weight ÷ denominator. `given` teachers have
    no head; their hard weight is 0."""

    given: Mapping[str, SparseLogits]
    hidden: Mapping[str, Tensor]
    weight: Mapping[str, Tensor | None]
    bias: Mapping[str, Tensor | None]
    labels_N: Tensor
    hard_weight: Mapping[str, float | Tensor]
    edges: tuple[Edge, ...]
    scale_N: Tensor
    vocabulary: int

    @property
    def members(self) -> list[str]:
        """In the order of their heads."""
        return [*self.hidden, *self.given]

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, losses and sums: float64 for float64 members, otherwise float32."""
        return self.scale_N.dtype


def is_fused(divergence: str | Divergence) -> bool:
    """Whether the chunked and Triton implementations know the divergence."""
    return isinstance(divergence, str)


def checked(
    features: Mapping[str, Tensor | SparseLogits],
    weight: Mapping[str, Tensor | None],
    bias: Mapping[str, Tensor | None],
    labels: Tensor,
    hard_weight: Mapping[str, float | Tensor],
    edges: Sequence[Edge],
    row_weight: Tensor | None,
    denominator: Tensor | None,
    vocabulary: int | None,
) -> Problem:
    """The problem, or UserError naming the first thing that is wrong with it."""
    given = {member: logits for member, logits in features.items() if isinstance(logits, SparseLogits)}
    hidden = {member: tensor for member, tensor in features.items() if isinstance(tensor, Tensor)}
    _check_members(hidden, weight, hard_weight)
    for member in hidden:
        _check_shapes(member, hidden[member], weight[member], bias.get(member), len(labels))
        _check_weight(f"hard_weight of {member!r}", hard_weight[member])
    if len({tensor.dtype == torch.float64 for tensor in hidden.values()}) > 1:
        raise UserError(f"hidden: {_types(hidden)}; float64 members and others cannot be mixed")
    for edge in edges:
        _check_edge(edge, features)
        if edge.student in given:
            raise UserError(f"edge {edge.teacher!r} -> {edge.student!r}: a student needs features, not sparse logits")
        if edge.teacher in given and edge.divergence == "squared_error":
            raise UserError(
                f"edge {edge.teacher!r} -> {edge.student!r}: squared_error compares logits, and sparse ones are "
                "log-probabilities; give features, or another divergence"
            )
    rows = _vocabulary(hidden, weight, vocabulary)
    check_labels(labels, rows)
    for member, logits in given.items():
        _check_sparse(member, logits, len(labels), rows)
    return Problem(
        given=given,
        hidden=hidden,
        weight={member: weight[member] for member in hidden},  # matched with the rest by position
        bias={member: bias.get(member) for member in hidden},
        labels_N=labels if labels.device.type == "cpu" else labels.clamp(0, rows - 1),
        hard_weight={**{member: _detached(hard_weight[member]) for member in hidden}, **dict.fromkeys(given, 0.0)},
        edges=tuple(edge._replace(weight=_detached(edge.weight)) for edge in edges),
        scale_N=_marked(_scale(hidden, labels, row_weight, denominator), labels, rows),
        vocabulary=rows,
    )


def check_labels(labels: Tensor, vocabulary: int) -> None:
    """UserError unless `labels` are int64 ids in [0, vocabulary). Values are looked at on the CPU only: on an
    accelerator, looking would stop the step until the device has caught up, and `_marked` tells instead."""
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise UserError(f"labels: {labels.dtype} of shape {tuple(labels.shape)}; wanted int64 of shape (rows,)")
    if labels.device.type == "cpu" and len(labels):
        low, high = labels.min().item(), labels.max().item()
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise UserError(f"labels: {wrong} is outside the vocabulary of {vocabulary}; use the members' tokenizer")


def _check_members(hidden: Mapping, weight: Mapping, hard_weight: Mapping) -> None:
    if not hidden:
        raise UserError("hidden: no members; wanted at least one")
    for name, given in (("weight", weight), ("hard_weight", hard_weight)):
        if set(given) != set(hidden):
            raise UserError(f"{name}: members {sorted(given)}, but hidden has {sorted(hidden)}; name the same in both")


def _check_shapes(member: str, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, rows: int) -> None:
    if weight is None:
        if hidden.dim() != 2 or len(hidden) != rows or not hidden.is_floating_point():
            raise UserError(
                f"member {member!r}: {hidden.dtype} logits {tuple(hidden.shape)} for {rows} labels; wanted floating "
                "(rows, vocabulary)"
            )
        return
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise UserError(
            f"member {member!r}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not multiply; "
            "wanted (rows, width) and (vocabulary, width)"
        )
    if hidden.shape[0] != rows:
        raise UserError(f"member {member!r}: {hidden.shape[0]} rows of features for {rows} labels; wanted as many")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(f"member {member!r}: bias {tuple(bias.shape)}; wanted ({len(weight)},)")
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise UserError(f"member {member!r}: {hidden.dtype} features and {weight.dtype} weight; wanted floating types")


def _check_sparse(member: str, logits: SparseLogits, rows: int, vocabulary: int) -> None:
    shapes = [tuple(tensor.shape) for tensor in logits]
    if logits.ids.dim() != 2 or shapes != [(rows, logits.ids.shape[1])] * 2 + [(rows,)]:
        raise UserError(f"member {member!r}: sparse logits of shapes {shapes}; wanted ids and log_p of {rows} rows")
    if (
        logits.ids.device.type == "cpu"
        and logits.ids.numel()
        and not 0 <= logits.ids.min() <= logits.ids.max() < vocabulary
    ):
        raise UserError(f"member {member!r}: sparse logits name a token outside the vocabulary of {vocabulary}")


def _check_edge(edge: Edge, members: Mapping) -> None:
    name = f"edge {edge.teacher!r} -> {edge.student!r}"
    if edge.teacher == edge.student:
        raise UserError(f"{name}: a member cannot teach itself; name two members")
    for member in (edge.teacher, edge.student):
        if member not in members:
            raise UserError(f"{name}: no member {member!r}; members are {', '.join(members)}")
    if not (math.isfinite(edge.temperature) and edge.temperature > 0):
        raise UserError(f"{name}: temperature {edge.temperature}; wanted a finite number above 0")
    if is_fused(edge.divergence) and edge.divergence not in DIVERGENCES:
        raise UserError(f"{name}: unknown divergence {edge.divergence!r}; known are {', '.join(DIVERGENCES)}")
    _check_weight(f"weight of {name}", edge.weight)


def _check_weight(name: str, value: float | Tensor) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise UserError(f"{name}: a tensor of shape {tuple(value.shape)}; wanted a number or a 0-d tensor")
        if value.device.type != "cpu":
            return  # looking would synchronise
    if not math.isfinite(value):
        raise UserError(f"{name}: {float(value)}; wanted a finite number")


def _vocabulary(hidden: Mapping[str, Tensor], weight: Mapping[str, Tensor | None], vocabulary: int | None) -> int:
    """Extra rows are only ever cut: nobody can say what a missing row would have predicted."""
    sizes = {member: hidden[member].shape[1] if tensor is None else len(tensor) for member, tensor in weight.items()}
    smallest = min(sizes, key=sizes.__getitem__)
    if vocabulary is None:
        largest = max(sizes, key=sizes.__getitem__)
        if sizes[largest] != sizes[smallest]:
            raise UserError(
                f"vocabulary: {largest!r} has {sizes[largest]} rows, {smallest!r} has {sizes[smallest]}; "
                "pass vocabulary=, the number of tokens, and rows beyond it are cut"
            )
        return sizes[smallest]
    if not 0 < vocabulary <= sizes[smallest]:
        raise UserError(f"vocabulary: {vocabulary}, but {smallest!r} has {sizes[smallest]} rows; it cannot be padded")
    return vocabulary


def _scale(
    hidden: Mapping[str, Tensor], labels: Tensor, row_weight: Tensor | None, denominator: Tensor | None
) -> Tensor:
    wide = any(tensor.dtype == torch.float64 for tensor in hidden.values())
    dtype = torch.float64 if wide else torch.float32
    if row_weight is None:
        row_weight = torch.ones(labels.shape, dtype=dtype, device=labels.device)
    if row_weight.shape != labels.shape:
        raise UserError(f"row_weight: shape {tuple(row_weight.shape)} for {len(labels)} rows; wanted one per row")
    row_weight = row_weight.detach().to(dtype)
    if denominator is None:
        denominator = row_weight.sum()
    return row_weight / denominator.detach().to(dtype).clamp_min(torch.finfo(dtype).tiny)


def _marked(scale_N: Tensor, labels_N: Tensor, vocabulary: int) -> Tensor:
    """On an accelerator, `scale_N` with NaN where the label is no token: a loss that is not finite stops the run, where
    such a label would teach a token that there is not, or read beyond the weight."""
    if labels_N.device.type == "cpu":
        return scale_N
    return scale_N.masked_fill((labels_N < 0) | (labels_N >= vocabulary), torch.nan)


def _types(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())


def _detached(value: float | Tensor) -> float | Tensor:
    return value.detach() if isinstance(value, Tensor) else value
