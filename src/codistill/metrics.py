"""`metrics.jsonl`: one object a logged step, and what to say of it beside the progress bar."""

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from codistill.files import to_json, without_nan, write_file
from codistill.scores import Score

# A loss is a spike when it lies this many robust standard deviations above the median of the lines before it.
_DEVIATIONS, _LINES_BEFORE, _LINES_NEEDED = 8.0, 50, 10
_MAD_TO_DEVIATION = 1.4826  # of a normal distribution


class Logged(NamedTuple):
    """What was logged of a step: `numbers` as in the file, and a `note` for the progress bar."""

    note: str
    numbers: dict[str, float]


class MetricsLog:
    """Appends to a metrics file. Lines after step `first` are dropped on opening: they are about to be redone.

    `also` is given every line that was appended, as a mapping. `tokens_before`: seen by step `first`, if not so many a
    step. `scored_from`: held-out losses up to that step were of other text, and are compared with none.
    """

    def __init__(
        self,
        file: Path,
        first: int,
        tokens_per_step: int,
        also: Callable[[Mapping[str, Any]], None] | None = None,
        tokens_before: int | None = None,
        scored_from: int = 0,
    ):
        self.tokens_before = first * tokens_per_step if tokens_before is None else tokens_before
        self.file, self.first, self.tokens_per_step, self.also = file, first, tokens_per_step, also
        kept = [line for line in read_metrics(file) if line["step"] <= first]
        self.seconds_before = max((line.get("seconds", 0.0) for line in kept), default=0.0)
        self.skipped_before = self.skipped_written = max((line.get("skipped", 0) for line in kept), default=0)
        if not file.exists() or file.is_file():  # and not the null device of a rank that writes nothing
            write_file(file, "".join(to_json(line) + "\n" for line in kept))
        scored = [line for line in kept if "held_out" in line and line["step"] > scored_from]
        self.held_out = [(line["step"], _losses(line["held_out"])) for line in scored]
        self.started = time.monotonic()
        self.recent: dict[str, deque[float]] = {}
        for line in kept:
            self._remember(line)

    @property
    def seconds(self) -> float:
        """Spent on the run so far, before it was resumed included."""
        return self.seconds_before + time.monotonic() - self.started

    def write(self, step: int, metrics: Mapping[str, torch.Tensor], skipped: int = 0) -> Logged:
        """Logs device scalars, waiting for them once."""
        skipped += self.skipped_before
        values = torch.stack([value.float() for value in metrics.values()]).tolist()
        named: dict[str, Any] = dict(zip(metrics, values, strict=True))
        spikes = self.spikes(named)
        self._remember(named)
        tokens = self.tokens_before + (step - self.first) * self.tokens_per_step
        line = {"step": step, "tokens": tokens, "seconds": round(self.seconds, 3)} | named
        self._append(line | ({"spikes": spikes} if spikes else {}) | ({"skipped": skipped} if skipped else {}))
        self.skipped_written = skipped
        rate = (step - self.first) * self.tokens_per_step / (time.monotonic() - self.started)
        losses = " ".join(f"{key.removesuffix('/hard')} {value:.3f}" for key, value in _hard(named).items())
        note = f"{losses} | {rate:,.0f} tokens/s" + (f" | spike: {', '.join(spikes)}" if spikes else "")
        return Logged(note, named)

    def write_skipped(self, step: int, skipped: int) -> None:
        """Logs how many steps were skipped, if that is not in the file: a run that goes on from here would not know."""
        if (total := skipped + self.skipped_before) > self.skipped_written:
            self._append({"step": step, "seconds": round(self.seconds, 3), "skipped": total})
            self.skipped_written = total

    def write_held_out(self, step: int, scores: Mapping[str, Score]) -> None:
        """Logs the held-out scores after `step` steps."""
        table = {name: {"loss": score.loss, "accuracy": score.accuracy} for name, score in scores.items()}
        self.held_out.append((step, _losses(table)))
        self._append({"step": step, "seconds": round(self.seconds, 3), "held_out": table})

    def best(self) -> dict[str, dict[str, float]]:
        """For each member, after which step its held-out loss was lowest, and that loss in nats; nothing for one whose
        loss never was a number."""
        lowest: dict[str, tuple[float, int]] = {}
        for step, losses in self.held_out:  # members may come and go where a run is resumed
            for name, loss in losses.items():
                lowest[name] = min(lowest.get(name, (loss, step)), (loss, step))
        return {name: {"step": step, "loss": loss} for name, (loss, step) in lowest.items() if math.isfinite(loss)}

    def is_stale(self, names: Sequence[str], patience: int, least: float) -> bool:
        """Whether the last `patience` held-out losses, summed over `names`, are not below the lowest before them."""
        lowest, since = math.inf, 0
        for _, losses in self.held_out:
            total = sum(losses[name] for name in names)
            lowest, since = (total, 0) if total < lowest - least else (lowest, since + 1)
        return since >= patience

    def spikes(self, named: Mapping[str, float]) -> list[str]:
        """The members whose hard loss lies far above its recent course."""
        found = []
        for key, value in _hard(named).items():
            before = self.recent.get(key, ())
            if len(before) >= _LINES_NEEDED:
                median = statistics.median(before)
                deviation = _MAD_TO_DEVIATION * statistics.median(abs(loss - median) for loss in before)
                if value - median > _DEVIATIONS * max(deviation, 1e-3):
                    found.append(key.removesuffix("/hard"))
        return found

    def _remember(self, named: Mapping[str, Any]) -> None:
        for key, value in _hard(named).items():
            if not math.isfinite(value):
                continue
            self.recent.setdefault(key, deque(maxlen=_LINES_BEFORE)).append(value)

    def _append(self, line: Mapping[str, Any]) -> None:
        line = without_nan(line)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(to_json(line) + "\n")
        if self.also is not None:
            self.also(line)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; what follows a line that a crash cut short does not count."""
    if not file.exists():
        return []
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _losses(table: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """A loss that is no number is higher than any that is."""
    losses = {name: score["loss"] for name, score in table.items()}
    return {name: math.inf if loss is None or math.isnan(loss) else loss for name, loss in losses.items()}


def _hard(named: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in named.items() if key.endswith("/hard") and value is not None}
