"""The command line: every command parses, calls the library, and prints. torch is imported only where it is used.

Exit status: 0 done; 1 the machine failed; 2 what was asked for cannot be done; 75 stopped by a signal, resumable;
130 interrupted.
"""

import os
import shlex
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
def remap(
    source: Annotated[Path, Parameter(help="A model folder, as a run's members/NAME.")],
    /,
    *,
    to: Annotated[Path, Parameter(help="The config.json of the model to make, or a folder with one.")],
    out: Annotated[Path, Parameter(help="The folder to write; it appears whole or not at all.")],
    depth: Annotated[str | None, Parameter(help="A way (docs/remap.md), or source layers as in 0,1,2,2.")] = None,
    width: Annotated[str | None, Parameter(help="A way (docs/remap.md), where the widths differ.")] = None,
    noise: Annotated[float, Parameter(help="How unevenly copies share what reads them; 0: exactly alike.")] = 0.0,
    seed: Annotated[int, Parameter(help="Of whatever a way draws at random.")] = 0,
) -> None:
    """Make a model of another size from a model.

    Example: codistill remap runs/small/members/large --to bigger/config.json --depth stack --out grown
    """
    from codistill.remap import remap_folder

    layers = [int(part) for part in depth.split(",")] if depth and depth[0].isdigit() else depth
    remap_folder(source, to, out=out, depth=layers, width=width, noise=noise, seed=seed)
    _out.print(f"{out}: a model folder, from {source}", markup=False)


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


bench = App(name="bench", help="Measure side by side: ours, plain PyTorch, and the peers that are installed.")
app.command(bench)

Rows = Annotated[int, Parameter(help="Predicted rows.")]


@bench.command(name="loss")
def bench_loss(
    *,
    device: Annotated[str, Parameter(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[Literal["float32", "bfloat16"], Parameter(help="Of the matrix products.")] = "float32",
    rows: Rows = 2048,
    vocabulary: Annotated[int, Parameter(help="Tokens.")] = 30522,
    width: Annotated[int, Parameter(help="Of both members.")] = 768,
    runs: Annotated[int, Parameter(help="Timed runs of each, taken in turns.")] = 7,
    provider: Annotated[list[str] | None, Parameter(negative="", help="Only this one; may be repeated.")] = None,
    out: Annotated[Path | None, Parameter(help="A JSON file for the results.")] = None,
) -> None:
    """The vocabulary loss: speed, peak memory and gradient error against float64.

    Example: codistill bench loss --rows 2048 --vocabulary 30522 --out loss.json
    """
    from codistill.bench import bench_loss as measure

    measure(
        device=device,
        dtype=dtype,
        rows=rows,
        vocabulary=vocabulary,
        width=width,
        runs=runs,
        providers=provider,
        out=out,
    )


@bench.command(name="data")
def bench_data(
    sources: Annotated[list[str] | None, Parameter(help="Text, by default the built-in.")] = None,
    /,
    *,
    tokenizer: Annotated[str, Parameter(help="As for `prepare`.")] = "train:wordpiece:4096",
    length: Annotated[int, Parameter(help="Tokens in a row.")] = 128,
    mask_rate: Annotated[float, Parameter(help="Share of a row that is predicted.")] = 0.3,
    out: Annotated[Path | None, Parameter(help="A JSON file for the results.")] = None,
) -> None:
    """Text to tokens beside the bare tokenizers library, and tokens to batches.

    Example: codistill bench data corpus/ --tokenizer vocab.txt
    """
    import json

    from codistill.bench import bench_data as measure

    rows = measure(sources or ["builtin:python"], tokenizer, length=length, mask_rate=mask_rate)
    for row in rows:
        ratio = f"{row['ratio']:.2f} × the bare library" if row.get("ratio") else ""
        _out.print(f"{row['what']:<40} {row['cores']} core(s) {row['tokens_per_second']:>12,.0f} tokens/s  {ratio}")
    if out is not None:
        out.write_text(json.dumps(rows, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `codistill` command; exits with the status given in this module's docstring."""
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, UserError) as error:
        _fail(str(error), 2)
    except MachineError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
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
            again = ["codistill", "train", str(folder / "run.yaml"), "--resume"]
        again += ["--device", options["device"]] if options["device"] else []
        world = os.environ.get("LOCAL_WORLD_SIZE")
        launcher = f"torchrun --nproc-per-node={world} --no-python " if world else ""
        _out.print(f"stopped and saved; to go on: {launcher}{shlex.join(again)}", markup=False)
        sys.exit(STOPPED)
    if not _speaks("RANK"):
        return
    _out.print(report.results_table(folder))
    picture = report.draw_curves(folder)
    _out.print(f"run folder: {folder}" + (f"\nlearning curves: {picture}" if picture else ""), markup=False)
