"""A study's numbers as a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from codistill.blocks import Block, Heading, Table, Text
from codistill.study.analysis import OVERFITS, SHOWN
from codistill.study.design import ONE_PASS

_NOTHING = {"mean": None, "sd": None}


def study_blocks(found: Mapping[str, Any]) -> list[Block]:
    """All tables of `analysis`, one regime after the other, with what a reader must know beside them."""
    blocks: list[Block] = [Text(made(found))]
    if found["missing"]:
        blocks.append(Text(f"Not trained yet: {found['missing']} of {found['arms']} arms.", important=True))
    if told := _many(found["regimes"]):
        blocks.append(Text(told))
    for regime, of in found["regimes"].items():
        blocks += [Heading(regime, 3), Text(_facts(of)), *_warnings(regime, of), contrasts_table(of), rows_table(of)]
        blocks += [*_at_best(of), *_glue(of, found["partial"]), *_along(of)]
    if found["failed"]:
        blocks.append(Heading("Failed", 3))
        reasons = [[c["arm"], c["regime"], str(c["seed"]), c["failed"]] for c in found["failed"]]
        blocks.append(Table(["arm", "regime", "seed", "why"], reasons, words=(1, 3)))
    return blocks


def made(found: Mapping[str, Any]) -> str:
    """When, on which machines and with which versions the cells were made."""
    machines = "; ".join(
        f"{m['device']}, {m['threads']} thread{'s' if m['threads'] != 1 else ''} a process, {m['precision']}"
        for m in found["machines"]
    )
    versions = "; ".join(", ".join(f"{name} {v}" for name, v in of.items()) for of in found["versions"])
    days = found["dates"]
    when = f"{days[0]} to {days[-1]}" if len(days) > 1 else "".join(days)
    return f"Scale {found['scale']}. Made {when} on {machines or 'nothing yet'} with {versions or 'nothing yet'}."


def text_used(cells: Sequence[Mapping[str, Any]]) -> str:
    """Which text the cells were made from: what it was called, if they say so, and its content."""
    done = [cell for cell in cells if not cell["failed"]]
    if not done:
        return "Which text was given is not known: no arm is finished."
    names = sorted({name for cell in done for name in cell.get("text_names", [])})
    content = ", ".join(f"{split} {identity[:16]}" for split, identity in done[0]["text"].items())
    return f"Text, as given with --data: {' and '.join(names) or 'its name was not recorded'}; by content: {content}."


def _facts(of: Mapping[str, Any]) -> str:
    unigram = f"{of['unigram_loss']:.3f} nats" if of["unigram_loss"] is not None else "not known"
    return (
        f"{span(of['steps'], ',')} steps, {span(of['tokens'], ',')} tokens, {span(of['passes'], '.3g')} passes; "
        f"unigram cross-entropy of the held-out text {unigram}."
    )


def _many(regimes: Mapping[str, Any]) -> str:
    """How much so many differences show together."""
    tested = [c for of in regimes.values() for c in of["contrasts"] if c["p"] is not None]
    if len(tested) < 2:
        return ""
    shown, corrected = sum(c["loss"]["verdict"] in SHOWN for c in tested), sum(c["holm"] for c in tested)
    still = f"{corrected} still do{'es' if corrected == 1 else ''} (“by Holm too”)" if corrected else "none still does"
    return (
        f"Of {len(tested)} differences of the loss {shown or 'none'} exclude{'s' if shown == 1 else ''} 0, each by "
        f"itself; with Holm's correction for their number, 5 % for all together, {still}."
    )


def span(values: Sequence[float], style: str) -> str:
    """The least and the greatest of sorted values, or the only one."""
    shown = [format(value, style) for value in values]
    return "no" if not shown else shown[0] if shown[0] == shown[-1] else f"{shown[0]} to {shown[-1]}"


def _warnings(regime: str, of: Mapping[str, Any]) -> list[Block]:
    more = max(of["passes"], default=0)
    again: list[Block] = [Text(f"The text is too short for one pass: it was seen {more:.3g} times.", important=True)]
    return (again if regime == ONE_PASS and more > 1 else []) + [
        Text(_how_far(name, overfits, found), important=True)
        for (name, overfits), found in _by_name(of["on_the_plateau"]).items()
    ]


def _by_name(warnings: Sequence[Mapping[str, Any]]) -> dict[tuple[str, bool], list[Mapping[str, Any]]]:
    """The warnings of each member, those of seeds that had been further and came back apart from the others."""
    found: dict[tuple[str, bool], list[Mapping[str, Any]]] = {}
    for of in warnings:
        found.setdefault((of["member"], of["best"] - of["below"] >= OVERFITS), []).append(of)
    return found


def _how_far(name: str, overfits: bool, found: Sequence[Mapping[str, Any]]) -> str:
    seeds = f"seed{'s' if len(found) > 1 else ''} {', '.join(str(of['seed']) for of in found)}"
    (end, where), (best, there) = (_from_unigram([of[what] for of in found]) for what in ("below", "best"))
    if overfits:
        return f"Overfits: {name}, {seeds}, ended {end} nats {where} the unigram, and was {best} {there} at its best."
    only = "only " if where == "below" else ""
    return f"On the plateau: {name}, {seeds}, ended {only}{end} nats {where} the unigram."


def _from_unigram(below: Sequence[float]) -> tuple[str, str]:
    """How many nats, and whether below the unigram or above it."""
    if max(below) < 0:
        return span(sorted(-value for value in below), ".2f"), "above"
    if min(below) < 0:
        return f"{-min(below):.2f} nats above to {max(below):.2f}", "below"
    return span(sorted(below), ".2f"), "below"


def contrasts_table(of: Mapping[str, Any]) -> Table:
    """Differences with their intervals and what they show."""
    head = ["treated − control", "seeds", "Δ loss, nats", "95 % interval", "shown"]
    head += ["Δ BLiMP, points", "95 % interval", "shown"]
    has_glue = any(c["glue"]["mean"] is not None for c in of["contrasts"])
    head += ["Δ GLUE, points", "95 % interval", "shown"] if has_glue else []
    return Table(head, [_contrast(c, has_glue) for c in of["contrasts"]], words=(3, 4, 6, 7, 9, 10))


def _contrast(c: Mapping[str, Any], has_glue: bool) -> list[str]:
    seeds = c["loss"]["seeds"]
    loss, by_holm = difference(c["loss"], 3, seeds), ", by Holm too" if c["holm"] else ""
    of = [[*loss[:2], loss[2] + by_holm], difference(c["blimp"], 2, seeds)]
    of += [difference(c["glue"], 2, seeds)] if has_glue else []
    return [c["label"], str(seeds), *(cell for cells in of for cell in cells)]


def difference(of: Mapping[str, Any], digits: int, seeds: int | None = None) -> list[str]:
    """Mean, interval and verdict of a score, which not all of the row's `seeds` may have."""
    if of["mean"] is None:
        return ["", "", of["verdict"]]
    interval = "" if of["interval"] is None else f"[{of['interval'][0]:+.{digits}f}, {of['interval'][1]:+.{digits}f}]"
    fewer = f"(of {of['seeds']} only)" if seeds not in (None, of["seeds"]) else ""
    return [f"{of['mean']:+.{digits}f}", " ".join(filter(None, (interval, fewer))), of["verdict"]]


