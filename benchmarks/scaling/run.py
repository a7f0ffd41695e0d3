"""How the mutual step grows: with the size of its members, their number, the predicted rows, and the vocabulary.

    python benchmarks/scaling/run.py --out benchmarks/scaling/cpu.json --figure docs/scaling.png
    python benchmarks/scaling/run.py --device cuda --out gpu-scaling.json    the same on a GPU, up to 1B parameters
    python benchmarks/scaling/run.py --axes size rows --out FILE             some axes, merged into what FILE has

Members that are all alike each teach all others, on made-up tokens; one thing varies at a time, around a base. Memory
is what tensors took at most at once, beside what `codistill train --plan` says before.

What the arithmetic says beforehand. Products (`codistill.costs`) are linear in the members, in the parameters of the
layers and, with a constant, in the vocabulary; the predicted rows are in the head's products only, so three times the
rows cost far less than three times. Besides there are passes over blocks of rows × vocabulary: the softmaxes, linear
in the M members, and M (M - 1) edges. So time should grow a little faster than the products with M, rows and
vocabulary, where passes over memory are dear (a CPU, narrow members), and with the size a little slower, because wider
products run at a better rate. Memory: 12 bytes a parameter, and the larger of its gradient's 4 and the activations with
the loss's buffers; of rows × vocabulary only a chunk is ever there.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from codistill.bench.measure import interleaved, live_bytes, machine, summary
from codistill.bench.phases import phases, product_rate
from codistill.blocks import COLOURS
from codistill.build import resolved_precision
from codistill.cohort import Cohort
from codistill.config import BatchSize, Data, DistillationConfig, MemberConfig, ModelConfig, Objective, Run
from codistill.costs import member_flops
from codistill.machine import is_out_of_memory, keep_freed_memory
from codistill.models import Predictor
from codistill.objectives import Batch
from codistill.plan import made_up_batch, made_up_cohort, memory_of, model_of, most_at_once, why_not_try
from codistill.progress import shown


@dataclass(frozen=True)
class Point:
    """What is measured: `members` ModernBERTs that are alike, `share` of the tokens predicted."""

    layers: int
    width: int
    vocabulary: int
    sequences: int
    members: int = 2
    share: float = 0.3
    length: int = 128


# All that depends on the device. A CPU's largest pair takes some seconds a step; a GPU's has a billion parameters.
BASES = {
    "cpu": Point(layers=6, width=256, vocabulary=8192, sequences=16),
    "cuda": Point(layers=12, width=768, vocabulary=32768, sequences=128),
}
SIZES = {  # layers × width
    "cpu": [(6, 128), (6, 256), (6, 512), (10, 768)],
    "cuda": [(6, 64), (6, 512), (12, 768), (16, 1024), (24, 1536)],
}
RUNS = {"cpu": 5, "cuda": 9}
_PHASE_RUNS = 2

# axis -> (what the figure calls it, where a point of the result stands on it)
AXES = {
    "size": ("parameters of the pair", "parameters"),
    "members": ("members, all teaching all", "members"),
    "rows": ("predicted rows", "rows"),
    "vocabulary": ("vocabulary", "vocabulary"),
}


def points_of(axis: str, device: str) -> list[Point]:
    """The points of an axis, the base among them."""
    base = BASES[device]
    return {
        "size": [replace(base, layers=layers, width=width) for layers, width in SIZES[device]],
        "members": [replace(base, members=members) for members in (1, 2, 3, 4)],
        "rows": [replace(base, share=share) for share in (0.1, 0.3, 1.0)],
        "vocabulary": [replace(base, vocabulary=2**power) for power in (11, 13, 15, 17)],
    }[axis]


def run_of(point: Point) -> Run:
    """The run whose step is measured."""
    model = ModelConfig(layers=point.layers, width=point.width)
    names = [f"member {number}" for number in range(1, point.members + 1)]
    return Run(
        objective=Objective(mask_rate=point.share),
        data=Data(length=point.length),
        members={name: MemberConfig(model=model) for name in names},
        distillation=[DistillationConfig(teacher=a, student=b) for a in names for b in names if a != b],
        batch=BatchSize(sequences=point.sequences),
    )


def measure(point: Point, device: torch.device, *, runs: int, rate: float) -> dict[str, Any]:
    """A point's row: what it is, FLOPs and bytes as predicted, and, unless it does not fit, which `reason` then says:
    seconds, tokens a second, utilisation (of `rate`), seconds of a step's parts, and the most bytes that tensors took
    at once."""
    gc.collect()
    torch.cuda.empty_cache()  # what it kept of the point before would count as taken
    run = run_of(point)
    precision = getattr(torch, resolved_precision(run, device))
    models = {name: model_of(run, name, point.vocabulary) for name in run.members}
    batch = made_up_batch(run, point.vocabulary).to(device)
    memory = memory_of(run, models, point.vocabulary, precision, device.type)
    predicted = most_at_once(memory)
    flops = sum(of["own"] for of in member_flops(run, models, rows=len(batch.labels_N), steps=range(1)).values())
    parameters = sum(Predictor(model, point.vocabulary).num_parameters for model in models.values())
    row = asdict(point) | {"rows": len(batch.labels_N), "parameters": parameters}
    row |= {"flops": flops, "predicted_bytes": predicted}
    reason = why_not_try(memory, predicted, flops, device)
    if reason:
        return row | {"reason": reason}
    try:
        cohort = made_up_cohort(run, models, point.vocabulary, device, precision)
        most = peak_of_tensors(cohort, batch)
        seconds = summary(interleaved({"step": lambda: _step(cohort, batch)}, runs, device.type)["step"])
        parts = phases(cohort, lambda step: None, [[batch]], _PHASE_RUNS)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return row | {"reason": f"out of memory: {str(error).splitlines()[0][:160]}"}
    tokens = point.sequences * point.length
    return row | {
        "measured_bytes": most,
        "ratio_of_bytes": predicted / most,
        "seconds": seconds,
        "phases": {name: spent for name, spent in parts.items() if name != "data"},
        "tokens_per_second": tokens / seconds["median"],
        "utilisation": flops / seconds["median"] / rate,
    }


def peak_of_tensors(cohort: Cohort, batch: Batch) -> int:
    """Bytes in use at once, at most, during a step; the one before makes the optimizers' states."""
    _step(cohort, batch)
    if cohort.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        _step(cohort, batch)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    kept = [p for member in cohort.trained for p in member.parameters]
    kept += [s for m in cohort.trained for o in m.optimizers for of in o.state.values() for s in of.values()]
    return sum(tensor.nbytes for tensor in kept) + live_bytes(lambda: _step(cohort, batch))


