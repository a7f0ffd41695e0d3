"""export: a member for other people's tools."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from codistill.cli.console import app, console


@app.command
def export(
    folder: Annotated[Path, Parameter(help="The folder of a finished run.")],
    /,
    *,
    member: Annotated[str, Parameter(help="Name of the member.")],
    format: Annotated[
        Literal["hf", "onnx", "int8"], Parameter(help="Hugging Face; ONNX; ONNX with int8 weights.")
    ] = "hf",
    out: Annotated[Path, Parameter(help="The folder to write; it appears whole or not at all.")],
    push: Annotated[
        str | None, Parameter(help="Upload it to this hub repository too, made private if it is new.")
    ] = None,
) -> None:
    """Export a member of a finished run, with a model card, for Hugging Face, ONNX or int8 ONNX.

    Example: codistill export runs/first --member small --format int8 --out small-int8
    """
    from codistill.export import describe, export_member

    facts = export_member(folder, member, format=format, out=out, push=push)
    console.print(f"{out}: {describe(facts)}", markup=False)
