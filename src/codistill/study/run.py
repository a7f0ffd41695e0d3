"""A study from its name to its table: what is known, what is left to do, and the files that come of it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from codistill.blocks import to_markdown
from codistill.config import Data
from codistill.data.corpus import Corpus
from codistill.distributed import start
from codistill.errors import MachineError, UserError
from codistill.files import is_locked, locked, machine_error, to_json, write_file
from codistill.progress import Advance, preparing, silent
from codistill.study.analysis import analysis
from codistill.study.arms import Arm, keys_of
from codistill.study.cells import Cell, Cells, check_same_text
from codistill.study.design import Study
from codistill.study.execute import Means, cores, execute, is_whole, missing
from codistill.study.figure import draw
from codistill.study.outside import check_same_models, content_now, outside_of, own_models
from codistill.study.page import study_blocks
from codistill.study.scales import Scale
from codistill.study.scoring import Scoring, found_in
from codistill.texts import Part, corpus_of

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

    `data`: a folder with text/*/train*.parquet and validation.parquet, blimp/ and glue/; not needed when nothing is
    missing.
    """
    check_out(request)
    arms, cells = request.arms, Cells(request.out)
    too_large: list[str] = []
    if missing_cells(arms, cells, scoring(request, data).tasks):
        too_large = _train(request, means(request, data, jobs, devices), advance)
    found = tabulate(request)
    if too_large:
        more = f" (and {len(too_large) - 1} more)" if len(too_large) > 1 else ""
        raise MachineError(
            f"out of memory for {too_large[0]}{more}; the rest is done and in the table; give fewer --jobs, a "
            "device with more memory, or another --scale"
        )
    return found


def _train(request: Request, given: Means, advance: Advance) -> list[str]:
    """Everything that is missing; what there was no memory for. UserError where another study is at work in the folder,
    or what is there is of other text or models."""
    arms = request.arms
    data = arms[0].run.data
    text = text_of(replace(data, train=given.data.train, validation=given.data.validation), data.tokenizer or "")
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        with locked(request.out / ".lock", wait=False):
            check_same_text([{"arm": "--data", "failed": "", "text": text}, *known_cells(request)])
            _adopt(request, given, text)
            return execute(arms, request.out, given, advance)
    except BlockingIOError:
        raise _in_use(request) from None
    except OSError as error:
        raise machine_error(error, request.out) from error


def _adopt(request: Request, given: Means, text: Mapping[str, str]) -> None:
    """Takes over what studies beside this one have of what is missing. UserError where models from outside that it
    begins from are not those of the cells that are there, or are nowhere."""
    arms, cells = request.arms, Cells(request.out)
    outside, keys = outside_of(arms), keys_of(arms)
    left = missing_cells(arms, cells, given.scoring.tasks)
    now = content_now(
        {name: path for arm in left for name, path in outside[arm.place].items()},
        [name for arm in left for name in own_models(arm)],
    )
    check_same_models(known_cells(request), now)
    wanted = {keys[arm.place]: {name: now.get(name, "") for name in outside[arm.place]} for arm in left}
    cells.adopt(wanted, text)


def check_free(request: Request) -> None:
    """UserError where another study is at work in the folder now."""
    if is_locked(request.out / ".lock"):
        raise _in_use(request)


def _in_use(request: Request) -> UserError:
    return UserError(f"--out {request.out}: another `codistill study` is at work there; wait for it")


def text_of(data: Data, tokenizer: str) -> dict[str, str]:
    """What a run records of its text, training and held-out; prepares both if they are not."""
    train = _prepared(data, "train", tokenizer)
    validation = _prepared(data, "validation", train.tokenizer())
    return {"train": train.manifest["identity"], "validation": validation.manifest["identity"]}


def _prepared(data: Data, part: Part, tokenizer: Any) -> Corpus:
    with preparing(f"preparing data.{part}") as progress:
        return corpus_of(data, part, tokenizer, progress)


def missing_cells(arms: Sequence[Arm], cells: Cells, tasks: tuple[str, ...] = ()) -> list[Arm]:
    """What would be trained: nothing where all arms have their cells, with scores at `tasks`, whether or not models
    were kept."""
    keys = keys_of(arms)
    known = all(is_whole(cells.get(keys[arm.place]), tasks) for arm in arms)
    return [] if known else missing(arms, cells, tasks)


