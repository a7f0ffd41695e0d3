"""What a new member starts from, where that is not random numbers: another model, mapped or grown.

Shape suffixes: N predicted rows, V vocabulary.
"""

from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from codistill.config import Run
from codistill.data.batches import Batches
from codistill.families.supported import check_finite
from codistill.models import Predictor, load_model
from codistill.remap import initial_state, learn_growth, read_config
from codistill.seeds import seed_of


def initialise(model: PreTrainedModel, run: Run, name: str, batches: Batches) -> None:
    """Replaces the parameters of `model`, the new member `name`, by those of its `init`, if it has one."""
    init = run.members[name].init
    if init is None:
        return
    source = Path(init.from_)
    seed = seed_of(run.seed, "remapping", run.seed_name(name))
    if init.learned is None:
        state = initial_state(source, model.config, depth=init.depth, width=init.width, seed=seed, noise=init.noise)
    else:
        state = learn_growth(
            load_model(init.from_, f"members.{name}.init.from").state_dict(),
            read_config(source),
            model.config,
            _loss_on(model, batches),
            depth=init.depth or "stack",
            steps=init.learned,
            seed=seed,
        )
    model.load_state_dict(state)
    check_finite(model, f"members.{name}.init.from: {init.from_!r}")


class _Logits(nn.Module):
    """A predictor as one function to its logits (N, V)."""

    def __init__(self, predictor: Predictor):
        super().__init__()
        self.predictor = predictor

    def forward(self, inputs: Mapping[str, Tensor], rows_N: Tensor) -> Tensor:
        return self.predictor.logits(self.predictor(inputs, rows_N))


def _loss_on(model: PreTrainedModel, batches: Batches) -> Callable[[dict[str, Tensor]], Tensor]:
    """A function from a state of `model` to its loss on the run's first batches (of each step the first micro-batch),
    one after the other."""
    logits, steps = _Logits(Predictor(model.eval(), batches.vocabulary.size)), count()

    def loss_of(state: dict[str, Tensor]) -> Tensor:
        batch = batches.at(next(steps))[0]
        named = {f"predictor.model.{name}": tensor for name, tensor in state.items()}
        loss_N = cross_entropy(
            functional_call(logits, named, (batch.inputs, batch.rows_N)), batch.labels_N, reduction="none"
        )
        weight_N = torch.ones_like(loss_N) if batch.row_weight_N is None else batch.row_weight_N
        return (loss_N * weight_N).sum() / weight_N.sum()

    return loss_of
