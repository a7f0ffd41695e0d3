"""A member of a cohort: a model, and how it is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from codistill.errors import UserError
from codistill.models import Predictor
from codistill.schedules import Schedule, problem


@dataclass
class Member:
    """A node: a model, trained if it has an optimizer and frozen if it has none.

    Any optimizer will do, or several that share the parameters out; with one of PyTorch's made with `fused=True` a step
    never waits for the device. `lr` and `hard_weight` are numbers or functions of the step; without `lr` the learning
    rate is left to the optimizer and its scheduler. `clip` bounds the gradient's norm, by 1.0 unless it is given;
    float("inf") clips nothing. Dropout noise, and where the projections of hidden edges begin, are keyed by
    `noise_key`, by default the name, so that they do not depend on who else is in the cohort. Parameters that are
    frozen when it is made stay so. Raises UserError for settings of the wrong kind, trained parameters that are not
    float32 (or float64), an optimizer that lacks some or has others', and where nothing is left to train.
    """

    name: str
    predictor: Predictor
    optimizer: Optimizer | Sequence[Optimizer] | None = None
    lr: float | Schedule | None = None
    hard_weight: float | Schedule = 1.0
    clip: float = 1.0
    noise_key: str = ""
    projections: nn.ModuleDict = field(init=False, repr=False, default_factory=nn.ModuleDict)
    parameters: list[Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.noise_key = self.noise_key or self.name
        self._check_settings()
        self.parameters = list(self.predictor.parameters())
        self.predictor.train(self.is_trained)
        if not self.is_trained:
            self.predictor.requires_grad_(False)
            return
        self._check_parameters()

    def _check_settings(self) -> None:
        if not isinstance(self.clip, Real) or not self.clip > 0:
            raise UserError(
                f'member {self.name!r}: clip {self.clip!r}; wanted a number above 0 (float("inf") for no clipping)'
            )
        for setting in ("lr", "hard_weight"):
            value = getattr(self, setting)
            wrong = None if setting == "lr" and value is None else problem(value)
            if wrong is not None:
                raise UserError(f"member {self.name!r}: {setting} {wrong}")

    def _check_parameters(self) -> None:
        if not self._learns():
            raise UserError(
                f"member {self.name!r}: its optimizer has none of its parameters that require a gradient, so nothing "
                "is left to train; unfreeze some, or give no optimizer for a frozen teacher"
            )
        narrow = next(((n, p.dtype) for n, p in self.predictor.named_parameters() if _is_narrow(p)), None)
        if narrow is not None:
            raise UserError(
                f"member {self.name!r}: {narrow[0]} is {narrow[1]}; what is trained is float32, so load it in float32 "
                "(Cohort(precision=torch.bfloat16) has its products in bfloat16)"
            )
        held, mine = set(map(id, self._optimized())), {id(parameter) for parameter in self.parameters}
        left = [n for n, p in self.predictor.named_parameters() if p.requires_grad and id(p) not in held]
        if left:
            raise UserError(
                f"member {self.name!r}: no optimizer has {left[0]} ({len(left)} such); freeze it, or give it to one"
            )
        if held - mine:
            raise UserError(f"member {self.name!r}: its optimizer has parameters that are not its own; leave them out")

    @property
    def is_trained(self) -> bool:
        """Whether the member learns."""
        return bool(self.optimizers)

    @property
    def optimizers(self) -> Sequence[Optimizer]:
        """None for a frozen member."""
        if self.optimizer is None or isinstance(self.optimizer, Optimizer):
            return [] if self.optimizer is None else [self.optimizer]
        return self.optimizer

    @property
    def modules(self) -> list[nn.Module]:
        """All that is trained with the member: its predictor, and projections that are no part of its model."""
        return [self.predictor, *self.projections.values()]

    def train_too(self, projections: nn.ModuleDict) -> None:
        """Trains `projections` with the member: by its last optimizer, with the settings of its first group."""
        self.projections, parameters = projections, list(projections.parameters())
        if parameters:
            self.parameters += parameters
            first = self.optimizers[-1].param_groups[0]
            settings = {name: value for name, value in first.items() if name not in ("params", "param_names")}
            self.optimizers[-1].add_param_group({**settings, "params": parameters})

    def _optimized(self) -> list[Tensor]:
        return [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]

    def _learns(self) -> bool:
        mine = {id(parameter) for parameter in self.parameters if parameter.requires_grad}
        return any(id(parameter) in mine for parameter in self._optimized())


def _is_narrow(parameter: Tensor) -> bool:
    """Whether updates would be lost in its rounding."""
    wide = (torch.float32, torch.float64)
    return parameter.requires_grad and parameter.is_floating_point() and parameter.dtype not in wide