def rows_table(of: Mapping[str, Any]) -> Table:
    """Every model: its size, what it cost, and its scores."""
    head = ["arm / member", "seeds", "parameters", "FLOPs (of teachers)", "seconds", "held-out loss", "BLiMP, %"]
    return Table([*head, "peers agree"], [_row(name, row) for name, row in of["rows"].items()])


def _row(name: str, row: Mapping[str, Any]) -> list[str]:
    teachers = f" ({row['teacher_flops']:.2g})" if row["teacher_flops"] else ""
    agreement = "" if row["agreement"] is None else f"{100 * row['agreement']:.1f} %"
    cost = [f"{row['parameters'] / 1e6:.2f} M", f"{row['flops']:.3g}{teachers}", f"{row['seconds']:.0f}"]
    return [name, str(len(row["seeds"])), *cost, spread(row["loss"], 3), spread(row["blimp"], 1), agreement]


def spread(of: Mapping[str, float | None], digits: int) -> str:
    """Mean ± standard deviation, as far as they are known."""
    if of["mean"] is None:
        return ""
    return f"{of['mean']:.{digits}f}" + ("" if of["sd"] is None else f" ± {of['sd']:.{digits}f}")


def _glue(of: Mapping[str, Any], partial: Mapping[str, Mapping[str, str]]) -> list[Block]:
    """The tasks of GLUE, where any was asked for."""
    tasks = list(dict.fromkeys(task for row in of["rows"].values() for task in row["tasks"]))
    if not tasks:
        return []
    rows = [
        [name, *(spread(row["tasks"].get(task, _NOTHING), 1) for task in tasks), spread(row["glue"], 1)]
        for name, row in of["rows"].items()
    ]
    short = [f"{task} ({', '.join(f'{split} {n}' for split, n in splits.items())})" for task, splits in partial.items()]
    words = "GLUE, fine-tuned once for each seed; the mean is that of the eight without WNLI."
    not_whole = [Text(f"Not whole, so not comparable with published scores: {'; '.join(short)}.", important=True)]
    head = ["arm / member", *(task.removeprefix("glue/") for task in tasks), "mean"]
    return [Text(words), *(not_whole if short else []), Table(head, rows)]


def _at_best(of: Mapping[str, Any]) -> list[Block]:
    """The contrasts where each model is taken at its best, if some overfit."""
    if not of["at_best"]:
        return []
    words = (
        "Some of these models overfit. Δ loss with each at the best point of its learning curve, chosen on the text "
        "that it is scored on, for both sides alike:"
    )
    head = ["treated − control", "seeds", "Δ loss, nats", "95 % interval", "shown"]
    rows = [[line["label"], str(line["loss"]["seeds"]), *difference(line["loss"], 3)] for line in of["at_best"]]
    return [Text(words), Table(head, rows, words=(3, 4))]


def _along(of: Mapping[str, Any]) -> list[Block]:
    """The contrasts of the loss at points along training, where a study asks for them."""
    lines = [line for line in of["along"] if line["points"]]
    if not lines:
        return []
    shares = [f"{point['share']:.0%}" for point in lines[0]["points"]]
    rows = [[line["label"], *(_point(point) for point in line["points"])] for line in lines]
    words = Text("Δ loss after so much of the training; * where the 95 % interval excludes 0.")
    return [words, Table(["treated − control", *shares], rows)]


def _point(point: Mapping[str, Any]) -> str:
    of = point["loss"]
    if of["mean"] is None:
        return ""
    return f"{of['mean']:+.3f}{'*' if of['verdict'] in SHOWN else ''}"
