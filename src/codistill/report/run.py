"""The table and the learning curves of a run folder. A twin is drawn as its original, dashed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from codistill.blocks import COLOURS
from codistill.config import KINDS
from codistill.files import machine_error
from codistill.history import tokens_by
from codistill.loading import load, read_run
from codistill.metrics import read_metrics
from codistill.study.figure import draw_band

_PANELS_IN_A_ROW = 3


def read_results(folder: Path) -> dict[str, Any]:
    """The contents of a finished run's `results.json`; None for what was no number, however that is written."""
    return json.loads((folder / "results.json").read_text(encoding="utf-8"), parse_constant=lambda name: None)


def results_table(folder: Path) -> Table:
    """Held-out loss, perplexity and accuracy of each member of a finished run, beside its twin's if it has one."""
    results = read_results(folder)
    members = results["members"]
    alone = untaught_twins(members)
    unigram = results["held_out"]["unigram_loss"]
    table = Table(
        box=SIMPLE,
        title=f"Held-out {_kind(results)}-LM scores over {results['held_out']['rows']:,} tokens (a single run)",
        caption=f"loss in nats; unigram cross-entropy of the same tokens: {unigram:.3f}\n"
        + ("vs. alone: its loss less that of its twin, the same model trained alone\n" if alone else "")
        + f"{results['tokens']:,} training tokens in {results['seconds']:.0f} s",
    )
    table.add_column("member", overflow="fold", min_width=min(12, max(map(len, members))))
    table.add_column("taught by", overflow="fold")
    columns = ["params", "loss", "perplexity", "accuracy", *(["vs. alone"] if alone else [])]
    for column in columns:  # where a terminal is narrow, names give way before numbers do
        table.add_column(column, justify="right", no_wrap=True, min_width=max(len(column), 6))
    for name, member in members.items():
        table.add_row(*_row(name, member, members.get(alone.get(name, "")), bool(alone)))
    return table


def draw_curves(folder: Path) -> Path | None:
    """Draws held-out loss over training tokens to `curves.png`; None where matplotlib is not installed."""
    try:
        figure = curves_figure(folder)
    except ImportError:
        print("no learning curves: codistill's extra `report` brings matplotlib (docs/install.md)")
        return None
    place = folder / "curves.png"
    try:
        figure.savefig(place, dpi=150)
    except OSError as error:
        raise machine_error(error, place) from error
    return place


def curves_figure(folder: Path) -> Any:
    """Held-out loss over training tokens, as a figure of matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    _draw(figure.subplots(), [folder])
    return figure


def groups_figure(groups: Mapping[str, Sequence[Path]]) -> Any:
    """As `curves_figure`, with a panel for each name, of runs that are equal but for the seed: the mean over seeds and
    a band of one standard deviation."""
    from matplotlib.figure import Figure

    columns = min(len(groups), _PANELS_IN_A_ROW)
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(max(7.2, 4.6 * columns), 4.4 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes, (name, folders) in zip(panels, groups.items(), strict=False):
        _draw(axes, folders)
        axes.set_title(name, fontsize=10)
        axes.tick_params(labelleft=True, labelbottom=True)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    return figure


def _draw(axes: Any, folders: Sequence[Path]) -> None:
    """The curves of runs of the same members."""
    results = read_results(folders[0])
    members, curves = results["members"], [_held_out_curves(folder) for folder in folders]
    originals = [name for name, member in members.items() if not member["twin_of"]]
    for name in curves[0]:
        # Runs that stopped early, or had a loss that is no number, have fewer points than others.
        known = [dict(of.get(name, [])) for of in curves]
        tokens = sorted(set.intersection(*map(set, known)))
        if not tokens:
            continue
        original, teachers = members[name]["twin_of"], members[name]["taught_by"]
        draw_band(
            axes,
            np.array(tokens),
            np.array([[of[at] for at in tokens] for of in known]),
            color=COLOURS[originals.index(original or name) % len(COLOURS)],
            linestyle="--" if original else "-",
            label=f"{name}, taught by {' and '.join(teachers)}" if teachers else name,
        )
    unigram = results["held_out"]["unigram_loss"]
    axes.axhline(unigram, color="0.6", linewidth=0.8)
    axes.annotate(
        "unigram", (0.99, unigram), (0, 2), axes.get_yaxis_transform(), "offset points",
        color="0.4", fontsize=8, ha="right", va="bottom",
    )  # fmt: skip
    spread = "\nmean ± 1 sd of seeds" if len(folders) > 1 else ""
    axes.set(xlabel="training tokens (millions)", ylabel=f"held-out {_kind(results)}-LM loss (nats){spread}")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _kind(results: dict[str, Any]) -> str:
    return KINDS[results.get("objective", "mlm")]  # of older folders, which do not say


def untaught_twins(members: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """For each member that is taught, its twin that is not, if it has one."""
    pairs = [(name, member["twin_of"]) for name, member in members.items() if member["twin_of"]]
    both_ways = [*pairs, *((original, twin) for twin, original in pairs)]
    return {one: two for one, two in both_ways if members[one]["taught_by"] and not members[two]["taught_by"]}


def _row(name: str, member: dict, twin: dict | None, has_twins: bool) -> list[str]:
    row = [
        name,
        taught_by(member),
        f"{member['parameters'] / 1e6:.2f} M",
        *scores_of(member),
    ]
    return [*row, versus(member, twin)] if has_twins else row


def taught_by(member: Mapping[str, Any]) -> str:
    """The teachers of a member, as a cell of a table."""
    return "frozen" if member["frozen"] else ", ".join(member["taught_by"]) or "nobody"


def scores_of(member: Mapping[str, Any]) -> list[str]:
    """A member's held-out loss, perplexity and accuracy as the cells of a table."""
    perplexity = "too large" if member["perplexity"] is None else f"{member['perplexity']:.1f}"
    losses = ["no number", ""] if member["loss"] is None else [f"{member['loss']:.3f}", perplexity]
    return [*losses, f"{member['accuracy']:.1%}"]


def skipped_steps(results: Mapping[str, Any]) -> str:
    """How many steps of a run were skipped, as a sentence; nothing where none was."""
    if not results.get("skipped"):
        return ""
    return f"{results['skipped']:,} of {results['steps']:,} steps were skipped: a loss or gradient was not finite."


def versus(member: Mapping[str, Any], twin: Mapping[str, Any] | None) -> str:
    """A taught member's loss less its twin's, which nobody taught; empty without such a twin, or where one of the
    losses is no number."""
    return "" if twin is None or None in (member["loss"], twin["loss"]) else f"{member['loss'] - twin['loss']:+.3f}"


def _held_out_curves(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """(millions of tokens, loss) points of every member that was trained."""
    results, run = read_results(folder), load(read_run(folder / "run.yaml"))
    learned = [name for name, member in results["members"].items() if not member["frozen"]]
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        for name, score in line.get("held_out", {}).items():
            if name in learned and score["loss"] is not None:
                curves.setdefault(name, []).append((tokens_by(run, line["step"]) / 1e6, score["loss"]))
    return curves
