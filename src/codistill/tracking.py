"""Opt-in sinks for what `metrics.jsonl` holds anyway: TensorBoard, trackio, Weights & Biases, MLflow.

Each library is imported inside the one function that needs it. A sink that fails costs one line of warning and is left
out from then on; it never costs the run, and `metrics.jsonl` is written before any sink is asked.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from codistill.config import Run
from codistill.errors import UserError
from codistill.loading import to_dict

# The extra that brings each library; the two that talk to a server of their own are extras of their own.
_EXTRAS = {"tensorboard": "track", "trackio": "track", "wandb": "wandb", "mlflow": "mlflow"}


class Sink(NamedTuple):
    """Where numbers go: `log(step, {name: number})`, and `close()` once the run ends or stops."""

    log: Callable[[int, dict[str, float]], Any]
    close: Callable[[], Any]


def check_installed(sinks: Sequence[str]) -> None:
    """Raises UserError, with the extra that brings it, for a sink whose library is not installed."""
    for name in sinks:
        if find_spec(name) is None:
            raise UserError(
                f"track: {name} is not installed; codistill's extra `{_EXTRAS[name]}` brings it (docs/install.md), "
                "or leave it out of `track` (metrics.jsonl is written always)"
            )


class Tracker:
    """The sinks of `run`, which goes to the folder `out` and starts or goes on after step `first`."""

    def __init__(self, run: Run, out: Path, first: int):
        self._sinks: dict[str, Sink] = {}
        for name in dict.fromkeys(run.track):
            sink = _or_warning(name, first, partial(_OPEN[name], run, out, first))
            if sink is not None:
                self._sinks[name] = sink

    def log(self, line: Mapping[str, Any]) -> None:
        """Sends one line of `metrics.jsonl` to every sink that has not failed."""
        for name, sink in list(self._sinks.items()):
            if _or_warning(name, line["step"], partial(_sent, sink, line)) is None:
                del self._sinks[name]

    def close(self) -> None:
        """Ends every sink; numbers that one still holds are written out."""
        while self._sinks:
            name, sink = self._sinks.popitem()
            _or_warning(name, None, sink.close)


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of `metrics.jsonl` by name, held-out scores as NAME/held_out_loss and …_accuracy."""
    flat = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "step"}
    for name, score in line.get("held_out", {}).items():
        flat |= {f"{name}/held_out_{key}": value for key, value in score.items() if value is not None}
    return flat


def _sent(sink: Sink, line: Mapping[str, Any]) -> Sink:
    sink.log(line["step"], numbers(line))
    return sink


def _or_warning(name: str, step: int | None, act: Callable[[], Any]) -> Any:
    """What `act` returns, or None and a line on standard error."""
    try:
        return act()
    except Exception as error:  # whatever a tracker raises must not cost a run
        words = " ".join(f"{type(error).__name__}: {error}".split())
        at = "at the end" if step is None else f"after step {step}"
        print(f"track: {name} failed {at} ({words}); continuing without it; metrics.jsonl is complete", file=sys.stderr)
        return None


# ---- the sinks ---------------------------------------------------------------------------------


def _tensorboard(run: Run, out: Path, first: int) -> Sink:
    """Event files in `out`/tensorboard; what a run did after the checkpoint that it resumes from is purged."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"), purge_step=first + 1 if first else None)

    def log(step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return Sink(log, writer.close)


def _trackio(run: Run, out: Path, first: int) -> Sink:
    """A local project `codistill`; `trackio show` displays it."""
    import trackio

    name = f"{out.name}-{_remembered(out, 'trackio', _new_id)}"
    tracked = trackio.init(project="codistill", name=name, config=to_dict(run), resume="allow", embed=False)
    return Sink(lambda step, values: tracked.log(values, step=step), tracked.finish)


def _wandb(run: Run, out: Path, first: int) -> Sink:
    """A run of the project `codistill`, or WANDB_PROJECT; its files lie in `out`."""
    import os

    import wandb

    tracked = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "codistill"),
        name=out.name,
        id=_remembered(out, "wandb", _new_id),
        resume="allow",
        dir=str(out),
        config=to_dict(run),
    )
    return Sink(lambda step, values: tracked.log(values, step=step), tracked.finish)


def _mlflow(run: Run, out: Path, first: int) -> Sink:
    """A run of the experiment that MLflow's own settings name; the configuration is its artifact run.json."""
    import mlflow

    def begin() -> str:
        begun = mlflow.start_run(run_name=out.name)
        mlflow.log_dict(to_dict(run), "run.json")
        mlflow.end_run()
        return begun.info.run_id

    mlflow.start_run(run_id=_remembered(out, "mlflow", begin))
    return Sink(lambda step, values: mlflow.log_metrics(values, step=step), mlflow.end_run)


_OPEN: Mapping[str, Callable[[Run, Path, int], Sink]] = {
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
    "mlflow": _mlflow,
}


def _remembered(out: Path, sink: str, make: Callable[[], str]) -> str:
    """What `make` returned when the run began, so that a resumed run goes on in the same place."""
    file = out / f".{sink}"
    if not file.exists():
        file.write_text(make(), encoding="utf-8")
    return file.read_text(encoding="utf-8")


def _new_id() -> str:
    return uuid4().hex[:12]
