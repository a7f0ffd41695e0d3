"""`codistill bench step`: a whole training step, ours beside the loops that people write."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from codistill.bench.phases import phases, product_rate
from codistill.bench.step_peers import modelopt, pytorch_dml, textbrewer
from codistill.bench.step_providers import Loop, ours, ours_apart, ours_compiled, plain
from codistill.build import build, resolved_precision
from codistill.config import MemberConfig, Run
from codistill.costs import member_flops
from codistill.loading import to_dict
from codistill.machine import keep_freed_memory
from codistill.objectives import Batch

COSINE, NORM = 0.9999, 1e-3  # a gradient further from ours, in float32, is of another loss


@dataclass(frozen=True)
class Provider:
    """`same_loss`: its gradients must agree with ours before it is timed."""

    make: Callable[[Run, torch.device], Loop]
    package: str | None = None
    same_loss: bool = True


PROVIDERS: Mapping[str, Provider] = {
    "ours": Provider(ours),
    "ours, compiled": Provider(ours_compiled),
    "ours, one by one": Provider(ours_apart, same_loss=False),
    "plain": Provider(plain()),
    "plain, all rows": Provider(plain(all_rows=True)),
    "plain, compiled": Provider(plain(compiled=True)),
    "plain, Liger's loss": Provider(plain(liger=True), "liger-kernel"),
    "textbrewer": Provider(textbrewer, "textbrewer"),
    "modelopt": Provider(modelopt, "nvidia-modelopt"),
    "pytorch-dml": Provider(pytorch_dml, "pytorch-dml"),
}


def bench_step(
    run: Run,
    *,
    device: str = "cpu",
    runs: int = 7,
    providers: Sequence[str] | None = None,
    out: Path | None = None,
) -> dict:
    """The measurements as one JSON-able object; prints them as tables, and writes them to `out`. On standard error it
    says what it is at.

    Steps of `run`, each provider with models and optimizers of its own, in turns; seconds are medians of `runs`. Before
    anything is timed every provider's gradients are compared in float32, without dropout, with ours (cosine, ratio of
    norms), and one that is not installed or computes something else is an empty row that says why. `utilisation`: the
    step's floating-point operations by time, over the rate of a large matrix product in the same precision on the same
    machine. Raises UserError for an unknown provider.
    """
    chosen = chosen_providers(providers, PROVIDERS)
    place = place_of(device)
    check_counts(runs=runs)
    keep_freed_memory()  # for all alike, as a run does
    run = replace(run, precision=resolved_precision(run, place))
    built = build(run, place)
    batches = [[b.to(place) for b in built.batches.at(step)] for step in range(runs + 2)]
    rows: dict[str, dict] = {name: {"provider": name} for name in chosen}
    loops = _comparable(run, place, batches[0], rows)
    for name in announced(loops, "memory"):
        rows[name]["peak_bytes"] = peak_bytes(_turn(loops[name], batches), place.type)
    for name, seconds in interleaved({n: _turn(loop, batches) for n, loop in loops.items()}, runs, place.type).items():
        rows[name]["seconds"] = summary(seconds)
    rows_of_step = sum(len(batch.labels_N) for batch in batches[0])
    cost = member_flops(run, built.models, rows=rows_of_step, steps=range(len(batches)))
    flops = round(sum(of["own"] for of in cost.values()) / len(batches))
    tokens = run.batch.sequences * run.data.length
    rate = product_rate(place, getattr(torch, run.precision))
    for row in rows.values():
        if "seconds" in row:
            row["tokens_per_second"] = tokens / row["seconds"]["median"]
            row["utilisation"] = flops / row["seconds"]["median"] / rate
    afresh = build(run, place)
    packages = [p.package for p in PROVIDERS.values() if p.package]
    result = {
        "benchmark": "step",
        "run": {"recipe": run.recipe, "precision": run.precision, "tokens": tokens, "flops": flops, "runs": runs},
        "configuration": to_dict(run),
        "machine": machine(place.type, ("transformers", *packages)) | {"product_flops_per_second": rate},
        "date": time.strftime("%Y-%m-%d"),
        "results": list(rows.values()),
        "phases": phases(afresh.cohort, afresh.batches.at, batches, runs),
    }
    _show(result)
    write_result(out, result)
    return result


def _turn(loop: Loop, batches: Sequence[Sequence[Batch]]) -> Callable[[], None]:
    step = iter(range(10**9))
    return lambda: loop.step(at := next(step), batches[at % len(batches)])


def _comparable(run: Run, device: torch.device, batch: Sequence[Batch], rows: dict[str, dict]) -> dict[str, Loop]:
    """The loops whose gradients agree with ours in float32; why the others do not goes into their rows."""
    exact = replace(run, precision="float32", members={n: _without_dropout(m) for n, m in run.members.items()})
    wanted = _gradients(ours(exact, device), batch)
    loops = {}
    for name in announced(rows, "gradients"):
        provider, row = PROVIDERS[name], rows[name]
        try:
            if provider.same_loss:
                row |= _agreement(_gradients(provider.make(exact, device), batch), wanted)
                if row["cosine"] < COSINE or abs(row["norm_ratio"] - 1) > NORM:
                    raise RuntimeError(
                        f"its gradients differ: cosine {row['cosine']:.5f}, ratio {row['norm_ratio']:.5f}"
                    )
            loops[name] = provider.make(run, device)
        except Exception as error:  # whatever keeps a peer from running is its row's reason
            row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return loops


def _without_dropout(member: MemberConfig) -> MemberConfig:
    return member if member.model is None else replace(member, model=replace(member.model, dropout=0.0))


def _gradients(loop: Loop, batch: Sequence[Batch]) -> list[Tensor]:
    loop.gradients(0, batch)
    return [p.grad for model in loop.models.values() for p in model.parameters() if p.grad is not None]


def _agreement(got: list[Tensor], wanted: list[Tensor]) -> dict:
    one, other = (torch.cat([g.flatten().double() for g in found]) for found in (got, wanted))
    return {"cosine": float(one @ other / one.norm() / other.norm()), "norm_ratio": float(one.norm() / other.norm())}


def _show(result: dict) -> None:
    console, run = Console(), result["run"]
    title = f"{run['recipe']}, {run['tokens']} tokens a step, {run['precision']}"
    table = Table("provider", "seconds", "spread", "tokens/s", "x plain", "utilisation", "peak MB", title=title)
    timed = [row for row in result["results"] if "seconds" in row]
    plain_seconds = next((row["seconds"]["median"] for row in timed if row["provider"] == "plain"), None)
    for row in timed:
        seconds, peak = row["seconds"], row["peak_bytes"]
        table.add_row(
            row["provider"],
            f"{seconds['median']:.4g}",
            f"{seconds['min']:.4g}–{seconds['max']:.4g}",
            f"{row['tokens_per_second']:,.0f}",
            f"{plain_seconds / seconds['median']:.2f}" if plain_seconds else "",
            f"{row['utilisation']:.2f}",
            "" if peak is None else f"{peak / 1e6:.0f}",
        )
    console.print(table)
    for row in result["results"]:
        if "reason" in row:
            console.print(f"not run: {row['provider']}: {row['reason']}", style="dim", highlight=False)
    parts = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in result["phases"].items())
    console.print(f"ours in parts, milliseconds: {parts}", highlight=False)
