"""Members and distillation edges, and one exact training step for all of them: the heart of codistill.

    cohort = Cohort(
        [Member("large", large, optimizer=adamw), Member("small", small, optimizer=adamw2)],
        [Distillation("large", "small"), Distillation("small", "large", weight=linear)],
    )
    metrics = cohort.step(0, micro_batches)

Every method of the field is a choice of members and edges (docs/concepts.md). Shape suffixes: N predicted rows,
D width of a member, M trained members.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from codistill.distributed import ALONE, Ranks
from codistill.kernels import CohortLoss, Edge, linear_cohort_loss
from codistill.members import Predictor
from codistill.objectives import Batch
from codistill.schedules import Schedule, constant
from codistill.seeds import seed_of
from codistill.watch import Failure, Watch


@dataclass
class Member:
    """A node: a model, trained if it has an optimizer and frozen if it has none.

    Any optimizer will do; with one of PyTorch's made with `fused=True` a step never waits for the device.
    `lr` and `hard_weight` are functions of the step; `clip` bounds the gradient's norm; dropout noise is keyed by
    `noise_key`, by default the name, so that it does not depend on who else is in the cohort.
    """

    name: str
    predictor: Predictor
    optimizer: Optimizer | None = None
    lr: Schedule = constant(1e-3)
    hard_weight: Schedule = constant(1.0)
    clip: float = 1.0
    noise_key: str = ""
    parameters: list[Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.noise_key = self.noise_key or self.name
        self.predictor.train(self.is_trained).requires_grad_(self.is_trained)
        self.parameters = list(self.predictor.parameters())

    @property
    def is_trained(self) -> bool:
        """Whether the member learns."""
        return self.optimizer is not None


@dataclass(frozen=True)
class Distillation:
    """An edge: `teacher` teaches `student`, whose loss gains weight · τ² · divergence(student, teacher detached)."""

    teacher: str
    student: str
    divergence: str = "forward_kl"
    weight: Schedule = constant(1.0)
    temperature: float = 1.0


class Cohort:
    """Members that see the same batches, and who learns from whom.

    `precision` is the dtype of the backbones' matrix products: torch.float32, or torch.bfloat16 under autocast;
    parameters, logits and losses are float32 either way. A step in which a loss or gradient is not finite changes no
    parameter; with `skip_non_finite` the next one goes on, without it no later step changes any either. With several
    `ranks`, each is given its own share of the micro-batches, and the step is that of one process with all of them.
    """

    def __init__(
        self,
        members: Sequence[Member],
        distillation: Sequence[Distillation] = (),
        *,
        seed: int = 0,
        precision: torch.dtype = torch.float32,
        skip_non_finite: bool = False,
        ranks: Ranks = ALONE,
    ):
        self.members = {member.name: member for member in members}
        self.distillation = list(distillation)
        self.seed, self.precision, self.ranks = seed, precision, ranks
        self.trained = [member for member in members if member.is_trained]
        self.device = self.trained[0].parameters[0].device
        self._watch = Watch([member.name for member in self.trained], self.device, skip_non_finite)

    def step(self, step: int, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        """One update of every trained member, all from the parameters before the step; returns device scalars.

        The loss is the mean over the predicted rows of all micro-batches on all ranks. Metrics: `NAME/hard` and
        `NAME/from_TEACHER` (nats, unweighted), `NAME/grad_norm` (before clipping). Never waits for the device.
        """
        metrics = self.gradients(step, micro_batches)
        return metrics | self._update(step, metrics)

    def gradients(self, step: int, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        """The part of `step` before the update: adds to every trained member's gradients; returns the losses."""
        edges = [edge for edge in self._edges(step) if edge.weight != 0]
        taking_part = [m for m in self.members.values() if m.is_trained or any(m.name == e.teacher for e in edges)]
        (denominator,) = self.ranks.sum([_num_rows(micro_batches, self.device)])
        losses = []
        for index, batch in enumerate(micro_batches):
            features = {m.name: self._features(m, batch, step, index) for m in taking_part}
            losses.append(self._loss(features, batch, step, edges, denominator))
            self._backward(losses[-1].total, is_last=index == len(micro_batches) - 1)
        metrics = _summed(losses, edges)
        return dict(zip(metrics, self.ranks.sum(list(metrics.values())), strict=True))

    def weight_norms(self) -> dict[str, Tensor]:
        """`NAME/weight_norm` of every trained member: the norm of all its parameters, as device scalars."""
        norms = self.ranks.norms([m.parameters for m in self.trained])
        return {f"{m.name}/weight_norm": norm for m, norm in zip(self.trained, norms, strict=True)}

    def failure(self) -> Failure | None:
        """What went wrong, if updates are suppressed; waits for the device, so ask when logging."""
        return self._watch.failure()

    def num_skipped(self) -> int:
        """How many steps were skipped because something in them was not finite; waits for the device."""
        return int(self._watch.skipped)

    # ---- the parts of a step ---------------------------------------------------------------------

    def _edges(self, step: int) -> list[Edge]:
        return [Edge(d.teacher, d.student, d.weight(step), d.temperature, d.divergence) for d in self.distillation]

    def _features(self, member: Member, batch: Batch, step: int, micro_batch: int) -> Tensor:
        """(N, D) features of the predicted rows; the noise is a function of (seed, step, micro-batch, rank, name)."""
        if member.is_trained:
            _seed_noise(self.device, seed_of(self.seed, "noise", step, micro_batch, self.ranks.rank, member.noise_key))
        with torch.set_grad_enabled(member.is_trained), self._autocast():
            return member.predictor(batch.inputs, batch.rows_N)

    def _loss(
        self, features: Mapping[str, Tensor], batch: Batch, step: int, edges: Sequence[Edge], denominator: Tensor
    ) -> CohortLoss:
        members = [self.members[name] for name in features]
        with self._autocast():
            return linear_cohort_loss(
                features,
                {m.name: m.predictor.output_weight for m in members},
                {m.name: m.predictor.output_bias for m in members},
                batch.labels_N,
                hard_weight={m.name: m.hard_weight(step) if m.is_trained else 0.0 for m in members},
                edges=edges,
                row_weight=batch.row_weight_N,
                denominator=denominator,
                vocabulary=members[0].predictor.vocabulary,
            )

    def _backward(self, total: Tensor, *, is_last: bool) -> None:
        """Adds to the gradients; with the last micro-batch's they become those of all ranks."""
        self.ranks.before_backward([m.predictor for m in self.trained], is_last=is_last)
        total.backward()
        if is_last:
            self.ranks.reduce([m.parameters for m in self.trained])
            self.ranks.release([m.predictor for m in self.members.values() if not m.is_trained])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def _update(self, step: int, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Clips and steps every trained member, unless anything in this or an earlier step was not finite."""
        norms = self.ranks.clip([(m.parameters, m.clip) for m in self.trained])
        suppressed = self._watch.observe(step, [metrics[f"{m.name}/hard"] for m in self.trained], norms)
        for member in self.trained:
            _step_optimizer(member, member.lr(step), suppressed)
        return {f"{m.name}/grad_norm": norm for m, norm in zip(self.trained, norms, strict=True)}


def _seed_noise(device: torch.device, seed: int) -> None:
    # `torch.manual_seed` would also format a stack trace for every kind of device that is not there, each time.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)


def _step_optimizer(member: Member, lr: float, suppressed: Tensor) -> None:
    assert member.optimizer is not None
    for group in member.optimizer.param_groups:
        group["lr"] = lr
    if all(group.get("fused") for group in member.optimizer.param_groups):
        # PyTorch's fused optimizers skip the update on the device where `found_inf` is 1, as for a gradient scaler.
        member.optimizer.found_inf = suppressed  # type: ignore[attr-defined]
        member.optimizer.step()
    elif not bool(suppressed):  # any other optimizer has to be asked from the host, which waits for the device
        member.optimizer.step()
    member.optimizer.zero_grad(set_to_none=True)


def _num_rows(micro_batches: Sequence[Batch], device: torch.device) -> Tensor:
    full = sum(len(batch.labels_N) for batch in micro_batches if batch.row_weight_N is None)
    weights = [batch.row_weight_N.sum() for batch in micro_batches if batch.row_weight_N is not None]
    return torch.full((), full, dtype=torch.float32, device=device) + sum(weights)


def _summed(losses: Sequence[CohortLoss], edges: Sequence[Edge]) -> dict[str, Tensor]:
    metrics = {f"{name}/hard": _sum([loss.hard[name] for loss in losses]) for name in losses[0].hard}
    for index, edge in enumerate(edges):
        metrics[f"{edge.student}/from_{edge.teacher}"] = _sum([loss.soft[index] for loss in losses])
    return metrics


def _sum(scalars: Sequence[Tensor]) -> Tensor:
    return scalars[0] if len(scalars) == 1 else torch.stack(list(scalars)).sum()