def _step(cohort: Cohort, batch: Batch) -> None:
    cohort.step(0, [batch])


def survey(points: Mapping[str, Sequence[Point]], device: torch.device, runs: int) -> dict[str, Any]:
    """The measured `points` of each axis, with the date and the rate of a large product at that time."""
    total, done, axes = sum(map(len, points.values())), 0, {}
    with shown("points", total) as advance:
        for axis, chosen in points.items():
            precision = resolved_precision(run_of(chosen[0]), device)
            rate = product_rate(device, getattr(torch, precision))
            rows = []
            for point in chosen:
                rows.append(measure(point, device, runs=runs, rate=rate))
                done += 1
                took = rows[-1].get("seconds", {}).get("median")
                advance(done, f"{axis}: {rows[-1]['reason'] if took is None else f'{took:.3g} s a step'}")
            axes[axis] = {
                "date": time.strftime("%Y-%m-%d"),
                "precision": precision,
                "product_flops_per_second": rate,
                "points": rows,
            }
    return axes


def known(place: Path | None, device: torch.device, *, is_added_to: bool) -> dict[str, Any]:
    """What the file has; ends the program if it cannot be read, or cannot be added to: it is of another machine."""
    here = machine(device.type, ("transformers",))
    if place is None or not place.is_file():
        return {"benchmark": "scaling", "machine": here, "axes": {}}
    try:
        before = dict(json.loads(place.read_text()))
    except (ValueError, TypeError):
        sys.exit(f"{place} is no result of this benchmark: give another file")
    if is_added_to and before["machine"] != here:
        sys.exit(f"{place} was measured on another machine, or with other versions: give another file")
    return before


