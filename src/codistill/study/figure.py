"""A study's figure: its contrasts with intervals, and learning curves with bands over seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codistill.blocks import COLOURS
from codistill.study.analysis import SHOWN
from codistill.study.cells import Cell
from codistill.study.design import Study


def draw(study: Study, found: Mapping[str, Any], cells: Sequence[Cell], place: Path) -> None:
    """Writes the picture, or says what it takes to have one."""
    try:
        figure = figure_of(study, found, cells)
    except ImportError:
        print("no figure: codistill's extra `report` brings matplotlib (docs/install.md)")
        return
    figure.savefig(place, dpi=120, metadata={"Software": None})


def figure_of(study: Study, found: Mapping[str, Any], cells: Sequence[Cell]) -> Any:
    """A figure of matplotlib: for each regime learning curves above, and below all contrasts side by side."""
    from matplotlib.figure import Figure

    regimes = list(found["regimes"])
    names = _row_names(found)
    heights = [3.2, 0.75 + 0.27 * len(names), *([3.6] if study.over_passes else [])]
    figure = Figure(figsize=(1 + 4.6 * max(1, len(regimes)), sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    above: Any = parts[0].subplots(1, max(1, len(regimes)), squeeze=False, sharey=True)[0]
    below: Any = parts[1].subplots(1, max(1, len(regimes)), squeeze=False, sharex=True)[0]
    for column, regime in enumerate(regimes):
        draw_curves(above[column], study, [c for c in cells if c["regime"] == regime])
        above[column].set_title(regime, fontsize=10)
        draw_contrasts(below[column], found["regimes"][regime]["contrasts"], names, named=column == 0)
    if study.over_passes:
        draw_over_passes(parts[2].subplots(), found)
    return figure


_NOT_SHOWN = "#888888"


def _row_names(found: Mapping[str, Any]) -> dict[str, str]:
    """The contrasts of all regimes, each with how many seeds it has."""
    seeds: dict[str, set[int]] = {}
    for of in found["regimes"].values():
        for c in of["contrasts"]:
            seeds.setdefault(c["label"], set()).add(c["loss"]["seeds"])
    return {label: f"{label} ({' or '.join(map(str, sorted(of)))})" for label, of in seeds.items()}


def draw_over_passes(axes: Any, found: Mapping[str, Any]) -> None:
    """Each difference of the loss, with its 95 % interval, over the passes of the regimes at equal steps."""
    lines: dict[str, list[tuple[float, float, float, bool]]] = {}
    for of in found["regimes"].values():
        for c in of["contrasts"]:
            if c["loss"]["interval"] is not None:
                half = (c["loss"]["interval"][1] - c["loss"]["interval"][0]) / 2
                is_shown = c["loss"]["verdict"] != "not shown"
                lines.setdefault(c["label"], []).append((max(of["passes"]), c["loss"]["mean"], half, is_shown))
    for number, (label, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot([], [], color=colour, label=label)
        for often, mean, half, is_shown in sorted(points):
            axes.errorbar(
                max(often, 1) * 1.06**number, mean, half, marker="o", markersize=4, linewidth=1.2, capsize=2,
                color=colour, markerfacecolor=colour if is_shown else "white",
            )  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.7)
    passes = sorted({max(1, round(x)) for points in lines.values() for x, *_ in points})
    axes.set_xscale("log")
    axes.set_xticks(passes, [str(often) for often in passes])
    axes.minorticks_off()
    axes.set_xlabel("passes over the text at equal steps (1: less than one)", fontsize=8)
    axes.set_ylabel("difference of the held-out loss (nats)\n95 % interval over seeds; filled: excludes 0", fontsize=8)
    _plain(axes)
    if lines:  # above the intervals, which reach everywhere
        axes.legend(frameon=False, fontsize=7, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))


def costs_figure(found: Mapping[str, Any]) -> Any:
    """Quality against what it cost: a row for each regime, parameters, FLOPs and seconds from left to right."""
    from matplotlib.figure import Figure

    regimes = list(found["regimes"])
    figure = Figure(figsize=(11, 3.6 * max(1, len(regimes))), layout="constrained")
    axes = figure.subplots(max(1, len(regimes)), 3, squeeze=False, sharey="row")
    for line, regime in zip(axes, regimes, strict=False):
        for place, (key, label) in zip(line, _COSTS, strict=True):
            _draw_costs(place, found["regimes"][regime]["rows"], key)
            place.set_xlabel(label, fontsize=8)
        line[0].set_ylabel(f"{regime}: held-out loss (nats)", fontsize=8)
    return figure


_COSTS = (
    ("parameters", "parameters (millions)"),
    ("flops", "training FLOPs, teachers' passes included"),
    ("seconds", "training seconds"),
)


def _draw_costs(axes: Any, rows: Mapping[str, Mapping[str, Any]], key: str) -> None:
    roles = list(dict.fromkeys(name.rpartition("/")[2] for name in rows))
    for number, role in enumerate(roles):
        own = {name.rpartition("/")[0]: row for name, row in rows.items() if name.rpartition("/")[2] == role}
        unit = 1e6 if key == "parameters" else 1
        x, y = [row[key] / unit for row in own.values()], [row["loss"]["mean"] for row in own.values()]
        error = [row["loss"]["sd"] or 0.0 for row in own.values()]
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(x, y, error, fmt="o", color=colour, markersize=4, linewidth=0.8, label=role)
        if key == "flops":
            for name, at, loss in zip(own, x, y, strict=True):
                axes.annotate(name, (at, loss), fontsize=5.5, xytext=(3, 2), textcoords="offset points")
    values = [row[key] for row in rows.values() if row[key]]
    if values and max(values) > 20 * min(values):
        axes.set_xscale("log")
    _plain(axes)
    if axes.has_data():
        axes.legend(frameon=False, fontsize=7)


def draw_curves(axes: Any, study: Study, cells: Sequence[Cell]) -> None:
    """Held-out loss over tokens: the mean over seeds, and a band of one standard deviation."""
    for number, name in enumerate(study.curves):
        arm, _, role = name.rpartition("/")
        curves = [c["members"][role]["curve"] for c in cells if c["arm"] == arm and role in c["members"]]
        if not curves:
            continue
        tokens = np.array(curves[0])[:, 0] / 1e6
        losses = np.array([np.array(curve)[:, 1] for curve in curves])
        draw_band(axes, tokens, losses, color=COLOURS[number % len(COLOURS)], linewidth=1.4, label=name)
    axes.set_xlabel("training tokens (millions)", fontsize=8)
    axes.set_ylabel("held-out loss (nats), mean ± 1 sd of seeds", fontsize=8)
    axes.tick_params(labelleft=True)
    _plain(axes)
    if axes.has_data():
        axes.legend(frameon=False, fontsize=7)


def draw_band(axes: Any, tokens: np.ndarray, losses: np.ndarray, color: str, **line: Any) -> None:
    """The mean of `losses` (seeds × tokens) as a line, and a band of one standard deviation over seeds."""
    mean = losses.mean(0)
    axes.plot(tokens, mean, color=color, **line)
    if len(losses) > 1:
        sd = losses.std(0, ddof=1)
        axes.fill_between(tokens, mean - sd, mean + sd, color=color, alpha=0.15, linewidth=0)


def draw_contrasts(axes: Any, contrasts: Sequence[Mapping[str, Any]], names: Mapping[str, str], named: bool) -> None:
    """Differences of the loss with 95 % intervals, black and filled where the interval excludes 0.

    Each in the row that its label has among `names`, which are written out where the axes are `named`.
    """
    rows = {label: row for row, label in enumerate(names)}
    for c in contrasts:
        row, of = rows[c["label"]], c["loss"]
        if of["mean"] is None:
            continue
        is_shown = of["verdict"] in SHOWN
        colour = "black" if is_shown else _NOT_SHOWN
        if of["interval"] is not None:
            axes.plot(of["interval"], [row, row], color=colour, linewidth=1.5)
        axes.plot([of["mean"]], [row], "o", color=colour, markersize=5, markerfacecolor=colour if is_shown else "white")
    axes.axvline(0, color="black", linewidth=0.7)
    axes.set_yticks(range(len(names)), list(names.values()) if named else [""] * len(names))
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)  # none is there yet where a study has just begun
    words = "difference of the held-out loss (nats; below 0 is better)\n95 % over (so many) seeds; black: excludes 0"
    axes.set_xlabel(words, fontsize=8)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
