"""What is asked for on the command line: tasks and edges, by name."""

from collections.abc import Sequence

from codistill.errors import UserError, did_you_mean
from codistill.evaluate.finetune import Teaching
from codistill.evaluate.tasks import GLUE

TASKS = ("mlm", *(f"glue/{name}" for name in GLUE), "blimp")


def parse_tasks(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(known tasks in order, each once; why each other one is not known). `glue` is all nine. UserError if none is."""
    known: list[str] = []
    unknown: dict[str, str] = {}
    for name in (part.strip() for given in names for part in given.split(",")):
        if name == "glue":
            known += [task for task in TASKS if task.startswith("glue/")]
        elif name in TASKS:
            known.append(name)
        elif name:
            hint = did_you_mean(name, TASKS) or f" (there are {', '.join(TASKS)} and glue)"
            unknown[name] = f"there is no task {name!r}{hint}"
    if not known:
        raise UserError("--tasks: " + ("; ".join(unknown.values()) or f"name some of {', '.join(TASKS)} and glue"))
    return list(dict.fromkeys(known)), unknown


def parse_edges(given: Sequence[str], models: Sequence[str]) -> list[Teaching]:
    """Edges of TEACHER:STUDENT, models named as they are shown; UserError for anything else."""
    edges = []
    for text in given:
        teacher, _, student = text.partition(":")
        for name in (teacher, student):
            if name not in models:
                raise UserError(f"--distill {text}: {name!r} is none of the models, {', '.join(models)}; "
                                "write TEACHER:STUDENT")  # fmt: skip
        if teacher == student:
            raise UserError(f"--distill {text}: a model cannot teach itself; name two")
        edges.append(Teaching(teacher, student))
    return edges
