"""One exact training step for members and the edges between them: the heart of codistill.

    cohort = Cohort(
        [Member("large", large, optimizer=adamw), Member("small", small, optimizer=adamw2)],
        [Distillation("large", "small"), Distillation("small", "large", weight=linear)],
    )
    metrics = cohort.step(0, micro_batches)

Every method of the field is a choice of members and edges (docs/concepts.md). Shape suffixes: N predicted rows,
D width of a member, M trained members.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from codistill.distributed import ALONE, Ranks
from codistill.edges import Distillation
from codistill.errors import UserError
from codistill.families import is_causal, known_objective
from codistill.families.ahead import why
from codistill.kernels import CohortLoss, Edge, SparseLogits, linear_cohort_loss, linear_cohort_regression
from codistill.machine import autocast
from codistill.member import Member
from codistill.objectives import Batch
from codistill.relations import Relations, Weighted
from codistill.schedules import value_at
from codistill.seeds import seed_of
from codistill.watch import Failure, Watch


class Cohort:
    """Members that see the same batches, and who learns from whom.

    `precision` is the dtype of the backbones' matrix products: torch.float32, or torch.bfloat16 under autocast;
    parameters, logits and losses are float32 either way. A step in which a loss or gradient is not finite changes no
    parameter; with `skip_non_finite` the next one goes on, without it no later step changes any either. With several
    `ranks`, each is given its own share of the micro-batches, and the step is that of one process with all of them.
    `compiled`: the loss between logits is fused by PyTorch's compiler, on a CPU (models compile in place with
    `model.base_model.compile()`). `seed` keys dropout and the projections' initial values: PyTorch's global generator
    is seeded with these in every step, so whatever else draws needs one of its own. Raises UserError for members and
    edges that do not go together.
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
        compiled: bool = False,
    ):
        self.members = {member.name: member for member in members}
        self.seed, self.precision, self.ranks, self.compiled = seed, precision, ranks, compiled
        self.trained = [member for member in members if member.is_trained]
        _check_precision(precision)
        _check(members, distillation, ranks)
        self._language_models = {m.name: m.predictor for m in members if not m.predictor.is_from_module}
        self._causal = _causal({name: predictor.model for name, predictor in self._language_models.items()})
        predictors = {member.name: member.predictor for member in members}
        self._relations = Relations(distillation, predictors, {m.name: m.noise_key for m in members}, seed)
        self.distillation = self._relations.edges
        for name, projections in self._relations.projections.items():
            for projection in projections.values():
                ranks.place(projection)
            self.members[name].train_too(projections)
        self.device = self.trained[0].parameters[0].device
        self._watch = Watch([member.name for member in self.trained], self.device, skip_non_finite)

    def step(self, step: int, micro_batches: Batch | Sequence[Batch]) -> dict[str, Tensor]:
        """One update of every trained member, all from the parameters before the step; returns device scalars.

        The loss is the mean over the predicted rows of all micro-batches on all ranks; of edges below the logits, over
        all positions that are not padding. Metrics: `NAME/hard`, `NAME/from_TEACHER` (nats),
        `NAME/hidden_from_TEACHER`, `NAME/relation_from_TEACHER`, all unweighted, and `NAME/grad_norm` (before
        clipping). Never waits for the device.
        """
        metrics = self.gradients(step, micro_batches)
        return metrics | self._update(step, metrics)

    def gradients(self, step: int, micro_batches: Batch | Sequence[Batch]) -> dict[str, Tensor]:
        """The part of `step` before the update: adds to every trained member's gradients; returns the losses."""
        micro_batches = [micro_batches] if isinstance(micro_batches, Batch) else micro_batches
        if not micro_batches or not all(isinstance(batch, Batch) for batch in micro_batches):
            raise UserError(
                f"step {step}: {type(micro_batches).__name__} of {len(micro_batches)} came in where a Batch or several "
                "are wanted; Batch.from_labels makes one of a dictionary with labels"
            )
        if any(batch.copies_inputs for batch in micro_batches):
            self._check_labels(step)
        if any(batch.shows_next for batch in micro_batches):
            self._check_sight(step)
        weights = [(edge, edge.weight_at(step)) for edge in self.distillation]
        # A weight that is a tensor may be on the device, and to ask whether it is 0 would wait for that.
        active = [(edge, weight) for edge, weight in weights if isinstance(weight, torch.Tensor) or weight != 0]
        counts = [_num_rows(micro_batches, self.device), *self._relations.count(micro_batches)]
        counts = self.ranks.sum(counts)
        losses = []
        for index, batch in enumerate(micro_batches):
            total, parts = self._losses(batch, step, index, active, counts)
            losses.append(parts)
            self._backward(total, is_last=index == len(micro_batches) - 1)
        metrics = {name: _sum([parts[name] for parts in losses]) for name in losses[0]}
        return dict(zip(metrics, self.ranks.sum(list(metrics.values())), strict=True))

    def _check_labels(self, step: int) -> None:
        """UserError where a causal model would learn from labels that stand at its own positions."""
        for member in self.trained:
            if member.name in self._causal and value_at(member.hard_weight, step) != 0:
                raise UserError(
                    f"step {step}: the labels are the inputs at the same positions, so {member.name!r} (causal) would "
                    "learn to copy; pass causal=True to Batch.from_labels, which takes the labels from one position on"
                )

    def _check_sight(self, step: int) -> None:
        """UserError where a language model sees the labels, which stand one after their rows."""
        for name, predictor in self._language_models.items():
            if predictor.looks_ahead:
                raise UserError(
                    f"step {step}: the labels are the tokens that come next, and {name!r} looks at these"
                    f"{why(predictor.model)}, so it would learn to copy; give a causal model, or mask what is predicted"
                )

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

    def _losses(
        self, batch: Batch, step: int, index: int, active: Sequence[Weighted], counts: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(the loss of a micro-batch, its parts by name)."""
        teachers = {edge.teacher for edge, _ in active}
        inner = [(edge, weight) for edge, weight in active if edge.kind != "logits"]
        of_logits = [(edge, weight) for edge, weight in active if edge.kind == "logits"]
        features, kept = {}, {}
        for member in self.members.values():
            if member.is_trained or member.name in teachers:
                with self._relations.picking_up(member.name, inner) as kept[member.name]:
                    features[member.name] = self._features(member, batch, step, index)
        # A frozen teacher of hidden states only needs no logits.
        silent = set(features) - {edge.teacher for edge, _ in of_logits} - {member.name for member in self.trained}
        features = {name: features_ND for name, features_ND in features.items() if name not in silent}
        edges = [Edge(e.teacher, e.student, weight, e.temperature, e.divergence) for e, weight in of_logits]
        loss = self._loss(features, batch, step, edges, counts[0])
        below = self._relations.losses(inner, kept, batch, counts[-1])
        parts = {f"{name}/hard": hard for name, hard in loss.hard.items()}
        parts |= {edge.name: soft for (edge, _), soft in zip(of_logits, loss.soft, strict=True)}
        parts |= {edge.name: soft.detach() for (edge, _), soft in zip(inner, below, strict=True)}
        return sum((weight * soft for (_, weight), soft in zip(inner, below, strict=True)), loss.total), parts

    def _features(self, member: Member, batch: Batch, step: int, micro_batch: int) -> Tensor | SparseLogits:
        """(N, D) features of the predicted rows, or what is cached in their place.

        The noise is a function of (seed, step, micro-batch, rank, name).
        """
        if member.name in batch.cached:
            self.ranks.gather(member.predictor)
            return batch.cached[member.name]
        if member.is_trained:
            _seed_noise(self.device, seed_of(self.seed, "noise", step, micro_batch, self.ranks.rank, member.noise_key))
        elif any(part.training for part in member.predictor.modules()):  # a loop that says `teacher.train()`
            member.predictor.eval()
        with torch.set_grad_enabled(member.is_trained), autocast(self.device.type, self.precision):
            features_ND = member.predictor(batch.inputs, batch.rows_N)
        if member.is_trained and not features_ND.requires_grad:
            _check_reached(member)
        return features_ND

    def _loss(
        self,
        features: Mapping[str, Tensor | SparseLogits],
        batch: Batch,
        step: int,
        edges: Sequence[Edge],
        denominator: Tensor,
    ) -> CohortLoss:
        members = [self.members[name] for name, given in features.items() if not isinstance(given, SparseLogits)]
        loss_of: Callable[..., CohortLoss] = partial(
            linear_cohort_loss, vocabulary=members[0].predictor.vocabulary, compiled=self.compiled
        )
        if batch.labels_N.is_floating_point():
            loss_of = linear_cohort_regression
        with autocast(self.device.type, self.precision):
            return loss_of(
                features,
                {m.name: m.predictor.output_weight for m in members},
                {m.name: m.predictor.output_bias for m in members},
                batch.labels_N,
                hard_weight={m.name: value_at(m.hard_weight, step) if m.is_trained else 0.0 for m in members},
                edges=edges,
                row_weight=batch.row_weight_N,
                denominator=denominator,
            )

    def _backward(self, total: Tensor, *, is_last: bool) -> None:
        """Adds to the gradients; with the last micro-batch's they become those of all ranks."""
        self.ranks.before_backward([module for m in self.trained for module in m.modules], is_last=is_last)
        total.backward()
        if is_last:
            self.ranks.reduce([m.parameters for m in self.trained])
            self.ranks.release([m.predictor for m in self.members.values() if not m.is_trained])

    def _update(self, step: int, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Clips and steps every trained member, unless anything in this or an earlier step was not finite."""
        norms = self.ranks.clip([(m.parameters, m.clip) for m in self.trained])
        suppressed = self._watch.observe(step, [metrics[f"{m.name}/hard"] for m in self.trained], norms)
        for member in self.trained:
            for optimizer in member.optimizers:
                _step_optimizer(optimizer, None if member.lr is None else value_at(member.lr, step), suppressed)
        return {f"{m.name}/grad_norm": norm for m, norm in zip(self.trained, norms, strict=True)}


def _seed_noise(device: torch.device, seed: int) -> None:
    # `torch.manual_seed` would also format a stack trace for every kind of device that is not there, each time.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)


def _step_optimizer(optimizer: Optimizer, lr: float | None, suppressed: Tensor) -> None:
    if lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = lr
    if all(group.get("fused") for group in optimizer.param_groups):
        # PyTorch's fused optimizers skip the update on the device where `found_inf` is 1, as for a gradient scaler.
        optimizer.found_inf = suppressed  # type: ignore[attr-defined]
        optimizer.step()
    elif not bool(suppressed):  # any other optimizer has to be asked from the host, which waits for the device
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _check_reached(member: Member) -> None:
    """UserError where features without a gradient leave parameters behind them untrained."""
    head = {id(member.predictor.output_weight), id(member.predictor.output_bias)}
    left = [name for name, p in member.predictor.named_parameters() if p.requires_grad and id(p) not in head]
    if left:
        raise UserError(
            f"member {member.name!r}: its features have no gradient, so {left[0]} ({len(left)} such) would not learn; "
            "compute them outside torch.no_grad and detach nothing, or freeze these parameters (requires_grad = False)"
        )


def _num_rows(micro_batches: Sequence[Batch], device: torch.device) -> Tensor:
    full = sum(len(batch.labels_N) for batch in micro_batches if batch.row_weight_N is None)
    weights = [batch.row_weight_N.sum() for batch in micro_batches if batch.row_weight_N is not None]
    return torch.full((), full, dtype=torch.float32, device=device) + sum(weights)


def _sum(scalars: Sequence[Tensor]) -> Tensor:
    return scalars[0] if len(scalars) == 1 else torch.stack(list(scalars)).sum()


def _causal(whole: dict[str, nn.Module]) -> list[str]:
    """Names of the causal ones of the language models; UserError where known masked ones are among them too."""
    kinds = {known_objective(model): name for name, model in reversed(whole.items())}
    if "mlm" in kinds and "clm" in kinds:
        raise UserError(
            f"members: {kinds['mlm']!r} is a masked LM and {kinds['clm']!r} a causal one; they predict different rows "
            "of different inputs, so give each kind a cohort of its own"
        )
    return [name for name, model in whole.items() if is_causal(model)]


def _check_precision(precision: torch.dtype) -> None:
    if precision not in (torch.float32, torch.bfloat16):
        raise UserError(
            f"precision: {precision!r}; wanted torch.float32 or torch.bfloat16, which the models' products are in"
        )


def _check(members: Sequence[Member], edges: Sequence[Distillation], ranks: Ranks) -> None:
    names = [member.name for member in members]
    trained = [member.name for member in members if member.is_trained]
    if not trained:
        raise UserError("members: none is trained, so nothing would learn; give at least one an optimizer")
    if len(set(names)) < len(names):
        raise UserError(f"members: {', '.join(names)}; give each a name of its own")
    sizes = {member.name: member.predictor.vocabulary for member in members}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"members: their predictors have different vocabularies ({said}); give all the same")
    owner: dict[int, str] = {}
    for member in members:
        for parameter in member.predictor.parameters():
            if (other := owner.setdefault(id(parameter), member.name)) != member.name:
                raise UserError(
                    f"members: {other!r} and {member.name!r} share parameters; give each a model of its own"
                )
    for edge in edges:
        for name in (edge.teacher, edge.student):
            if name not in names:
                raise UserError(
                    f"edge {edge.teacher!r} -> {edge.student!r}: no member {name!r}; there are {', '.join(names)}"
                )
        if edge.student not in trained:
            raise UserError(
                f"edge {edge.teacher!r} -> {edge.student!r}: {edge.student!r} is frozen and cannot learn; leave it out"
            )
        if edge.kind == "relation" and ranks.engine == "fsdp2":
            raise UserError(f"edge {edge.teacher!r} -> {edge.student!r}: relation edges need ddp or single, not fsdp2")
    kinds = [edge.name for edge in edges]
    if len(set(kinds)) < len(kinds):
        raise UserError(f"edges: {', '.join(kinds)}; keep one edge of each kind between two members")