def merged(before: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The newly `found` axes beside those that are known."""
    axes = {**before["axes"], **found}
    return {**before, "axes": {axis: axes[axis] for axis in AXES if axis in axes}}


def figure_of(result: Mapping[str, Any]) -> Any:
    """A figure of matplotlib: seconds a step along each axis, and what the FLOPs alone would have it be."""
    from matplotlib.figure import Figure

    axes = result["axes"]
    figure = Figure(figsize=(10, 2.9), layout="constrained")
    for place, (axis, found) in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes.items(), strict=True):
        if timed := [point for point in found["points"] if "seconds" in point]:
            _draw(place, axis, timed)
    figure.axes[0].set_ylabel("seconds a step", fontsize=8)
    if figure.axes[0].lines:
        figure.axes[0].legend(frameon=False, fontsize=7, loc="best")
    return figure


def _draw(place: Any, axis: str, points: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    label, key = AXES[axis]
    x, seconds = [point[key] for point in points], [point["seconds"] for point in points]
    middle = [of["median"] for of in seconds]
    spread = [[of["median"] - of["min"] for of in seconds], [of["max"] - of["median"] for of in seconds]]
    base = next((p for p in points if _is_base(p)), points[0])
    by_flops = [base["seconds"]["median"] * point["flops"] / base["flops"] for point in points]
    place.plot(x, by_flops, color="black", linewidth=0.8, label="as the FLOPs, from the base")
    place.errorbar(
        x, middle, spread, marker="o", markersize=4, linewidth=1.4, capsize=2, color=COLOURS[0], label="measured"
    )
    place.set_xlabel(label, fontsize=8)
    if axis in ("members", "rows"):
        place.set_ylim(bottom=0)
    else:
        place.set_xscale("log")
        place.set_yscale("log")
        place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        place.yaxis.set_major_formatter("{x:g}")
        place.yaxis.set_minor_locator(NullLocator())
        place.xaxis.set_minor_locator(NullLocator())
    place.set_xticks(x, [_short(value) for value in x])
    place.tick_params(labelsize=7)
    place.spines[["top", "right"]].set_visible(False)


def _short(value: int) -> str:
    """For a tick: 512, 8k, 11M, 1.1B."""
    if value < 1000:
        return str(value)
    if value < 10**6:
        return f"{value / 1024:g}k" if value % 1024 == 0 else f"{value:,}"
    return f"{value / 1e6:.0f}M" if value < 10**9 else f"{value / 1e9:.1f}B"


def _is_base(row: Mapping[str, Any]) -> bool:
    return any(all(row[key] == value for key, value in asdict(base).items()) for base in BASES.values())


def table(result: Mapping[str, Any]) -> Table:
    """The result for the eye."""
    rows = Table(box=SIMPLE, pad_edge=False, collapse_padding=True, title="The mutual step: time and memory")
    for heading in ("axis", "", "s/step", "spread", "tokens/s", "use", "MB", "planned", "ratio"):
        rows.add_column(heading, justify="left" if heading == "axis" else "right", no_wrap=True)
    for axis, found in result["axes"].items():
        for row in found["points"]:
            at = row[AXES[axis][1]]
            rows.add_row(axis, _short(at) if axis == "size" else f"{at:,}", *_cells(row))
    return rows


def reasons(result: Mapping[str, Any]) -> list[str]:
    """A line for each point that was not run."""
    rows = [(axis, row) for axis, found in result["axes"].items() for row in found["points"]]
    return [f"not run: {axis} {row[AXES[axis][1]]:,}: {row['reason']}" for axis, row in rows if "reason" in row]


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "reason" in row:
        return []
    seconds = row["seconds"]
    return [
        f"{seconds['median']:.3g}",
        f"{seconds['min']:.2g}–{seconds['max']:.2g}",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['utilisation']:.2f}",
        f"{row['measured_bytes'] / 1e6:,.0f}",
        f"{row['predicted_bytes'] / 1e6:,.0f}",
        f"{row['ratio_of_bytes']:.2f}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(BASES), default="cpu")
    parser.add_argument("--axes", nargs="*", choices=list(AXES), default=list(AXES), help="none: only draw")
    parser.add_argument("--out", type=Path, help="a JSON file; axes that it has and that are not measured stay")
    parser.add_argument("--figure", type=Path, help="a picture of all axes in the result")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes into the progress
    keep_freed_memory()  # as a run does
    result = known(given.out, device, is_added_to=bool(given.axes))
    for axis in given.axes:  # written one by one, so that a later one's failure costs only itself
        result = merged(result, survey({axis: points_of(axis, given.device)}, device, RUNS[given.device]))
        if given.out is not None:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(result, indent=1) + "\n")
    if not result["axes"]:
        sys.exit("there is nothing to show: name some --axes, or an --out that has some")
    console = Console()
    console.print(table(result))
    for line in reasons(result):
        console.print(line, style="dim", highlight=False)
    if given.figure is not None:
        figure_of(result).savefig(given.figure, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
