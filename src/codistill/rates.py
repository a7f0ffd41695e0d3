"""A learning-rate finder: the run itself, cut short, once for each rate."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from rich.box import SIMPLE
from rich.table import Table

from codistill import distributed
from codistill.build import Built, build, resolved_compile, resolved_precision
from codistill.config import Run
from codistill.errors import UserError
from codistill.progress import Advance, silent
from codistill.schedules import Schedule, value_at
from codistill.train import score_members


class Trial(NamedTuple):
    """Peak `rate` of all trained members, and each one's held-out loss in nats; None where something was not finite."""

    rate: float
    losses: dict[str, float] | None


def try_rates(
    run: Run, rates: Sequence[float], steps: int, *, device: str | None = None, advance: Advance = silent
) -> list[Trial]:
    """A run of `steps` steps for each of `rates`, all from the same initialisation and on the same batches.

    In each, every trained member's schedule keeps its shape and gets that peak; edges stay. Writes no folder.
    UserError for a rate that is not above 0, for none, and for several processes.
    """
    if not rates or not all(rate > 0 for rate in rates):
        raise UserError(f"--rates: {', '.join(map(str, rates))} came in where numbers above 0 are wanted")
    ranks = distributed.start(run.distributed, device)
    if ranks.world > 1:
        raise UserError("lr: it runs in one process; start it without torchrun")
    place = ranks.device
    run = replace(run, steps=steps, precision=resolved_precision(run, place), compile=resolved_compile(run, place))
    return [_trial(run, rate, ranks.device, number * steps, advance) for number, rate in enumerate(rates)]


def rates_table(trials: Sequence[Trial], names: Sequence[str], steps: int) -> Table:
    """Held-out losses by rate and trained member (`names`), the lowest of each member marked with *."""
    finite = [trial.losses for trial in trials if trial.losses is not None]
    title = f"Held-out loss (nats) after {steps:,} steps, one run of each rate"
    table = Table(box=SIMPLE, min_width=66, title=title, caption=_caption(trials, names))
    for heading in ("peak rate", *names):
        table.add_column(heading, justify="right", no_wrap=True)
    for trial in trials:
        losses = [_cell(trial, name, finite) for name in names] if trial.losses else ["not finite"] * len(names)
        table.add_row(f"{trial.rate:g}", *losses)
    return table


def _trial(run: Run, rate: float, device: torch.device, before: int, advance: Advance) -> Trial:
    built = build(run, device)
    for member in built.cohort.trained:
        member.lr = with_peak(partial(value_at, member.lr or 0.0), rate, run.steps)
    for step in range(run.steps):
        built.cohort.step(step, [batch.to(device) for batch in built.batches.at(step)])
        advance(before + step + 1, f"rate {rate:g}")
    if built.cohort.failure() is not None or built.cohort.num_skipped():
        return Trial(rate, None)
    return Trial(rate, _losses(built, run))


def _losses(built: Built, run: Run) -> dict[str, float]:
    scores = score_members(built, run)
    return {member.name: scores[member.name].loss for member in built.cohort.trained}


def with_peak(schedule: Schedule, rate: float, steps: int) -> Schedule:
    """`schedule` scaled so that its largest value in `steps` steps is `rate`; UserError where it is 0 throughout."""
    peak = max(schedule(step) for step in range(steps))
    if peak == 0:
        raise UserError(f"lr: the schedule is 0 for all of {steps} steps; give more --steps")
    return lambda step: schedule(step) * (rate / peak)


def _cell(trial: Trial, name: str, finite: Sequence[Mapping[str, float]]) -> str:
    assert trial.losses is not None
    is_lowest = trial.losses[name] == min(losses[name] for losses in finite)
    return f"{trial.losses[name]:.4f}{' *' if is_lowest else '  '}"


def _caption(trials: Sequence[Trial], names: Sequence[str]) -> str:
    lines = []
    for name in names:
        best = min(((trial.losses[name], trial.rate) for trial in trials if trial.losses), default=(0, None))[1]
        if best is None:
            return "no rate stayed finite: try lower ones"
        edge = {min(t.rate for t in trials): "lowest", max(t.rate for t in trials): "highest"}.get(best)
        lines.append(f"{name}: {best:g}" + (f", the {edge} that was tried: try others beyond it" if edge else ""))
    return "\n".join(lines)
