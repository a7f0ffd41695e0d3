"""Other libraries' steps in `codistill bench step`, written as their documentation has it; each is optional.

The forward passes (but pytorch-dml's) and the losses are the library's; the backward pass, clipping and AdamW are those
of the plain loop, because their own training loops save checkpoints, wait for the device at every step, or do not clip.
Shape suffixes: B sequences, T position, N predicted rows, V vocabulary.
"""

import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from codistill.bench.step_providers import Loop, plain_update
from codistill.build import Built, build
from codistill.config import DistillationConfig, Run
from codistill.errors import UserError
from codistill.families import is_causal, split
from codistill.machine import autocast
from codistill.models import call_options
from codistill.objectives import IGNORED, Batch
from codistill.schedules import value_at


def textbrewer(run: Run, device: torch.device) -> Loop:
    """TextBrewer's GeneralDistiller; raises UserError for more than one student of one frozen teacher.

    Its loss is the cross-entropy with the teacher's distribution, which has the KL's gradient, without the factor τ²:
    that goes into its weight.
    """
    edge = _only_edge(run)
    import textbrewer as tb

    built = _built(run, device)
    student = built.models[edge.student]

    def adaptor(batch: dict, outputs: Any) -> dict:
        mask_BT = _predicted(batch["labels"], is_causal(student))
        return {"logits": outputs.logits.float(), "logits_mask": mask_BT, "losses": outputs.loss}

    weights = tb.DistillationConfig(temperature=edge.temperature, kd_loss_type="ce")
    # Nothing is written, but it makes a folder.
    folder = tb.TrainingConfig(device=device, output_dir=tempfile.gettempdir())
    distiller = tb.GeneralDistiller(folder, weights, built.models[edge.teacher], student, adaptor, adaptor)

    def loss(step: int, batch: Batch) -> Tensor:
        weights.hard_label_weight, soft = _weights(built, step)
        weights.kd_loss_weight = soft * edge.temperature**2
        return distiller.train_on_batch(_with_labels(batch, student), {})[0]

    return _loop(built, loss)


def modelopt(run: Run, device: torch.device) -> Loop:
    """Model Optimizer's `mtd.convert`; raises UserError for more than one student of one frozen teacher.

    Without its StaticLossBalancer, whose weights add up to 1; with a mask of the predicted rows in place of its default
    mean over all elements.
    """
    edge = _only_edge(run)
    import modelopt.torch.distill as mtd

    class OfOutputs(mtd.LogitsDistillationLoss):
        """The loss of two Hugging Face outputs."""

        def forward(self, student: Any, teacher: Any) -> Tensor:
            return super().forward(student.logits.float(), teacher.logits.float())

    built = _built(run, device)
    criterion = OfOutputs(temperature=edge.temperature, reduction="none")
    config = {"teacher_model": built.models[edge.teacher], "criterion": criterion}
    both = mtd.convert(built.models[edge.student], mode=[("kd_loss", config)])

    def loss(step: int, batch: Batch) -> Tensor:
        hard, soft = _weights(built, step)
        inputs = _with_labels(batch, both)
        mask_BT = _predicted(inputs["labels"], is_causal(both))
        outputs = both(**inputs)
        return hard * outputs.loss + soft * both.compute_kd_loss(loss_reduction_fn=lambda kl_BT: kl_BT[mask_BT].mean())

    return _loop(built, loss)


def pytorch_dml(run: Run, device: torch.device) -> Loop:
    """The loss of pytorch-dml's DMLTrainer, on models wrapped to give logits of the predicted rows.

    Raises UserError unless all members are trained and teach one another with the same weights: it has one weight for
    all, and divides it by a model's number of teachers.
    """
    edge = _mutual_edge(run)
    from pydml import DMLConfig, DMLTrainer

    built = _built(run, device)
    models = [_OnRows(model) for model in built.models.values()]
    weights = DMLConfig(temperature=edge.temperature)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Could not validate output dimensions")  # it tries images on the models
        trainer = DMLTrainer(models, config=weights, device=str(device))

    def loss(step: int, batch: Batch) -> Tensor:
        weights.supervised_weight, soft = _weights(built, step)
        weights.mimicry_weight = soft * (len(models) - 1)
        losses = trainer.compute_collaborative_loss([model(batch) for model in models], batch.labels_N)
        return sum(losses.values(), batch.labels_N.new_zeros((), dtype=torch.float32))

    return _loop(built, loss)


