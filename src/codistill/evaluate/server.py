"""Predictions as files, in the format of the GLUE server."""

from collections.abc import Sequence
from pathlib import Path

from codistill.evaluate.jobs import Job
from codistill.evaluate.results import Store
from codistill.evaluate.tasks import GLUE, Task
from codistill.files import machine_error


def write_predictions(out: Path, jobs: Sequence[Job], store: Store) -> None:
    """OUT/MODEL/seed-0/SPLIT/CoLA.tsv and so on: what a zip for the server is made of, of every split predicted.

    The server takes the test split; the others are there to be looked at.
    """
    for job in jobs:
        for cell, key in zip(job.cells, job.keys, strict=True):
            content = store.get(key)
            if cell.task.startswith("glue/") and content is not None:
                task = GLUE[cell.task.removeprefix("glue/")]
                folder = out / cell.model.replace("/", "-").replace(" ", "-") / f"seed-{cell.seed}"
                found = {task.splits[0]: content["predictions"], **content["others"]}
                try:
                    for split, predicted in found.items():
                        _write(folder / split.partition("_")[0], task, split, predicted)
                except OSError as error:
                    raise machine_error(error, folder) from error


def server_lines(task: Task, predicted: Sequence[float]) -> list[str]:
    """The lines of a file: a head, then row number and class (by name where the server wants it), or score."""
    if not task.classes:
        shown = [f"{min(max(value, 0.0), 5.0):.3f}" for value in predicted]
    else:
        shown = [task.classes[int(value)] if task.spelled else str(int(value)) for value in predicted]
    return ["index\tprediction", *(f"{row}\t{text}" for row, text in enumerate(shown))]


def _write(folder: Path, task: Task, split: str, predicted: Sequence[float]) -> None:
    ending = {"matched": "-m", "mismatched": "-mm"}.get(split.partition("_")[2], "")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{task.file}{ending}.tsv").write_text("\n".join(server_lines(task, predicted)) + "\n", encoding="utf-8")
