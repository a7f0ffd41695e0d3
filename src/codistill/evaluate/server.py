"""Predictions as files, in the format of the GLUE server."""

from collections.abc import Collection, Sequence
from pathlib import Path

from codistill.evaluate.jobs import Job
from codistill.evaluate.results import Store
from codistill.evaluate.tasks import GLUE, Task
from codistill.files import machine_error

_ENDINGS = {"matched": "-m", "mismatched": "-mm"}


def write_predictions(out: Path, jobs: Sequence[Job], store: Store) -> None:
    """OUT/MODEL/seed-0/SPLIT/CoLA.tsv and so on: what a zip for the server is made of, of every split predicted.

    The server takes the test split; the others are there to be looked at. Such files of earlier evaluations go: among
    these they would pass for this one's.
    """
    written: set[Path] = set()
    for job in jobs:
        for cell, key in zip(job.cells, job.keys, strict=True):
            content = store.get(key)
            if cell.task.startswith("glue/") and content is not None:
                task = GLUE[cell.task.removeprefix("glue/")]
                folder = out / cell.model.replace("/", "-").replace(" ", "-") / f"seed-{cell.seed}"
                found = {task.splits[0]: content["predictions"], **content["others"]}
                try:
                    written |= {_write(folder, task, split, predicted) for split, predicted in found.items()}
                except OSError as error:
                    raise machine_error(error, folder) from error
    _remove_others(out, written)


def server_lines(task: Task, predicted: Sequence[float]) -> list[str]:
    """The lines of a file: a head, then row number and class (by name where the server wants it), or score."""
    if not task.classes:
        shown = [f"{min(max(value, 0.0), 5.0):.3f}" for value in predicted]
    else:
        shown = [task.classes[int(value)] if task.spelled else str(int(value)) for value in predicted]
    return ["index\tprediction", *(f"{row}\t{text}" for row, text in enumerate(shown))]


def _write(folder: Path, task: Task, split: str, predicted: Sequence[float]) -> Path:
    """The file that was written."""
    name, _, part = split.partition("_")
    file = folder / name / f"{task.file}{_ENDINGS.get(part, '')}.tsv"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(server_lines(task, predicted)) + "\n", encoding="utf-8")
    return file


def _remove_others(out: Path, written: Collection[Path]) -> None:
    """Removes the files named as ours that were not written now, and the folders that this leaves empty."""
    ours = {f"{task.file}{ending}.tsv" for task in GLUE.values() for ending in ("", *_ENDINGS.values())}
    try:
        for file in sorted(out.glob("*/seed-*/*/*.tsv")):
            if file.name in ours and file not in written:
                file.unlink()
                for folder in list(file.parents)[:3]:
                    if not any(folder.iterdir()):
                        folder.rmdir()
    except OSError as error:
        raise machine_error(error, out) from error