class _OnRows(nn.Module):
    """A model that takes a `Batch` and gives (N, V) logits of its predicted rows."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model, self._features = model, split(model).features

    def forward(self, batch: Batch) -> Tensor:
        if not isinstance(batch, Batch):
            raise ValueError(f"{type(batch).__name__}; wanted a Batch")  # what DMLTrainer expects of a wrong guess
        return self.model.get_output_embeddings()(self._features(batch.inputs, batch.rows_N)).float()


# ---- what they share ---------------------------------------------------------------------------


def _built(run: Run, device: torch.device) -> Built:
    built = build(run, device)
    for model in built.models.values():
        model.set_attn_implementation("sdpa")
    return built


def _loop(built: Built, loss: Callable[[int, Batch], Tensor]) -> Loop:
    precision, device = built.cohort.precision, built.cohort.device

    def gradients(step: int, micro_batches: Any) -> None:
        for batch in micro_batches:
            with autocast(device.type, precision):
                total = loss(step, batch)
            (total / len(micro_batches)).backward()

    models = {member.name: built.models[member.name] for member in built.cohort.trained}
    return Loop(models, gradients, plain_update(built.cohort))


def _weights(built: Built, step: int) -> tuple[float, float]:
    """(of the hard loss, of the soft loss), which all members and edges have alike."""
    hard, soft = value_at(built.cohort.trained[0].hard_weight, step), built.cohort.distillation[0].weight_at(step)
    return float(hard), float(soft)


def _with_labels(batch: Batch, model: PreTrainedModel) -> dict:
    """What Hugging Face's collators give: labels (B, T), those of a causal model at their own positions."""
    ids_BT = batch.inputs["input_ids"]
    labels_BT = torch.full_like(ids_BT, IGNORED).flatten().scatter(0, batch.rows_N, batch.labels_N).view_as(ids_BT)
    if is_causal(model):
        labels_BT = nn.functional.pad(labels_BT[:, :-1], (1, 0), value=IGNORED)
    return {**batch.inputs, "labels": labels_BT, **call_options(model)}


def _predicted(labels_BT: Tensor, causal: bool) -> Tensor:
    """Whether a position's logits predict something."""
    if causal:
        labels_BT = nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
    return labels_BT != IGNORED


def _only_edge(run: Run) -> DistillationConfig:
    edges = _of_forward_kl(run)
    if len(run.trained) != 1 or len(edges) != 1:
        raise UserError("it trains one student of one frozen teacher, and nothing else")
    return edges[0]


def _mutual_edge(run: Run) -> DistillationConfig:
    edges, members = _of_forward_kl(run), run.members
    all_pairs = {(teacher, student) for teacher in members for student in members if teacher != student}
    if not edges or {(e.teacher, e.student) for e in edges} != all_pairs:
        raise UserError("it trains models that all teach one another, and nothing else")
    alike = all((e.weight, e.temperature) == (edges[0].weight, edges[0].temperature) for e in edges)
    if not alike or any(m.hard_weight != next(iter(members.values())).hard_weight for m in members.values()):
        raise UserError("it has one temperature and two weights, which all its models share")
    return edges[0]


def _of_forward_kl(run: Run) -> list[DistillationConfig]:
    if any((edge.kind, edge.divergence) != ("logits", "forward_kl") for edge in run.distillation):
        raise UserError("compared here by the forward KL of logits only")
    return run.distillation
