"""The printed tables of an evaluation."""

import math
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

_SCORES = "Scores (mean ± standard deviation over seeds)"
_ANY_WIDTH = 100_000  # at which a table takes what it wants


def tables(results: Mapping[str, Any], width: int) -> Group:
    """Scores by task and model, differences to the first model, and what failed or was cut, for so many columns of
    characters."""
    found = results["comparisons"]
    models = list(found["averages"])
    scores = _side_by_side(found, models)
    if Console(width=_ANY_WIDTH).measure(scores).maximum > width:
        scores = _one_below_another(found, models)
    return Group(scores, *_differences(found, models), *(Text(line) for line in notes(results)))


def notes(results: Mapping[str, Any]) -> list[str]:
    """One line for each thing a reader of the table must know."""
    lines = []
    for cell in results["cells"]:
        if cell["failed"]:
            seed = "" if cell["seed"] is None else f", seed {cell['seed']}"
            lines.append(f"failed: {cell['task']} of {cell['model']}{seed}: {cell['failed']}")
    partial = {c["task"]: c["counted"].get("partial") for c in results["cells"] if c["counted"].get("partial")}
    for task, splits in partial.items():
        parts = ", ".join(f"{split} {share}" for split, share in splits.items())
        lines.append(f"partial: {task} ({parts} examples): not comparable with published scores")
    ways = {c["model"]: c["counted"]["scored_as"] for c in results["cells"] if "scored_as" in c["counted"]}
    if len({str(way) for way in ways.values()}) > 1:
        said = "; ".join(
            f"{model}: {way['objective']}, {way['tokens_a_row']} tokens a row, tokenizer {way['tokenizer'][:6]}"
            for model, way in ways.items()
        )
        lines.append(f"mlm: not all losses can be compared ({said})")
    for task, cut in {c["task"]: c["counted"].get("truncated") for c in results["cells"]}.items():
        total = sum(cut.values()) if isinstance(cut, Mapping) else cut or 0
        if total:
            lines.append(f"truncated: {task}: {total} texts")
    if kept := results.get("kept"):
        lines.append(
            f"kept: {kept} more cells of earlier calls; name their models, tasks, seeds… again to see them here"
        )
    return list(dict.fromkeys(lines))


def _side_by_side(found: Mapping[str, Any], models: list[str]) -> Table:
    table = Table(box=SIMPLE, title=_SCORES)
    table.add_column("task")
    for model in models:
        table.add_column(model, justify="right")
    for task, scores in _scores(found, models):
        table.add_row(task, *scores)
    return table


def _one_below_another(found: Mapping[str, Any], models: list[str]) -> Table:
    table = Table(box=SIMPLE, title=_SCORES)
    for column in ("task", "model", "score"):
        table.add_column(column, justify="right" if column == "score" else "left", overflow="fold")
    for task, scores in _scores(found, models):
        for number, (model, score) in enumerate(zip(models, scores, strict=True)):
            table.add_row("" if number else task, model, score)
        table.add_section()
    return table


def _scores(found: Mapping[str, Any], models: list[str]) -> list[tuple[str, list[str]]]:
    """Each task, and the averages of GLUE, with the score of every model."""
    rows = [(task, [_cell(task, of.get(model)) for model in models]) for task, of in found["tasks"].items()]
    for name in ("with_wnli", "without_wnli"):
        parts = {model: found["averages"][model][name] for model in models}
        if all(len(part["of"]) > 1 for part in parts.values()) and (name == "with_wnli" or _has_wnli(parts, found)):
            shown = [_average(part) for part in parts.values()]
            rows.append((f"GLUE average, {name.replace('_', ' ').replace('wnli', 'WNLI')}", shown))
    return rows


def _has_wnli(parts: Mapping, found: Mapping) -> bool:
    return any("wnli" in average["with_wnli"]["of"] for average in found["averages"].values())


def _differences(found: Mapping[str, Any], models: list[str]) -> list[Table]:
    if len(models) < 2:
        return []
    table = Table(box=SIMPLE, title=f"Differences to {found['reference']}")
    for column in ("task", "model", "difference", "95 % over seeds", "95 % over examples", "agreement"):
        table.add_column(column, justify="left" if column in ("task", "model") else "right", overflow="fold")
    for task, by_model in found["paired"].items():
        for model, pair in by_model.items():
            if pair["mean"] is None:
                continue
            scale, digits = _scale(task)
            interval = _interval(pair["interval"], scale, digits) + ("" if pair["headline"] else f" ({pair['seeds']})")
            over = _interval(pair["examples_interval"], scale, digits)
            agrees = found["agreement"][task].get(model)
            shown = "" if agrees is None else f"{agrees:.1%}" if not math.isnan(agrees) else "nan"
            table.add_row(task, model, f"{pair['mean'] * scale:+.{digits}f}", interval, over, shown)
    table.caption = "(n): fewer than 5 seeds, no headline"
    return [table] if table.row_count else []


def _cell(task: str, summary: Mapping[str, Any] | None) -> str:
    if summary is None or summary["mean"] is None:
        return "failed" if summary else ""
    scale, digits = _scale(task)
    spread = "" if summary["sd"] is None else f" ± {summary['sd'] * scale:.{digits}f}"
    some = f" ({summary['seeds']} of {summary['seeds'] + len(summary['failed'])} seeds)" if summary["failed"] else ""
    return f"{summary['mean'] * scale:.{digits}f}{spread}{some}"


def _average(part: Mapping[str, Any]) -> str:
    if part["mean"] is None:
        return ""
    missing = f", {len(part['missing'])} missing" if part["missing"] else ""
    return f"{part['mean'] * 100:.1f} (of {len(part['of'])}{missing})"


def _scale(task: str) -> tuple[float, int]:
    """Losses in nats with three digits, everything else in points of a hundred."""
    return (1, 3) if task == "mlm" else (100, 1)


def _interval(bounds: Any, scale: float, digits: int) -> str:
    return "" if bounds is None else f"{bounds[0] * scale:+.{digits}f} … {bounds[1] * scale:+.{digits}f}"
