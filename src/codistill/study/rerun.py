"""A study made again: which of the differences that were shown keep their sign, and how far models end from their
doubles. The same seeds on another machine round otherwise, and training amplifies that."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from codistill.blocks import Block, Heading, Table, Text, to_markdown
from codistill.errors import UserError
from codistill.files import machine_error, write_file
from codistill.study.analysis import SHOWN
from codistill.study.cells import Cell
from codistill.study.page import difference, made
from codistill.study.run import Request, check_out, known_cells, made_in, summary


def check_against(request: Request, against: Path) -> None:
    """UserError when `against` holds no results of this study, or lies where its cells would be taken over."""
    if not (against / "results.json").is_file():
        raise UserError(
            f"--against {against}: there is no results.json; give the folder of a finished study {request.study.name}"
        )
    check_out(replace(request, out=against), "--against")
    if against.resolve().parent == request.out.resolve().parent:
        raise UserError(
            f"--against {against}: it lies beside --out {request.out}, which takes the cells of studies beside it "
            "instead of training them; give an --out in another folder"
        )


def compare(request: Request, against: Path) -> dict[str, Any]:
    """The shown differences of the study in `against` beside those in `request.out`, both finished, by regime:
    `label`, `there`, `here` (None where it was not made again) and whether they have the `same_sign`; and of members of
    one name and seed by how many nats their held-out losses are `apart`."""
    arms = json.loads((against / "results.json").read_text(encoding="utf-8"))["arms"]
    reference, those = made_in(against, request.study, request.scale, arms)
    these = known_cells(request)
    there, here = summary(reference, those), summary(request, these)
    return {
        "there": there,
        "here": here,
        "regimes": {regime: _shown(of, here["regimes"].get(regime)) for regime, of in there["regimes"].items()},
        "apart": _apart(those, these),
    }


def counts(found: Mapping[str, Any]) -> dict[str, int]:
    """Of the differences that were shown there, how many have the same sign here, the other, and were not made."""
    signs = [line["same_sign"] for lines in found["regimes"].values() for line in lines]
    return {"shown": len(signs), "same": signs.count(True), "other": signs.count(False), "not made": signs.count(None)}


def write_comparison(request: Request, against: Path) -> str:
    """Writes `OUT/rerun.md` and returns it."""
    text = to_markdown(rerun_blocks(compare(request, against)))
    try:
        write_file(request.out / "rerun.md", text)
    except OSError as error:
        raise machine_error(error, request.out) from error
    return text


def rerun_blocks(found: Mapping[str, Any]) -> list[Block]:
    """The comparison as a page."""
    of = counts(found)
    answer = f"Of {of['shown']} differences shown there, {of['same']} have the same sign here"
    answer += f", {of['other']} the other" if of["other"] else ""
    answer += f"; {of['not made']} {'was' if of['not made'] == 1 else 'were'} not made again" if of["not made"] else ""
    blocks: list[Block] = [Text(f"{answer}.", important=bool(of["other"])), *_doubles(found["apart"])]
    if found["there"]["text"] != found["here"]["text"]:
        blocks.append(Text("The text is not the same.", important=True))
    blocks += [Text(f"There: {made(found['there'])}"), Text(f"Here: {made(found['here'])}")]
    head = ["treated − control", "there: Δ loss, nats", "95 % interval", "seeds"]
    head += ["here: Δ loss, nats", "95 % interval", "seeds", "same sign"]
    for regime, lines in found["regimes"].items():
        if lines:
            blocks += [Heading(regime, 3), Table(head, [_row(line) for line in lines], words=(2, 5, 7))]
    return blocks


def _shown(there: Mapping[str, Any], here: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    again = {_compared(c): c["loss"] for c in here["contrasts"]} if here else {}
    return [
        {"label": c["label"], "there": c["loss"], **_sign(c["loss"], again.get(_compared(c)))}
        for c in there["contrasts"]
        if c["loss"]["verdict"] in SHOWN
    ]


def _compared(of: Mapping[str, Any]) -> tuple[str, ...]:
    """What a contrast compares, whatever it is called."""
    return (of["treated"], of["control"], *of.get("than", {}).values())


def _sign(there: Mapping[str, Any], here: Mapping[str, Any] | None) -> dict[str, Any]:
    if here is None or here["mean"] is None:
        return {"here": None, "same_sign": None}
    return {"here": here, "same_sign": there["mean"] * here["mean"] > 0}


def _apart(there: Sequence[Cell], here: Sequence[Cell]) -> list[float]:
    losses, again = _losses(there), _losses(here)
    return [again[place] - losses[place] for place in losses if place in again]


def _losses(cells: Sequence[Cell]) -> dict[tuple[str, str, int, str], float]:
    return {
        (cell["regime"], cell["arm"], cell["seed"], role): member["loss"]
        for cell in cells
        for role, member in cell["members"].items()
    }


def _doubles(apart: Sequence[float]) -> list[Block]:
    if not apart:
        return []
    sizes = np.abs(apart)
    return [
        Text(
            f"{len(apart)} models of one name and seed end {sizes.mean():.3f} nats apart in the mean, "
            f"{sizes.max():.3f} at most; here − there {np.mean(apart):+.3f}."
        )
    ]


def _row(line: Mapping[str, Any]) -> list[str]:
    here = line["here"]
    again = ["", "", ""] if here is None else [*difference(here, 3)[:2], str(here["seeds"])]
    sign = {True: "yes", False: "no", None: "not made again"}[line["same_sign"]]
    return [line["label"], *difference(line["there"], 3)[:2], str(line["there"]["seeds"]), *again, sign]
