"""evaluate: scores of models."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from codistill.cli.console import Device, app, check_assignments, console


@app.command
def evaluate(
    models: Annotated[list[str], Parameter(help="Model folders, hub names, or run folders (all their members).")],
    /,
    *,
    tasks: Annotated[str, Parameter(help="Comma-separated: mlm, glue (all nine), glue/TASK, blimp.")],
    out: Annotated[Path, Parameter(help="The folder for results; what it holds already is not computed again.")],
    data: Annotated[Path | None, Parameter(help="A folder with glue/, blimp/, text/ (docs/evaluation.md).")] = None,
    seeds: Annotated[int, Parameter(help="Fine-tunings of each model and GLUE task; 5 or more for a claim.")] = 1,
    distill: Annotated[
        list[str] | None,
        Parameter(negative="", help="TEACHER:STUDENT while fine-tuning on GLUE; may be repeated."),
    ] = None,
    text: Annotated[list[str] | None, Parameter(negative="", help="Held-out text of mlm; may be repeated.")] = None,
    limit: Annotated[int | None, Parameter(help="BLiMP pairs of each paradigm; by default all.")] = None,
    set_: Annotated[
        list[str] | None,
        Parameter(
            name="--set",
            negative="",
            validator=check_assignments,
            help="Change the protocol, as in --set epochs=5; may be repeated.",
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Score models on held-out text, GLUE and BLiMP, with seeds and intervals.

    Example: codistill evaluate runs/ctcd-tiny --tasks mlm,glue,blimp --data data --seeds 5 --out scores
    """
    from codistill.evaluate.protocol import Protocol
    from codistill.loading import load_part, override
    from codistill.progress import shown

    protocol = load_part(Protocol, override({}, set_ or []))
    with shown("loading", 1):
        from codistill.evaluate.run import evaluate as score
        from codistill.evaluate.table import tables
    with shown("evaluating", 0) as advance:
        results = score(
            models,
            [tasks],
            out,
            data=data,
            seeds=seeds,
            distill=distill or [],
            text=text or [],
            limit=limit,
            protocol=protocol,
            device=device,
            advance=advance,
        )
    console.print(tables(results, console.width))
    console.print(f"results: {out / 'results.json'}", markup=False)
    if any(cell["failed"] for cell in results["cells"]):
        sys.exit(2)
