"""prepare, remap: what a run starts from."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from codistill.cli.console import app, console
from codistill.errors import UserError
from codistill.folders import config_file


@app.command
def prepare(
    sources: Annotated[list[str], Parameter(help="Files, folders or globs of .txt, .jsonl(.gz|.zst) and .parquet.")],
    /,
    *,
    tokenizer: Annotated[str, Parameter(help="A folder, a hub name, a vocab.txt, or train:wordpiece:30522.")],
    out: Annotated[Path, Parameter(help="The folder to write; it appears whole or not at all.")],
    column: Annotated[str, Parameter(help="The column or key that holds the text.")] = "text",
    unit: Annotated[
        Literal["document", "paragraph", "sentence"], Parameter(help="The unit that --keep-every counts.")
    ] = "document",
    keep_every: Annotated[int, Parameter(help="Keep one of every N units (the DWT paper kept 1 of 4 sentences).")] = 1,
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
    console.print(f"{out}: {corpus.num_tokens:,} tokens of {corpus.num_documents:,} documents", markup=False)


@app.command
def remap(
    source: Annotated[Path, Parameter(help="A model folder, as a run's members/NAME.")],
    /,
    *,
    to: Annotated[Path, Parameter(help="The config.json of the model to make, or a folder with one.")],
    out: Annotated[Path, Parameter(help="The folder to write; it appears whole or not at all.")],
    depth: Annotated[
        str | None, Parameter(help="A method (docs/remap.md), or source layers, counted from 0, as in 0,1,2,2.")
    ] = None,
    width: Annotated[str | None, Parameter(help="A method (docs/remap.md), where the widths differ.")] = None,
    noise: Annotated[
        float, Parameter(help="Relative noise that makes copied units differ; 0 keeps exact copies.")
    ] = 0.0,
    seed: Annotated[int, Parameter(help="Seed of the methods that draw at random.")] = 0,
) -> None:
    """Make a larger or smaller model from a trained one.

    Example: codistill remap runs/small/members/large --to bigger/config.json --depth stack --out grown
    """
    layers = _layers(depth)
    for path in (source, to):
        config_file(path)  # before the libraries are loaded, which takes a while
    from codistill.remap import remap_folder

    remap_folder(source, to, out=out, depth=layers, width=width, noise=noise, seed=seed)
    console.print(f"{out}: a model folder, from {source}", markup=False)


def _layers(depth: str | None) -> list[int] | str | None:
    """Source layers where `depth` lists them, else the name of a method."""
    if not depth or not depth[0].isdigit():
        return depth
    try:
        return [int(part) for part in depth.split(",")]
    except ValueError:
        raise UserError(f"--depth {depth}: give a method (docs/remap.md), or source layers as in 0,1,2,2") from None
