"""Who trains two models in `codistill bench step`: ours, and the plain loops that people write.

Every loop trains with the same batches, hard and soft losses, clipping and AdamW. Shape suffixes: B sequences,
T position, N predicted rows, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import AdamW
from transformers import PreTrainedModel

from codistill.build import Built, build
from codistill.cohort import Cohort
from codistill.config import Run
from codistill.families import split
from codistill.kernels import Edge
from codistill.machine import autocast
from codistill.objectives import Batch
from codistill.schedules import value_at


@dataclass
class Loop:
    """One way to train: `gradients` adds to the parameters of `models`, `update` uses and clears them."""

    models: Mapping[str, PreTrainedModel]
    gradients: Callable[[int, Sequence[Batch]], object]
    update: Callable[[int], None]

    def step(self, step: int, micro_batches: Sequence[Batch]) -> None:
        self.gradients(step, micro_batches)
        self.update(step)


def ours(run: Run, device: torch.device) -> Loop:
    """`Cohort.step` of the run."""
    return _of_cohort(build(run, device))


def ours_compiled(run: Run, device: torch.device) -> Loop:
    """The same with `compile: true`."""
    return _of_cohort(build(replace(run, compile=True), device))


def ours_apart(run: Run, device: torch.device) -> Loop:
    """A cohort of its own for every trained member, one after the other: the price of two. Not the same loss."""
    trained = [name for name, member in run.members.items() if not member.frozen]
    loops = [
        _of_cohort(build(replace(run, members={name: run.members[name]}, distillation=[]), device)) for name in trained
    ]

    def gradients(step: int, micro_batches: Sequence[Batch]) -> None:
        for loop in loops:
            loop.gradients(step, micro_batches)
            loop.update(step)  # before the next one's forward pass: that is what two runs would do

    return Loop({name: loop.models[name] for name, loop in zip(trained, loops, strict=True)}, gradients, lambda _: None)


def plain(
    *, all_rows: bool = False, compiled: bool = False, liger: bool = False
) -> Callable[[Run, torch.device], Loop]:
    """The loop one writes by hand: Hugging Face models as they come, log-softmaxes, AdamW for each.

    `all_rows`: logits of every position and ignored labels, as the models' own loss has it. `compiled`: torch.compile
    of each model's forward pass and of the loss. `liger`: liger-kernel's fused loss, once per edge.
    """

    def make(run: Run, device: torch.device) -> Loop:
        built = build(run, device)
        cohort, models = built.cohort, built.models
        for model in models.values():
            model.set_attn_implementation("sdpa")
        hidden = {name: _logits_at(model, all_rows, liger, compiled) for name, model in models.items()}
        loss = torch.compile(_plain_loss, dynamic=False) if compiled else _plain_loss
        trained = {m.name for m in cohort.trained}

        def gradients(step: int, micro_batches: Sequence[Batch]) -> None:
            edges = logit_edges(cohort, step)
            hard = {m.name: float(value_at(m.hard_weight, step)) for m in cohort.trained}
            for batch in micro_batches:
                with autocast(device.type, cohort.precision):
                    found = {}
                    for name, model_hidden in hidden.items():
                        with torch.set_grad_enabled(name in trained):
                            found[name] = model_hidden(batch)
                    labels = _all_labels(batch) if all_rows else batch.labels_N
                    total = (
                        _liger_loss(cohort, found, labels, hard, edges) if liger else loss(found, labels, hard, edges)
                    )
                (total / len(micro_batches)).backward()

        return Loop(models, gradients, plain_update(cohort))

    return make


def plain_update(cohort: Cohort) -> Callable[[int], None]:
    """Clips, steps PyTorch's AdamW and clears, one trained member after the other."""
    optimizers = {m.name: _adamw(m.optimizers[0]) for m in cohort.trained}

    def update(step: int) -> None:
        for member in cohort.trained:
            torch.nn.utils.clip_grad_norm_(member.predictor.parameters(), member.clip)
            for group in optimizers[member.name].param_groups:
                group["lr"] = 0.0 if member.lr is None else value_at(member.lr, step)
            optimizers[member.name].step()
            optimizers[member.name].zero_grad(set_to_none=True)

    return update


def _of_cohort(built: Built) -> Loop:
    cohort = built.cohort
    metrics: dict[str, Tensor] = {}

    def gradients(step: int, micro_batches: Sequence[Batch]) -> None:
        metrics.update(cohort.gradients(step, micro_batches))

    return Loop(built.models, gradients, lambda step: (cohort._update(step, metrics), None)[1])


def _logits_at(model: PreTrainedModel, all_rows: bool, liger: bool, compiled: bool) -> Callable[[Batch], Tensor]:
    """(rows, V) logits, or with `liger` (rows, D) features, of the predicted rows, or of all positions."""
    features, output = split(model).features, model.get_output_embeddings()

    def on_rows(batch: Batch) -> Tensor:
        features_ND = features(batch.inputs, batch.rows_N)
        return features_ND if liger else output(features_ND)

    def on_all(batch: Batch) -> Tensor:
        return model(**batch.inputs).logits.flatten(0, 1)

    chosen = on_all if all_rows else on_rows
    if compiled:
        model.compile(dynamic=False)
        features = torch.compile(features, dynamic=False)
    return chosen


def logit_edges(cohort: Cohort, step: int) -> list[Edge]:
    """The cohort's edges between logits that weigh something at `step`."""
    weighed = [(e, e.weight_at(step)) for e in cohort.distillation if e.kind == "logits"]
    return [Edge(e.teacher, e.student, weight, e.temperature, e.divergence) for e, weight in weighed if weight != 0]


def _all_labels(batch: Batch) -> Tensor:
    labels_A = batch.labels_N.new_full((batch.inputs["input_ids"].numel(),), -100)
    return labels_A.scatter(0, batch.rows_N, batch.labels_N)


def _plain_loss(
    logits: Mapping[str, Tensor], labels: Tensor, hard: Mapping[str, float], edges: Sequence[Edge]
) -> Tensor:
    log_p = {name: functional.log_softmax(z.float(), -1) for name, z in logits.items()}
    predicted = labels != -100
    total = sum(weight * functional.nll_loss(log_p[name], labels) for name, weight in hard.items())
    for edge in edges:
        teacher, student = log_p[edge.teacher].detach(), log_p[edge.student]
        rows = functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
        total = total + edge.weight * (rows * predicted).sum() / predicted.sum()
    return total  # type: ignore[return-value]


def _liger_loss(cohort, features: Mapping[str, Tensor], labels: Tensor, hard: Mapping[str, float], edges) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def parts(name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        predictor = cohort.members[name].predictor
        bias = predictor.output_bias
        dtype = features[name].dtype
        return features[name], predictor.output_weight.to(dtype), None if bias is None else bias.to(dtype)

    total = labels.new_zeros((), dtype=torch.float32)
    for edge in edges:
        loss = LigerFusedLinearJSDLoss(hard[edge.student], float(edge.weight), beta=0.0, compiled=False)
        (x, w, b), (y, v, c) = parts(edge.student), parts(edge.teacher)
        c = None if c is None else c.detach()
        total = total + loss(x, w, y.detach(), v.detach(), labels, student_bias=b, teacher_bias=c)
    return total


def _adamw(ours: torch.optim.Optimizer) -> AdamW:
    """PyTorch's default AdamW over the groups of `ours`."""
    groups = [{k: g[k] for k in ("params", "weight_decay", "betas", "eps")} for g in ours.param_groups]
    return AdamW(groups, lr=0.0)
