"""cache-teacher: a frozen teacher's outputs, written once."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from codistill.cli.console import Device, Settings, Source, app, console, resolve
from codistill.recipes import check_teachers


@app.command
def cache_teacher(
    source: Source,
    /,
    *,
    member: Annotated[str, Parameter(help="The frozen member to cache.")],
    out: Annotated[Path, Parameter(help="The folder to write; it appears whole or not at all.")],
    kind: Annotated[
        Literal["features", "top_k", "sampled"], Parameter(help="What is kept of each row (docs/causal.md).")
    ] = "features",
    k: Annotated[int, Parameter(help="Tokens of a row that top_k and sampled keep.")] = 64,
    dtype: Annotated[Literal["float32", "bfloat16"], Parameter(help="Precision of what is stored.")] = "float32",
    set_: Settings = None,
    device: Device = None,
) -> None:
    """Store a frozen teacher's outputs for a whole run, for `members.NAME.cached`.

    Example: codistill cache-teacher dwt-clm:tiny --member weak --out runs/weak-cache
    """
    run = resolve(source, set_ or [])
    check_teachers(run)
    from codistill.progress import shown

    with shown("loading", 1):
        from codistill import caching
    plan = caching.plan(run, member, kind=kind, few=k, dtype=dtype, device=device)
    console.print(str(plan), markup=False)
    with shown("caching", plan.steps) as advance:
        manifest = caching.write(plan, out, advance)
    error = manifest["kl_error"]
    told = "" if error is None else f"; KL(teacher to cached) {error:.2e} nats a row"
    console.print(f"{out}: to use it, --set members.{member}.cached={out}{told}", markup=False)
