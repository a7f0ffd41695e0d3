"""Edges below the logits: hidden states and attention relations of chosen layers.

    hidden     Σ over pairs of layers   mean over positions of |x_student W − x_teacher|² / D_teacher
    relation   Σ over pairs of layers, over queries, keys and values A   mean over positions and heads of
               KL(softmax(A Aᵀ / √d)_teacher ‖ softmax(A Aᵀ / √d)_student)

Positions are those that are not padding, of all micro-batches and ranks. A softmax goes over the positions that one may
see: not padding, not of another document, and between causal models none that is later; what local layers do not see
counts all the same. Teachers are detached. Shape suffixes:
B sequences, T position, D width, H relation heads, E width of a relation head.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from codistill.config import Layers
from codistill.divergences import forward_kl
from codistill.edges import Distillation
from codistill.errors import UserError
from codistill.families import is_causal
from codistill.models import Predictor
from codistill.objectives import Batch
from codistill.seeds import seed_of
from codistill.taps import Kept, Tap, Taps

Weighted = tuple[Distillation, float]
Picked = Mapping[int, Tensor]  # as `codistill.taps.Kept` has of one tap


def hidden_error(student_BTD: Tensor, teacher_BTD: Tensor) -> Tensor:
    """(B, T) mean over the width of the squared difference, in at least float32; the teacher is detached."""
    dtype = torch.promote_types(student_BTD.dtype, torch.float32)
    return (student_BTD.to(dtype) - teacher_BTD.detach().to(dtype)).square().mean(-1)


def relation_kl(student_BTD: Tensor, teacher_BTD: Tensor, heads: int, seen: Tensor) -> Tensor:
    """(B, T) mean over `heads` relation heads of KL(teacher's relations ‖ student's) of each position, in nats.

    A head's relations of a position are the softmax over all positions of its scaled products with their vectors
    (MiniLMv2: Wang et al. 2021); the two widths may differ, `heads` divides both. `seen`: bool, broadcast
    to (B, 1, T, T), false for positions that are padding. The teacher is detached.
    """
    student, teacher = _relations(student_BTD, heads, seen), _relations(teacher_BTD.detach(), heads, seen)
    rows_N = forward_kl(student.flatten(0, 2), teacher.flatten(0, 2))
    return rows_N.view(student.shape[:3]).mean(1)


def _relations(vectors_BTD: Tensor, heads: int, seen: Tensor) -> Tensor:
    """(B, H, T, T) logits."""
    dtype = torch.promote_types(vectors_BTD.dtype, torch.float32)
    vectors_BHTE = vectors_BTD.to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2)
    logits = vectors_BHTE @ vectors_BHTE.transpose(2, 3) / vectors_BHTE.shape[-1] ** 0.5
    return logits.masked_fill(~seen, torch.finfo(dtype).min)


class Relations:
    """A cohort's edges below the logits: what they pick up where, their projections, their losses.

    `edges` are all of the cohort's, with the layers filled in. `projections[student]` are trained with the student;
    their initial values are a function of (seed, both members' keys, layers). Raises UserError for layers that do
    not exist, and heads that do not divide them.
    """

    def __init__(
        self, edges: Iterable[Distillation], predictors: Mapping[str, Predictor], keys: Mapping[str, str], seed: int
    ):
        edges = list(edges)
        inner = [edge for edge in edges if edge.kind != "logits"]
        names = dict.fromkeys(name for edge in inner for name in (edge.teacher, edge.student))
        models = {name: predictors[name].model for name in names}
        self._taps = {name: Taps(model, predictors[name].layers, name) for name, model in models.items()}
        self._is_causal = {name: is_causal(models[name]) for name in names}
        self.edges = [self._with_layers(edge) for edge in edges]
        self.projections: dict[str, nn.ModuleDict] = {edge.student: nn.ModuleDict() for edge in inner}
        for edge in self.edges:
            for name, (student, teacher) in _pairs(edge).items():
                self._taps[edge.student].check(student)
                self._taps[edge.teacher].check(teacher)
                if edge.kind == "relation":
                    self._check_heads(edge, student, teacher)
                else:
                    ends = keys[edge.student], keys[edge.teacher], student.layer, teacher.layer
                    self._add_projection(edge, name, models[edge.student], seed_of(seed, "projection", *ends))

    def picking_up(self, member: str, active: Sequence[Weighted]) -> AbstractContextManager[Kept]:
        """Inside, what the `active` edges need of `member` is kept."""
        taps = [tap for edge, _ in active for name, tap in _sides(edge) if name == member]
        return self._taps[member].open(dict.fromkeys(taps)) if taps else nullcontext({})

    def losses(
        self, active: Sequence[Weighted], kept: Mapping[str, Kept], batch: Batch, positions: Tensor | None
    ) -> list[Tensor]:
        """The loss of each edge on one micro-batch: a sum over its positions ÷ `positions`, all of them, unweighted."""
        if not active or positions is None:
            return []
        seen, valid_BT = _seen(batch)
        with torch.autocast(valid_BT.device.type, enabled=False):
            rows = [
                self._rows(edge, kept, _before(batch, seen) if self._is_causal[edge.student] else seen)
                for edge, _ in active
            ]
            return [(rows_BT * valid_BT).sum() / positions.clamp_min(1) for rows_BT in rows]

    def count(self, micro_batches: Iterable[Batch]) -> list[Tensor]:
        """How many positions are not padding, as one 0-d tensor; nothing where no edge asks."""
        return [torch.stack([_seen(batch)[1].sum() for batch in micro_batches]).sum()] if self._taps else []

    # ---- one edge --------------------------------------------------------------------------------

    def _rows(self, edge: Distillation, kept: Mapping[str, Kept], seen: Tensor) -> Tensor:
        """(B, T), summed over the pairs of layers."""
        of_kind = self._hidden if edge.kind == "hidden" else self._relation
        pairs = _pairs(edge).items()
        return sum(
            of_kind(edge, name, kept[edge.student][student], kept[edge.teacher][teacher], seen)
            for name, (student, teacher) in pairs
        )  # type: ignore[return-value]

    def _hidden(self, edge: Distillation, name: str, student: Picked, teacher: Picked, _: Tensor) -> Tensor:
        projections, state_BTD = self.projections[edge.student], student[0]
        if name in projections:
            projection = cast(nn.Linear, projections[name])
            state_BTD = projection(state_BTD.to(projection.weight.dtype))
        return hidden_error(state_BTD, teacher[0])

    def _relation(self, edge: Distillation, _: str, student: Picked, teacher: Picked, seen: Tensor) -> Tensor:
        heads = self._heads(edge)
        return sum(relation_kl(s, t, heads, seen) for s, t in ((student[i], teacher[i]) for i in range(3)))  # type: ignore[return-value]

    def _heads(self, edge: Distillation) -> int:
        return edge.relation_heads or self._taps[edge.student].heads

    def _check_heads(self, edge: Distillation, student: Tap, teacher: Tap) -> None:
        sides = (self._taps[edge.student], student), (self._taps[edge.teacher], teacher)
        for width in (width for taps, tap in sides for width in taps.widths(tap.layer)):
            if width % self._heads(edge):
                raise UserError(
                    f"edge {edge.teacher!r} -> {edge.student!r}: {self._heads(edge)} relation heads do not divide "
                    f"queries, keys or values {width} wide; give relation_heads"
                )

    def _with_layers(self, edge: Distillation) -> Distillation:
        if edge.kind == "logits" or edge.layers is not None:
            return edge
        student, teacher = (self._taps[name].count for name in (edge.student, edge.teacher))
        return replace(edge, layers=Layers(student=[student], teacher=[teacher]))

    def _add_projection(self, edge: Distillation, name: str, model: nn.Module, seed: int) -> None:
        width, wanted = self._taps[edge.student].width, self._taps[edge.teacher].width
        if width == wanted:
            return
        like = next(model.parameters())
        torch.manual_seed(seed)  # on the host, so that it is the same on every device
        projection = nn.Linear(width, wanted, bias=False, dtype=like.dtype, device="cpu")
        self.projections[edge.student][name] = projection.to(like.device)


def _pairs(edge: Distillation) -> dict[str, tuple[Tap, Tap]]:
    """(student's tap, teacher's tap) by the name of the projection between them."""
    if edge.layers is None:
        return {}
    return {
        f"{edge.teacher.replace('.', '_')}-{teacher}-{student}": (Tap(edge.kind, student), Tap(edge.kind, teacher))
        for student, teacher in zip(edge.layers.student, edge.layers.teacher, strict=True)
    }


def _sides(edge: Distillation) -> list[tuple[str, Tap]]:
    pairs = _pairs(edge).values()
    return [side for student, teacher in pairs for side in ((edge.student, student), (edge.teacher, teacher))]


def _seen(batch: Batch) -> tuple[Tensor, Tensor]:
    """(which positions see which, bool, broadcast to (B, 1, T, T); 1 for each that is not padding, float32 (B, T))."""
    ids_BT, mask = batch.inputs["input_ids"], batch.inputs.get("attention_mask")
    valid_BT = torch.ones(ids_BT.shape, device=ids_BT.device)
    if batch.lengths_B is not None:
        valid_BT *= torch.arange(ids_BT.shape[1], device=ids_BT.device) < batch.lengths_B[:, None]
    if mask is None:
        return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=ids_BT.device), valid_BT
    if mask.dim() == 2:
        return mask[:, None, None, :].bool(), valid_BT * mask
    return mask >= 0 if mask.is_floating_point() else mask.bool(), valid_BT


def _before(batch: Batch, seen: Tensor) -> Tensor:
    """`seen` without later positions, and without other documents where positions begin anew with each."""
    length = batch.inputs["input_ids"].shape[1]
    seen = seen & torch.ones(length, length, dtype=torch.bool, device=seen.device).tril()
    if "position_ids" not in batch.inputs:
        return seen
    number_BT = (batch.inputs["position_ids"] == 0).cumsum(1)
    return seen & (number_BT[:, None, :, None] == number_BT[:, None, None, :])