def means(request: Request, data: Path | None, jobs: int | None, devices: Sequence[str]) -> Means:
    """What to run a study with; UserError where there is no text."""
    if data is None:
        raise UserError(
            f"study {request.study.name}: some of its arms are not trained yet, which needs text; give a folder with "
            "text/*/train*.parquet and text/*/validation.parquet, as in --data data"
        )
    text = Data(train=_found(data, "train"), validation=_found(data, "validation"))
    jobs = jobs if jobs is not None else places(devices)
    return Means(text, scoring(request, data), jobs, devices, request.scale.most_members)


def places(devices: Sequence[str]) -> int:
    """How many processes can work at once without waiting for one another."""
    return cores() if devices[0] == "cpu" else len(devices)


def scoring(request: Request, data: Path | None) -> Scoring:
    """What the scale wants scored and `data` has examples of."""
    return found_in(data, request.scale.tasks, request.scale.pairs)


def devices(wanted: str | None) -> list[str]:
    """The devices that a study's processes use in turn: the one that is wanted, else all GPUs, else the CPU."""
    import torch

    if wanted is not None:
        return [str(start("single", wanted).device)]  # which raises UserError for one that is not there
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def _found(data: Path, split: str) -> list[str]:
    folders = sorted({file.parent for file in data.glob(f"text/*/{split}*.parquet")})
    # Text without a training part is there to be tested on.
    folders = [folder for folder in folders if list(folder.glob("train*.parquet"))]
    if not folders:
        raise UserError(f"--data {data}: there is no text/*/{split}*.parquet; give a folder that has some")
    return [str(folder.resolve() / f"{split}*.parquet") for folder in folders]


def tabulate(request: Request) -> dict[str, Any]:
    """Makes the table and figure anew from the cells alone."""
    cells = known_cells(request)
    found = summary(request, cells)
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        write_file(request.out / "results.json", to_json(found, indent=1) + "\n")
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
    """What the cells say; UserError where they are of different text or models."""
    check_same_text(cells)
    check_same_models(cells)
    return analysis(request.study, request.scale.name, len(request.arms), cells)


def known_cells(request: Request) -> list[Cell]:
    """The cells of the study's arms that are there, in the study's order."""
    arms, cells = request.arms, Cells(request.out)
    keys, outside = keys_of(arms), outside_of(arms)
    # Named as this study names them: another one's cell of the same content may have other names.
    found = [(arm, cells.get(keys[arm.place])) for arm in arms]
    return [
        cell | {"arm": arm.name, "regime": arm.regime, "outside": _said_of(outside[arm.place], cell)}
        for arm, cell in found
        if cell is not None
    ]


def _said_of(outside: Iterable[str], cell: Cell) -> dict[str, str | None]:
    """What a cell says of the models from outside; None where it is from before that was recorded."""
    return {name: cell.get("outside", {}).get(name) for name in outside}


def made_in(folder: Path, study: Study, scale: Scale, arms: int) -> tuple[Request, list[Cell]]:
    """What was asked for when `folder` got its `arms`, which its results.json counts, and its cells; UserError where
    they are not those of the study."""
    seeds, rest = divmod(arms, max(len(study.arms(scale, 0)), 1))
    if rest:
        raise UserError(
            f"{folder}: made with other arms than the study {study.name!r} has now ({arms} are no multiple of "
            f"{len(study.arms(scale, 0))}); run `codistill study` again on the folder, or give the file as it was"
        )
    request = Request(study, scale, seeds, folder)
    cells = known_cells(request)
    if not cells:
        raise UserError(
            f"{folder}: none of its cells is one of the study {study.name!r} as it is here; it is of another version"
        )
    return request, cells


def check_out(request: Request, option: str = "--out") -> None:
    """UserError when `out`, given as `option`, holds something else than a study, or another scale of it."""
    out = request.out
    begun = {".lock", "work", "models"}  # what a study leaves that was killed before its first cell
    if out.exists() and (
        not out.is_dir() or not ((out / "cells").is_dir() or {f.name for f in out.iterdir()} <= begun)
    ):
        raise UserError(f"{option} {out}: it holds something else than a study; give another folder")
    if (out / "results.json").is_file():
        try:
            held = dict(json.loads((out / "results.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            unread = f"{option} {out}: its results.json cannot be read; remove it, and it is made again"
            raise UserError(unread) from None
        mine = (request.study.name, request.scale.name)
        if (held.get("study"), held.get("scale")) != mine:
            raise UserError(
                f"{option} {out}: it holds the study {held.get('study')!r} at {held.get('scale')!r}, and "
                f"{mine[0]!r} at {mine[1]!r} was asked for; give another folder"
            )
