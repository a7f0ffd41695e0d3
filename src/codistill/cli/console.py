"""What the commands share: the application, the console, and a run named on the command line."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console

from codistill.config import Run
from codistill.loading import load, override, read_run, split_assignment, to_dict
from codistill.recipes import find

app = App(
    name="codistill",
    help="Train language models together, so that they teach one another while they learn.",
    help_format="plaintext",
)
bench = App(name="bench", help="Measure side by side: ours, plain PyTorch, and the peers that are installed.")
app.command(bench)
console = Console(highlight=False, soft_wrap=True, emoji=False)


def check_assignments(_: Any, assignments: Sequence[str] | None) -> None:
    """Refuses `--set steps 4` while the command line is read, or its `4` would be refused for a word too many."""
    for assignment in assignments or ():
        split_assignment(assignment)


Settings = Annotated[
    list[str] | None,
    Parameter(
        name="--set",
        negative="",
        validator=check_assignments,
        help="Change a setting, as in --set members.large.lr=1e-3; may be repeated.",
    ),
]
Source = Annotated[str, Parameter(help="A recipe (see `codistill recipes`), as in ctcd:tiny, or a YAML file.")]
Device = Annotated[str | None, Parameter(help="cpu, cuda or cuda:N; by default a GPU if there is one.")]


def resolve(source: str, assignments: Sequence[str]) -> Run:
    """The run of a recipe or a file, with its --set assignments; raises UserError for what is wrong in either."""
    is_file = source.endswith((".yaml", ".yml")) or Path(source).is_file()
    tree = read_run(Path(source)) if is_file else to_dict(find(source))
    return load(override(tree, assignments))


def speaks(rank: str) -> bool:
    """Whether this process is the first of those that torchrun started (RANK), on this node (LOCAL_RANK)."""
    return os.environ.get(rank, "0") == "0"
