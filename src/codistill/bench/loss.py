"""`codistill bench loss`: speed, memory and gradient error of the vocabulary loss, ours beside everybody's."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from codistill.bench.measure import (
    announced,
    check_counts,
    chosen_providers,
    interleaved,
    machine,
    peak_bytes,
    place_of,
    summary,
    write_result,
)
from codistill.bench.providers import MEMBERS, PROVIDERS, Loss, Setting, random_setting
from codistill.errors import UserError

DIFFERENT = {False: 1e-3, True: 5e-2}  # a gradient further from float64 than this is not of the same loss
APART = 0.03  # features that differ by so much make a KL near 1e-3


def bench_loss(
    *,
    device: str = "cpu",
    dtype: str = "float32",
    rows: int = 2048,
    vocabulary: int = 30522,
    width: int = 768,
    runs: int = 7,
    providers: Sequence[str] | None = None,
    out: Path | None = None,
) -> dict:
    """The measurements as one JSON-able object; prints them as a table, and writes them to `out`. On standard error it
    says what it is at.

    Two members of `width`, `rows` predicted rows, `dtype` "float32", or "bfloat16" for bfloat16 training of float32
    parameters. `providers`: names of `PROVIDERS`, by default all. Seconds are of forward and backward together, medians
    of `runs` taken in turns. Gradients are compared with float64 before anything is timed, and a provider that is not
    installed, or does not compute this loss, is an empty row that says why. Raises UserError for an unknown name.
    """
    chosen = chosen_providers(providers, PROVIDERS)
    _check(device, dtype)
    check_counts(rows=rows, vocabulary=vocabulary, width=width, runs=runs)
    low = dtype == "bfloat16"
    setting = random_setting(device, low, rows, vocabulary, width)
    close = replace(random_setting(device, low, min(rows, 256), vocabulary, width, APART), hard_weight=0.0)
    rows_of: dict[str, dict] = {name: {"provider": name} for name in chosen}
    losses = _comparable(setting, close, rows_of)
    steps = {name: _step(setting, loss) for name, loss in losses.items()}
    for name in announced(list(steps), "memory"):
        _clear(setting)  # or the gradients that the step before left behind would count as in use already
        try:
            rows_of[name]["peak_bytes"] = peak_bytes(steps[name], device)
        except Exception as error:  # for want of memory, say: the others are measured all the same
            _leave_out(rows_of[name], error, setting)
            del steps[name]
    for name, seconds in interleaved(steps, runs, device).items() if steps else ():
        rows_of[name]["seconds"] = summary(seconds)
    packages = dict.fromkeys(provider.package for provider in PROVIDERS.values() if provider.package)
    result: dict = {
        "benchmark": "loss",
        "setting": {"dtype": dtype, "rows": rows, "vocabulary": vocabulary, "width": width, "runs": runs},
        "machine": machine(device, ("triton", *packages)),
        "date": time.strftime("%Y-%m-%d"),
        "results": list(rows_of.values()),
    }
    console = Console()
    console.print(table(result))
    for row in result["results"]:
        if "reason" in row:
            console.print(f"not run: {row['provider']}: {row['reason']}", style="dim", highlight=False)
    write_result(out, result)
    return result


def table(result: dict) -> Table:
    """A result of `bench_loss` for the eye; speeds also as multiples of plain PyTorch's. Empty rows are left out."""
    setting = result["setting"]
    shape = f"{setting['rows']} rows, {setting['width']} -> {setting['vocabulary']}, {setting['dtype']}"
    found = Table("provider", "seconds", "spread", "x plain", "peak MB", "error", "KL error", title=shape)
    of = {row["provider"]: row["seconds"]["median"] for row in result["results"] if "seconds" in row}
    plain = of.get("plain")
    for row in result["results"]:
        if "seconds" not in row:
            continue
        seconds, peak = row["seconds"], row["peak_bytes"]
        found.add_row(
            row["provider"],
            f"{seconds['median']:.4g}",
            f"{seconds['min']:.4g}–{seconds['max']:.4g}",
            f"{plain / seconds['median']:.2f}" if plain else "",
            f"{peak / 1e6:.0f}" if peak is not None else "",
            *(f"{row[key]:.1e}" if row.get(key) is not None else "" for key in ("error", "kl_error")),
        )
    return found


def _check(device: str, dtype: str) -> None:
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype: {dtype!r}; wanted 'float32' or 'bfloat16'")
    place_of(device)


def _comparable(setting: Setting, close: Setting, rows_of: dict[str, dict]) -> dict[str, Loss]:
    """The losses whose gradients agree with float64, by provider; why the others do not goes into their rows."""
    asked = {PROVIDERS[name].cross_entropy_only for name in rows_of if name != "bare products"}
    exact = {hard_only: _exact_gradients(setting, hard_only) for hard_only in asked}
    exact_close = _exact_gradients(close, False)
    found = {}
    for name in announced(rows_of, "gradients"):
        provider, row = PROVIDERS[name], rows_of[name]
        try:
            loss = provider.make(setting)
            if name != "bare products":
                row["error"] = _error(_gradients(setting, loss), exact[provider.cross_entropy_only])
                if row["error"] > DIFFERENT[setting.low]:
                    raise RuntimeError(f"its gradient differs by {row['error']:.1e}")
                if not provider.cross_entropy_only:
                    row["kl_error"] = _error(_gradients(close, provider.make(close)), exact_close)
            found[name] = loss
        except Exception as error:  # whatever keeps a peer from running is its row's reason
            _leave_out(row, error, setting)
    return found


def _leave_out(row: dict, error: Exception, setting: Setting) -> None:
    row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if setting.device == "cuda":
        torch.cuda.empty_cache()


def _step(setting: Setting, loss: Loss) -> Callable[[], None]:
    def step() -> None:
        _clear(setting)
        total = loss()
        if total is not None:
            total.backward()

    return step


def _gradients(setting: Setting, loss: Loss) -> list[Tensor]:
    _step(setting, loss)()
    found = [tensor.grad for tensor in _parameters(setting) if tensor.grad is not None]
    _clear(setting)
    if len(found) < len(_parameters(setting)):
        raise RuntimeError("it gives no gradient to some parameter")
    return found


def _exact_gradients(setting: Setting, hard_only: bool) -> list[Tensor]:
    """By autograd in float64, 64 rows at a time, so that it fits; returned in float32."""
    wide = [tensor.detach().double().requires_grad_() for tensor in _parameters(setting)]
    count = len(setting.labels_N)
    for start in range(0, count, 64):
        part = slice(start, start + 64)
        log_p, log_q = ((wide[i][part] @ wide[i + 2].T).log_softmax(-1) for i in (0, 1))
        hard = -log_p.add(log_q).gather(1, setting.labels_N[part, None]).sum()
        soft = (log_p.exp() - log_q.exp()).detach() * (log_p - log_q)  # its gradient is p − q and q − p
        (hard * (1.0 if hard_only else setting.hard_weight) + (0.0 if hard_only else soft.sum())).div(count).backward()
    return [tensor.grad.float() for tensor in wide if tensor.grad is not None]


def _error(got: list[Tensor], exact: list[Tensor]) -> float:
    """The largest |got − exact| ÷ |exact| over the parameters."""
    return max(((g.double() - e.double()).norm() / e.double().norm()).item() for g, e in zip(got, exact, strict=True))


def _parameters(setting: Setting) -> list[Tensor]:
    return [*(setting.hidden[m] for m in MEMBERS), *(setting.weight[m] for m in MEMBERS)]


def _clear(setting: Setting) -> None:
    for tensor in _parameters(setting):
        tensor.grad = None
