"""A watch over losses and gradients that are not finite. Shape suffix: M trained members."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from codistill.errors import UserError


class NonFiniteError(UserError):
    """A run was stopped because a loss or gradient was not finite; see `Failure`."""


class Failure(NamedTuple):
    """The first step whose loss or gradient was not finite, and whose it was."""

    step: int
    members: list[str]

    def __str__(self) -> str:
        return (
            f"step {self.step}: the loss or gradient of {' and '.join(self.members)} was not finite, so no parameter "
            "was changed in that step or since; lower `lr` or an edge's weight, or use precision: float32"
        )


class Watch:
    """Watches on the device, without waiting for it, that losses and gradients are finite."""

    def __init__(self, names: Sequence[str], device: torch.device, skip: bool):
        self.names, self.skip = list(names), skip
        self.step = torch.full((), -1, dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.broken_M = torch.zeros(len(self.names), dtype=torch.bool, device=device)

    def observe(self, step: int, hard: Sequence[Tensor], norms: Sequence[Tensor]) -> Tensor:
        """1.0 if this step's updates are to be suppressed, else 0.0, as a 0-d float32 tensor on the device."""
        bad_loss_M, bad_norm_M = (~torch.stack(list(values)).isfinite() for values in (hard, norms))
        # A member with a broken loss breaks its students' gradients too: name it, and not them.
        broken_M = torch.where(bad_loss_M.any(), bad_loss_M, bad_norm_M)
        if self.skip:
            is_broken = broken_M.any()
            self.skipped = self.skipped + is_broken
            return is_broken.float()
        is_first = (self.step < 0) & broken_M.any()
        self.broken_M = torch.where(is_first, broken_M, self.broken_M)
        self.step = torch.where(is_first, step, self.step)
        return (self.step >= 0).float()

    def failure(self) -> Failure | None:
        """The failure that suppresses updates, or None; waits for the device."""
        step = int(self.step)
        broken = zip(self.names, self.broken_M.tolist(), strict=True)
        return Failure(step, [name for name, bad in broken if bad]) if step >= 0 else None
