"""Where a step's time goes, and what the machine could do at most."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from codistill.bench.step_providers import logit_edges
from codistill.cohort import Cohort
from codistill.objectives import Batch


def phases(
    cohort: Cohort, data: Callable[[int], object], batches: Sequence[Sequence[Batch]], runs: int
) -> dict[str, float]:
    """Median seconds of the parts of a step with one micro-batch, each waited for: data (what `data` does for a step),
    forward, loss, backward, update (clipping and optimizers)."""
    device = cohort.device
    seconds: dict[str, list[float]] = {name: [] for name in ("data", "forward", "loss", "backward", "update")}
    for step in range(runs + 1):
        batch, edges = batches[step % len(batches)][0], logit_edges(cohort, step)
        rows = torch.full((), float(len(batch.labels_N)), device=device)
        clock = _Clock(device)
        clock.time("data", lambda: data(step))  # noqa: B023  called at once
        features = clock.time(
            "forward",
            lambda: {m.name: cohort._features(m, batch, step, 0) for m in cohort.members.values()},  # noqa: B023
        )
        loss = clock.time("loss", lambda: cohort._loss(features, batch, step, edges, rows))  # noqa: B023
        clock.time("backward", loss.total.backward)
        metrics = {f"{m.name}/hard": loss.hard[m.name] for m in cohort.trained}
        clock.time("update", lambda: cohort._update(step, metrics))  # noqa: B023
        for name, spent in clock.spent.items():
            if step:  # the first is a warm-up
                seconds[name].append(spent)
    return {name: statistics.median(found) for name, found in seconds.items()}


def product_rate(device: torch.device, precision: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product, the best of five measurements.

    On a GPU of several large products, since one of 2048 is over sooner than its start and the wait for it.
    """
    size, products = (8192, 20) if device.type == "cuda" else (2048, 1)
    a = torch.randn(size, size, device=device, dtype=precision)
    best = 0.0
    for _ in range(5):
        clock = _Clock(device)
        clock.time("products", lambda: [a @ a for _ in range(products)][-1])
        best = max(best, products * 2 * size**3 / clock.spent["products"])
    return best


class _Clock:
    def __init__(self, device: torch.device):
        self.device, self.spent = device, dict[str, float]()

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        self._wait()
        start = time.perf_counter()
        done = work()
        self._wait()
        self.spent[name] = time.perf_counter() - start
        return done

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
