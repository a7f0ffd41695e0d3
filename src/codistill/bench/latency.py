"""`codistill bench latency`: how fast models answer, since the point of a small model is its speed."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModel

from codistill.bench.measure import check_counts, interleaved, machine, place_of, write_result
from codistill.errors import UserError
from codistill.families import longest
from codistill.folders import members_of
from codistill.models import load_model

Answer = Callable[[np.ndarray], None]  # computes all logits of (B, T) token ids
PERCENTILES = (50, 90, 99)


def bench_latency(
    models: Sequence[Path],
    *,
    lengths: Sequence[int] = (128, 512),
    batch: int = 16,
    runs: int = 30,
    device: str = "cpu",
    out: Path | None = None,
) -> dict:
    """The measurements as one JSON-able object; prints them as a table, and writes them to `out`.

    `models`: Hugging Face folders, folders that `codistill export` wrote (ONNX and int8 run in onnxruntime), or run
    folders, for all their members. All answer in turns, with full attention over random tokens and logits at every
    position: one sequence at a time for the latency (percentiles of `runs`, in milliseconds), `batch` at a time for the
    throughput (tokens a second, of the median). What is known of their held-out loss (a run's results, an int8
    export's) stands beside the speed. PyTorch computes in float32. Raises UserError for a folder that holds no model
    and a length that a model cannot take.
    """
    place_of(device)
    check_counts(runs=runs, batch=batch, length=min(lengths))
    found: dict[str, Path] = {}
    for name, place in ((name, place) for path in models for name, place in _found(path).items()):
        if found.setdefault(name, place) != place:
            raise UserError(f"models: {place} and {found[name]} would both be called {name}; rename one folder")
    longest_asked = max(lengths)
    answers = {name: _answer(place, device, longest_asked) for name, place in found.items()}
    rows = [_facts(name, place) for name, place in found.items()]
    with torch.inference_mode():
        for length in lengths:
            for sequences, key in ((1, "latency"), (batch, "throughput")):
                ids_BT = np.random.default_rng(0).integers(0, _vocabulary(found), (sequences, length))
                seconds = interleaved({n: partial(answer, ids_BT) for n, answer in answers.items()}, runs, device)
                for row in rows:
                    row.setdefault(key, {})[str(length)] = _summary(seconds[row["model"]], sequences * length)
    result = {
        "benchmark": "latency",
        "setting": {"lengths": list(lengths), "batch": batch, "runs": runs, "device": device},
        "machine": machine(device, ("transformers", "onnxruntime")),
        "date": time.strftime("%Y-%m-%d"),
        "results": rows,
    }
    Console().print(table(result))
    write_result(out, result)
    return result


def table(result: dict) -> Table:
    """A result of `bench_latency` for the eye."""
    lengths, batch = result["setting"]["lengths"], result["setting"]["batch"]
    shown = Table(title=f"One sequence: milliseconds, median (99th percentile); {batch} at a time: tokens/s")
    for heading in ("model", "format", "MB", "held-out loss"):
        shown.add_column(heading)
    for length in lengths:
        shown.add_column(f"{length} tokens", justify="right")
        shown.add_column(f"{batch} × {length}", justify="right")
    for row in result["results"]:
        cells = [row["model"], row["format"], f"{row['bytes'] / 1e6:.1f}"]
        cells.append("" if row["held_out_loss"] is None else f"{row['held_out_loss']:.3f}")
        for length in map(str, lengths):
            one, many = row["latency"][length], row["throughput"][length]
            cells += [f"{one['p50_ms']:.2f} ({one['p99_ms']:.2f})", f"{many['tokens_per_second']:,.0f}"]
        shown.add_row(*cells)
    return shown


def _found(path: Path) -> dict[str, Path]:
    """Folders of models in `path`, by the name that they get in the table."""
    if (path / "run.yaml").is_file():
        return {f"{path.resolve().name}/{name}": place for name, place in members_of(path).items()}
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no model and no finished run; give a model folder, an exported one, or a run folder")
    return {path.name: path}


def _facts(name: str, place: Path) -> dict[str, Any]:
    weights = [*place.glob("*.safetensors"), *place.glob("model.onnx*")]
    results, loss = place.parent.parent / "results.json", None
    if results.is_file():
        loss = json.loads(results.read_text(encoding="utf-8"))["members"].get(place.name, {}).get("loss")
    export = place / "export.json"
    facts: dict[str, Any] = json.loads(export.read_text(encoding="utf-8")) if export.is_file() else {"format": "hf"}
    loss = facts.get("held_out", {}).get(facts["format"], {}).get("loss", loss)
    return {
        "model": name,
        "format": facts["format"],
        "bytes": sum(file.stat().st_size for file in weights),
        "held_out_loss": loss if loss is None or math.isfinite(loss) else None,
    }


def _answer(place: Path, device: str, length: int) -> Answer:
    with torch.device("meta"):
        positions = longest(AutoModel.from_config(AutoConfig.from_pretrained(place)))
    if positions is not None and positions < length:
        raise UserError(f"--length {length}: {place} takes at most {positions} tokens")
    return _onnx(place) if (place / "model.onnx").is_file() else _pytorch(place, device)


def _pytorch(place: Path, device: str) -> Answer:
    model = load_model(str(place), "model", needs_head=False).eval().to(device)  # type: ignore[arg-type]

    def answer(ids_BT: np.ndarray) -> None:
        model(input_ids=torch.from_numpy(ids_BT).to(device))

    return answer


def _onnx(place: Path) -> Answer:
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{place}: onnxruntime is not installed; codistill's extra `onnx` brings it") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(place / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda ids_BT: session.run(None, {"input_ids": ids_BT, "attention_mask": np.ones_like(ids_BT)})


def _vocabulary(found: Mapping[str, Path]) -> int:
    return min(
        json.loads((place / "config.json").read_text(encoding="utf-8"))["vocab_size"] for place in found.values()
    )


def _summary(seconds: list[float], tokens: int) -> dict[str, float]:
    percentiles = {f"p{p}_ms": 1000 * float(np.percentile(seconds, p)) for p in PERCENTILES}
    return percentiles | {"tokens_per_second": tokens / float(np.median(seconds))}
