"""A study from its name to its table: what is known, what is left to do, and the files that come of it."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codistill.blocks import to_markdown
from codistill.config import Data
from codistill.errors import UserError
from codistill.files import machine_error, write_file
from codistill.progress import Advance, silent
from codistill.study.analysis import analysis
from codistill.study.arms import Arm, keys_of
from codistill.study.cells import Cell, Cells, check_same_text
from codistill.study.design import Study
from codistill.study.execute import Means, execute, missing
from codistill.study.figure import draw
from codistill.study.page import study_blocks
from codistill.study.scales import Scale

_BEGIN, _END = "<!-- the table, generated -->", "<!-- end of the table -->"


@dataclass(frozen=True)
class Request:
    """A study at a scale with so many seeds, in the folder `out`."""

    study: Study
    scale: Scale
    seeds: int
    out: Path

    @property
    def arms(self) -> list[Arm]:
        return [arm for seed in range(self.seeds) for arm in self.study.arms(self.scale, seed)]


def run_study(
    request: Request, *, data: Path | None, jobs: int | None = None, devices: Sequence[str] = ("cpu",),
    advance: Advance = silent,
) -> dict[str, Any]:  # fmt: skip
    """Trains what is missing and writes OUT/results.json, table.md, figure.png, and the table into OUT/README.md where
    that marks its place; returns the contents of the first.

    `data`: a folder with text/*/train*.parquet and validation.parquet, and blimp/; not needed when nothing is missing.
    """
    check_out(request)
    arms, cells = request.arms, Cells(request.out)
    if missing_cells(arms, cells):
        execute(arms, request.out, means(request, data, jobs, devices), advance)
    return tabulate(request)


def missing_cells(arms: Sequence[Arm], cells: Cells) -> list[Arm]:
    """What would be trained: nothing where all arms have their cells, whether or not models were kept."""
    keys = keys_of(arms)
    return missing(arms, cells) if any(cells.get(keys[arm.place]) is None for arm in arms) else []


def means(request: Request, data: Path | None, jobs: int | None, devices: Sequence[str]) -> Means:
    """What to run a study with; UserError where there is no text."""
    if data is None:
        raise UserError(
            f"study {request.study.name}: some of its arms are not trained yet, which needs text; give a folder with "
            "text/*/train*.parquet and text/*/validation.parquet, as in --data data"
        )
    text = Data(train=_found(data, "train"), validation=_found(data, "validation"))
    places = (os.cpu_count() or 1) if devices[0] == "cpu" else len(devices)
    blimp = data if list((data / "blimp").glob("*.parquet")) else None
    jobs = jobs if jobs is not None else places
    return Means(text, blimp, request.scale.pairs, jobs, devices, request.scale.most_members)


def devices(wanted: str | None) -> list[str]:
    """The devices that a study's processes use in turn: the one that is wanted, else all GPUs, else the CPU."""
    import torch

    if wanted is not None:
        return [wanted]
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def _found(data: Path, split: str) -> list[str]:
    folders = sorted({file.parent for file in data.glob(f"text/*/{split}*.parquet")})
    # Text without a training part is there to be tested on.
    folders = [folder for folder in folders if list(folder.glob("train*.parquet"))]
    if not folders:
        raise UserError(f"--data {data}: there is no text/*/{split}*.parquet; give a folder that has some")
    return [str(folder / f"{split}*.parquet") for folder in folders]


def tabulate(request: Request) -> dict[str, Any]:
    """Makes the table and figure anew from the cells alone."""
    cells = known_cells(request)
    found = summary(request, cells)
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        write_file(request.out / "results.json", json.dumps(found, indent=1) + "\n")
        write_file(request.out / "table.md", table := to_markdown(study_blocks(found)))
        _put_into_page(request.out / "README.md", table)
        draw(request.study, found, cells, request.out / "figure.png")
    except OSError as error:
        raise machine_error(error, request.out) from error
    return found


def _put_into_page(page: Path, table: str) -> None:
    """Replaces what stands between the two marks of a study's page, if somebody has written one with them."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and end:
        write_file(page, f"{before}{begin}\n\n{table}\n{end}{after}")


def summary(request: Request, cells: Sequence[Cell]) -> dict[str, Any]:
    """What the cells say; UserError where they are of different text."""
    check_same_text(cells)
    return analysis(request.study, request.scale.name, len(request.arms), cells)


def known_cells(request: Request) -> list[Cell]:
    """The cells of the study's arms that are there, in the study's order."""
    arms, cells = request.arms, Cells(request.out)
    keys = keys_of(arms)
    # Named as this study names them: another one's cell of the same content may have other names.
    found = [(arm, cells.get(keys[arm.place])) for arm in arms]
    return [cell | {"arm": arm.name, "regime": arm.regime} for arm, cell in found if cell is not None]


def check_out(request: Request) -> None:
    """UserError when `out` holds something else than a study, or another scale of it."""
    out = request.out
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "cells").is_dir())):
        raise UserError(f"--out {out}: it holds something else than a study; give another folder")
    if (out / "results.json").is_file():
        held = json.loads((out / "results.json").read_text())
        mine = (request.study.name, request.scale.name)
        if (held.get("study"), held.get("scale")) != mine:
            raise UserError(
                f"--out {out}: it holds the study {held.get('study')!r} at {held.get('scale')!r}, and "
                f"{mine[0]!r} at {mine[1]!r} was asked for; give another folder"
            )
