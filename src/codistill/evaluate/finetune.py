"""Fine-tuning: a cohort of one on a classification or regression task, or of several with edges.

Shape suffixes: N examples, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from codistill import schedules
from codistill.build import adamw
from codistill.cohort import Cohort
from codistill.edges import Distillation
from codistill.evaluate.encode import Encoded, batch_of, prediction_order, training_order
from codistill.evaluate.protocol import RATE_TIMES_WIDTH_SQUARED, Protocol
from codistill.evaluate.sequences import SequencePredictor
from codistill.evaluate.spread import spread
from codistill.families import is_causal
from codistill.machine import autocast
from codistill.member import Member
from codistill.models import Predictor
from codistill.seeds import seed_of
from codistill.watch import NonFiniteError


class Teaching(NamedTuple):
    """An edge of a fine-tuning: both are trained on the same batches, and `student` also learns from `teacher`."""

    teacher: str
    student: str


@dataclass(frozen=True)
class Labelled:
    """A split as the model takes it, with int64 classes or float32 numbers."""

    encoded: Encoded
    label_N: np.ndarray

    def part(self, rows: np.ndarray) -> "Labelled":
        """Those rows only."""
        old = self.encoded
        types = None if old.types is None else [old.types[row] for row in rows]
        return Labelled(Encoded([old.ids[row] for row in rows], types, 0, old.pad), self.label_N[rows])


def learning_rate(model: PreTrainedModel) -> float:
    """The default: smaller for wider models."""
    return RATE_TIMES_WIDTH_SQUARED / model.config.hidden_size**2


def fine_tune(
    models: Mapping[str, PreTrainedModel],
    train: Labelled,
    outputs: int,
    protocol: Protocol,
    rates: Mapping[str, float],
    *,
    seed: int,
    precision: torch.dtype,
    edges: Sequence[Teaching] = (),
    advance: Callable[[int], None] = lambda examples: None,
    after_epoch: Callable[[Mapping[str, nn.Module]], None] | None = None,
) -> dict[str, SequencePredictor]:
    """Copies of `models` trained on `train` with a new head each; the same seed gives the same bits.

    Head, order and dropout depend on the seed only, so models are compared on the same batches. Raises NonFiniteError
    when a loss or gradient is not finite. `advance` is told how many examples each step took.
    """
    steps = num_steps(len(train.encoded), protocol)
    is_number = train.label_N.dtype == np.float32
    predictors = {name: _predictor(model, outputs, protocol, seed) for name, model in models.items()}
    members = [_member(name, predictor, protocol, rates[name], steps) for name, predictor in predictors.items()]
    divergence = "squared_error" if is_number else "forward_kl"
    weight = schedules.constant(protocol.edge_weight)
    taught = [Distillation(e.teacher, e.student, divergence, weight, protocol.temperature) for e in edges]
    cohort = Cohort(members, taught, seed=seed, precision=precision)
    step = 0
    for epoch in range(protocol.epochs):
        for rows in training_order(train.encoded.length_N, protocol.batch, seed, epoch)[: steps - step]:
            cohort.step(step, [batch_of(train.encoded, rows, train.label_N).to(cohort.device)])
            step += 1
            advance(len(rows))
        if failure := cohort.failure():
            raise NonFiniteError(str(failure))
        if after_epoch is not None:
            after_epoch(predictors)
    return predictors


def num_steps(examples: int, protocol: Protocol) -> int:
    """How many steps a fine-tuning on so many examples takes."""
    steps = protocol.epochs * ceil(examples / protocol.batch)
    return min(steps, protocol.max_steps or steps)


def predict(predictor: SequencePredictor, encoded: Encoded, precision: torch.dtype) -> np.ndarray:
    """(N, C) float32 outputs in the order of the examples, without dropout."""
    device = predictor.output_weight.device
    was_training = predictor.training
    predictor.eval()
    output_NC = np.empty((len(encoded), predictor.vocabulary), dtype=np.float32)
    batches = list(prediction_order(encoded.length_N))
    outputs = spread(partial(_outputs, predictor, encoded, precision), batches, device)
    for rows, found in zip(batches, outputs, strict=True):
        output_NC[rows] = found
    predictor.train(was_training)
    return output_NC


def predictions(output_NC: np.ndarray) -> np.ndarray:
    """(N,): the likeliest class, or the number where there is a single output."""
    return output_NC[:, 0] if output_NC.shape[1] == 1 else output_NC.argmax(1)


class Best:
    """Keeps the parameters of the epoch that scored best on a slice of the training set, for `after_epoch`."""

    def __init__(self, score: Callable[[nn.Module], float]):
        self.score = score
        self.best: dict[str, float] = {}
        self.states: dict[str, dict[str, Tensor]] = {}

    def __call__(self, predictors: Mapping[str, nn.Module]) -> None:
        for name, predictor in predictors.items():
            score = float(np.nan_to_num(self.score(predictor), nan=-np.inf))
            if name not in self.best or score > self.best[name]:
                self.best[name], self.states[name] = score, deepcopy(predictor.state_dict())

    def restore(self, predictors: Mapping[str, nn.Module]) -> None:
        """Puts the kept parameters back."""
        for name, predictor in predictors.items():
            predictor.load_state_dict(self.states[name])


def _outputs(predictor: SequencePredictor, encoded: Encoded, precision: torch.dtype, rows: np.ndarray) -> np.ndarray:
    device = predictor.output_weight.device
    batch = batch_of(encoded, rows, None).to(device)
    with autocast(device.type, precision):
        features_ND = predictor(batch.inputs, batch.rows_N)
    return functional.linear(features_ND.float(), predictor.output_weight, predictor.output_bias).cpu().numpy()


def _predictor(model: PreTrainedModel, outputs: int, protocol: Protocol, seed: int) -> SequencePredictor:
    causal = is_causal(model)
    pooling = "last" if causal else protocol.pooling
    made = SequencePredictor(model, outputs, pooling=pooling, dropout=protocol.dropout, seed=seed_of(seed, "head"))
    return made.to(model.device)


def _member(name: str, predictor: SequencePredictor, protocol: Protocol, rate: float, steps: int) -> Member:
    return Member(
        name,
        cast(Predictor, predictor),
        adamw(predictor, protocol.weight_decay, (0.9, 0.999), 1e-8),
        lr=schedules.build({"warmup_linear": [rate, protocol.warmup]}, steps),
        clip=protocol.clip,
        noise_key="model",
    )
