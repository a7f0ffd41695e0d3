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
    """A figure of matplotlib: for each regime learning curves above, and below all contrasts side by side, or, of a
    study `over_passes`, over the passes of its regimes."""
    from matplotlib.figure import Figure

    regimes = list(found["regimes"])
    names = _row_names(found)
    heights = [3.2, 3.2 if study.over_passes else 0.75 + 0.27 * len(names)]
    figure = Figure(figsize=(1 + 4.6 * max(1, len(regimes)), sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    above, below = parts
    for axes, regime in zip(_columns_of(above, len(regimes), sharey=True), regimes, strict=False):
        draw_curves(axes, study, [c for c in cells if c["regime"] == regime])
        axes.set_title(regime, fontsize=10)
    if study.over_passes:
        draw_over_passes(below, found, names)
        return figure
    for column, (axes, regime) in enumerate(zip(_columns_of(below, len(regimes), sharex=True), regimes, strict=False)):
        draw_contrasts(axes, found["regimes"][regime]["contrasts"], names, named=column == 0)
    return figure


def _columns_of(figure: Any, number: int, **shared: bool) -> Any:
    """Axes side by side; one where there is nothing to draw yet."""
    return figure.subplots(1, max(1, number), squeeze=False, **shared)[0]


_NOT_SHOWN = "#888888"


def _row_names(found: Mapping[str, Any]) -> dict[str, str]:
    """The contrasts of all regimes, each with how many seeds it has."""
    seeds: dict[str, set[int]] = {}
    for of in found["regimes"].values():
        for c in of["contrasts"]:
            seeds.setdefault(c["label"], set()).add(c["loss"]["seeds"])
    return {label: f"{label} ({' or '.join(map(str, sorted(of)))})" for label, of in seeds.items()}


def draw_over_passes(figure: Any, found: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Each difference of the loss, with its 95 % interval, over the passes of the regimes at equal steps.

    Contrasts that are alike up to the last comma of their label ("large: CTCD, weight 1 − alone") share axes.
    """
    alike: dict[str, list[str]] = {}
    for label in names:
        alike.setdefault(label.rpartition(", ")[0], []).append(label)
    for axes, (title, labels) in zip(_columns_of(figure, len(alike), sharey=True), alike.items(), strict=False):
        for number, label in enumerate(labels):
            _draw_gains(axes, found, label, names[label].removeprefix(f"{title}, "), number)
        axes.set_title(title, fontsize=10)
        axes.axhline(0, color="black", linewidth=0.7)
        passes = sorted({max(1, round(max(of["passes"]))) for of in found["regimes"].values()})
        axes.set_xscale("log")
        axes.set_xticks(passes, [str(often) for often in passes])
        axes.minorticks_off()
        axes.tick_params(labelleft=True)
        axes.set_xlabel("passes over the text at equal steps (1: less than one)", fontsize=8)
        words = "difference of the held-out loss (nats)\n95 % over (so many) seeds; filled: excludes 0"
        axes.set_ylabel(words, fontsize=8)
        axes.legend(frameon=False, fontsize=7)
        _plain(axes)


def _draw_gains(axes: Any, found: Mapping[str, Any], label: str, name: str, number: int) -> None:
    """One contrast in all regimes, as a line; the `number`-th beside the others of its axes."""
    of_label = [(of, c["loss"]) for of in found["regimes"].values() for c in of["contrasts"] if c["label"] == label]
    points = sorted((max(of["passes"]), *loss["interval"], loss) for of, loss in of_label if loss["interval"])
    colour, places = COLOURS[number % len(COLOURS)], [max(often, 1) * 1.06**number for often, *_ in points]
    axes.plot(places, [loss["mean"] for *_, loss in points], color=colour, linewidth=0.8, alpha=0.5, label=name)
    for place, (_, low, high, loss) in zip(places, points, strict=True):
        mark = colour if loss["verdict"] in SHOWN else "white"
        axes.errorbar(
            place, loss["mean"], (high - low) / 2, marker="o", markersize=4, linewidth=1.2, capsize=2, color=colour,
            markerfacecolor=mark,
        )  # fmt: skip


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
        _name_points(line[1], found["regimes"][regime]["rows"])  # FLOPs, in which arms of one role differ most
        line[0].set_ylabel(f"{regime}: held-out loss (nats)", fontsize=8)
    return figure


_COSTS = (
    ("parameters", "parameters (millions)"),
    ("flops", "training FLOPs with teachers' passes"),
    ("seconds", "training seconds"),
)


def _draw_costs(axes: Any, rows: Mapping[str, Mapping[str, Any]], key: str) -> None:
    for role, colour in _roles(rows).items():
        own = [row for name, row in rows.items() if name.rpartition("/")[2] == role]
        unit = 1e6 if key == "parameters" else 1
        x, y = [row[key] / unit for row in own], [row["loss"]["mean"] for row in own]
        error = [row["loss"]["sd"] or 0.0 for row in own]
        axes.errorbar(x, y, error, fmt="o", color=colour, markersize=4, linewidth=0.8, label=role)
    values = [row[key] for row in rows.values() if row[key]]
    if values and max(values) > 20 * min(values):
        axes.set_xscale("log")
    _plain(axes)
    if axes.has_data():
        axes.legend(frameon=False, fontsize=7)


def _roles(rows: Mapping[str, Any]) -> dict[str, str]:
    """The colour of each role."""
    roles = dict.fromkeys(name.rpartition("/")[2] for name in rows)
    return {role: COLOURS[number % len(COLOURS)] for number, role in enumerate(roles)}


def _name_points(axes: Any, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Each arm's name to the right of its FLOPs, in its role's colour; those that would lie on one another apart."""
    colours, names = _roles(rows), list(rows)
    if not names:
        return
    points = np.array([[row["flops"], row["loss"]["mean"]] for row in rows.values()])
    axes.autoscale_view()
    # In the axes' own units, 0 to 1: what is far apart is the same on a logarithmic scale.
    seen = axes.transAxes.inverted().transform(axes.transData.transform(points))
    for near in _columns(seen[:, 0]):
        order = sorted(near, key=lambda i: seen[i, 1])
        heights = spread([seen[i, 1] for i in order], _LINE)
        for i, height in zip(order, heights, strict=True):
            arm, _, role = names[i].rpartition("/")
            axes.annotate(
                arm, points[i], (max(seen[near, 0]) + 0.025, height), "data", "axes fraction",
                fontsize=5.5, va="center", color=colours[role],
                arrowprops={"arrowstyle": "-", "color": colours[role], "linewidth": 0.3, "shrinkA": 0, "shrinkB": 2},
            )  # fmt: skip


_LINE = 0.036  # of the axes' height: a line of the names' size
_WORD = 0.16  # of their width: a name's


def _columns(x: np.ndarray) -> list[list[int]]:
    """Points whose names, to their right, could lie on one another: those nearer than a name is wide, in chains."""
    order = np.argsort(x, kind="stable")
    starts = np.flatnonzero(np.diff(x[order], prepend=-np.inf) > _WORD)
    return [column.tolist() for column in np.split(order, starts[1:])]


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Heights at least `gap` apart in the order of `wanted` (ascending), with the least squares between the two.

    Less i · gap they must not fall, so this is isotonic regression: neighbours that do are put at their mean (the
    pool-adjacent-violators algorithm, Ayer et al. 1955).
    """
    pools: list[tuple[float, int]] = []  # mean, how many
    for number, height in enumerate(wanted):
        mean, size = height - number * gap, 1
        while pools and pools[-1][0] > mean:
            other, others = pools.pop()
            mean, size = (mean * size + other * others) / (size + others), size + others
        pools.append((mean, size))
    level = [mean for mean, size in pools for _ in range(size)]
    return [mean + number * gap for number, mean in enumerate(level)]


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
    axes.xaxis.get_offset_text().set_fontsize(7)
    axes.spines[["top", "right"]].set_visible(False)
