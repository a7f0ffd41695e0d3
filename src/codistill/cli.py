"""The command line: every command parses, calls the library, and prints. torch is imported only where it is used.

Exit status: 0 done; 1 the machine failed; 2 what was asked for cannot be done; 75 stopped by a signal, resumable.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.markup import escape

from codistill.config import Run
from codistill.errors import Elsewhere, MachineError, UserError
from codistill.loading import load, override, read_run, to_dict, to_yaml
from codistill.recipes import RECIPES, check_teachers, find

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later

app = App(
    name="codistill",
    help="Train language models together, so that they teach one another while they learn.",
    help_format="plaintext",
)
_out = Console(highlight=False, soft_wrap=True)

Settings = Annotated[
    list[str] | None,
    Parameter(name="--set", negative="", help="Change a setting, as in --set members.large.lr=1e-3; may be repeated."),
]
Source = Annotated[str, Parameter(help="A recipe (see `codistill recipes`), as in ctcd:tiny, or a YAML file.")]


@app.command
def train(
    source: Source,
    /,
    *,
    set_: Settings = None,
    out: Annotated[Path | None, Parameter(help="The run folder; by default runs/ and the recipe's name.")] = None,
    resume: Annotated[bool, Parameter(negative="", help="Continue the unfinished run in the folder.")] = False,
    fresh: Annotated[bool, Parameter(negative="", help="Replace the run in the folder.")] = False,
    accept_changes: Annotated[
        bool, Parameter(negative="", help="Resume although settings, text, tokenizer or versions have changed.")
    ] = False,
    device: Annotated[str | None, Parameter(help="cpu, cuda or cuda:N; by default a GPU if there is one.")] = None,
) -> None:
    """Train the members of a run together and write its run folder.

    Example: codistill train ctcd:tiny --set steps=500 --out runs/first
    """
    run = _resolve(source, set_ or [])
    if resume and fresh:
        raise UserError("--resume and --fresh exclude each other; give one of them")
    folder = out or _default_folder(source)
    check_teachers(run)
    _train(run, folder, resume=resume, fresh=fresh, accept_changes=accept_changes, device=device)


@app.command
def recipes() -> None:
    """List the recipes, one line each.

    Example: codistill recipes
    """
    width = max(map(len, RECIPES))
    for name, recipe in RECIPES.items():
        _out.print(f"{name:<{width}}  {(recipe.__doc__ or '').splitlines()[0]}", markup=False)
    _out.print("\nEach comes as NAME:tiny (CPU, minutes; the default), NAME:small (one GPU) and NAME:paper.")


@app.command
def show(source: Source, /, *, set_: Settings = None) -> None:
    """Print the fully resolved configuration as YAML, which `train` accepts back.

    Example: codistill show dwt:paper --set seed=1
    """
    print(to_yaml(_resolve(source, set_ or [])), end="")


@app.command
def prepare(
    sources: Annotated[list[str], Parameter(help="Files, folders or globs of .txt, .jsonl(.gz|.zst) and .parquet.")],
    /,
    *,
    tokenizer: Annotated[str, Parameter(help="A folder, a hub name, a vocab.txt, or train:wordpiece:30522.")],
    out: Annotated[Path, Parameter(help="The folder to write; it appears whole or not at all.")],
    column: Annotated[str, Parameter(help="The column or key that holds the text.")] = "text",
    unit: Annotated[
        Literal["document", "paragraph", "sentence"], Parameter(help="What is kept or left out.")
    ] = "document",
    keep_every: Annotated[int, Parameter(help="Keep one unit of every so many (the DWT paper: 4 sentences).")] = 1,
    held_out: Annotated[float, Parameter(help="The share of documents that goes to DIR/held_out instead.")] = 0.0,
    bad_utf8: Annotated[Literal["refuse", "replace"], Parameter(help="What to do with broken UTF-8.")] = "refuse",
    processes: Annotated[int | None, Parameter(help="By default one per core; changes no byte.")] = None,
) -> None:
    """Turn text into a folder of tokens that `data.train` and `data.validation` take.

    Example: codistill prepare corpus/ --tokenizer train:wordpiece:30522 --held-out 0.01 --out corpus-tokens
    """
    from codistill.data.prepare import prepare as prepare_corpus
    from codistill.progress import preparing

    with preparing("preparing") as progress:
        corpus = prepare_corpus(
            sources,
            tokenizer,
            out,
            column=column,
            unit=unit,
            keep_every=keep_every,
            held_out=held_out,
            bad_utf8=bad_utf8,
            processes=processes,
            progress=progress,
        )
    _out.print(f"{out}: {corpus.num_tokens:,} tokens of {corpus.num_documents:,} documents", markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `codistill` command; exits with the status given in this module's docstring."""
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, UserError) as error:
        _fail(str(error), 2)
    except MachineError as error:
        _fail(str(error), 1)
    except Elsewhere as error:  # of several processes that torchrun started, another says why
        sys.exit(error.args[0])


def _fail(message: str, status: int) -> None:
    if not _speaks("LOCAL_RANK"):
        sys.exit(status)
    line = " ".join(message.split())
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]codistill:[/] {escape(line)}")
    sys.exit(status)


def _speaks(rank: str) -> bool:
    """Whether this process is the first of those that torchrun started (RANK), on this node (LOCAL_RANK)."""
    return os.environ.get(rank, "0") == "0"


def _resolve(source: str, assignments: Sequence[str]) -> Run:
    is_file = source.endswith((".yaml", ".yml")) or Path(source).is_file()
    tree = read_run(Path(source)) if is_file else to_dict(find(source))
    return load(override(tree, assignments))


def _default_folder(source: str) -> Path:
    path = Path(source)
    if path.name == "run.yaml":
        return path.parent
    return Path("runs") / (path.stem if path.suffix else source.replace(":", "-"))


def _train(run: Run, folder: Path, **options: Any) -> None:
    from codistill.progress import quiet, shown

    shown = shown if _speaks("RANK") else quiet
    with shown("loading", 1):
        from codistill import report
        from codistill.train import Stopped
        from codistill.train import train as train_run
    try:
        with shown("training", run.steps) as advance:
            train_run(run, folder, advance=advance, **options)
    except Stopped:
        if _speaks("RANK"):
            _out.print(f"stopped and saved; to go on: codistill train {folder / 'run.yaml'} --resume", markup=False)
        sys.exit(STOPPED)
    if not _speaks("RANK"):
        return
    _out.print(report.results_table(folder))
    picture = report.draw_curves(folder)
    _out.print(f"run folder: {folder}" + (f"\nlearning curves: {picture}" if picture else ""), markup=False)
