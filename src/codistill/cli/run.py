"""train, lr, recipes, show."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from codistill.cli.console import Device, Settings, Source, app, console, resolve, speaks
from codistill.config import Run
from codistill.errors import STOPPED, UserError
from codistill.folders import is_run_folder
from codistill.loading import to_yaml
from codistill.recipes import RECIPES, check_teachers


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
    plan: Annotated[bool, Parameter(negative="", help="Print FLOPs, memory and time, and stop.")] = False,
    device: Device = None,
) -> None:
    """Train the members of a run together and write its run folder.

    Example: codistill train ctcd:tiny --set steps=500 --out runs/first
    """
    run = resolve(source, set_ or [])
    if resume and fresh:
        raise UserError("--resume and --fresh exclude each other; give one of them")
    folder = out or _default_folder(source)
    check_teachers(run)
    if plan:
        return _print_plan(run, device)
    _check_places(run, folder, resume=resume, fresh=fresh)
    _train(run, folder, resume=resume, fresh=fresh, accept_changes=accept_changes, device=device)


@app.command
def lr(
    source: Source,
    /,
    *,
    set_: Settings = None,
    rates: Annotated[str, Parameter(help="Peak learning rates, comma-separated.")] = "1e-4,3e-4,1e-3,3e-3,1e-2",
    steps: Annotated[int, Parameter(help="Steps of each short run.")] = 100,
    device: Device = None,
) -> None:
    """Find learning rates: a short run of the whole cohort for each rate, and what each member reached.

    Example: codistill lr ctcd:tiny --rates 1e-3,3e-3,1e-2 --steps 200
    """
    run = resolve(source, [*(set_ or []), f"steps={steps}"])
    tried = [_rate(part) for part in rates.split(",")]
    check_teachers(run)
    from codistill.progress import shown

    with shown("loading", 1):
        from codistill.rates import rates_table, try_rates
    with shown("trying", steps * len(tried)) as advance:
        trials = try_rates(run, tried, steps, device=device, advance=advance)
    console.print(rates_table(trials, run.trained, steps))


@app.command
def recipes() -> None:
    """List the recipes, one line each.

    Example: codistill recipes
    """
    width = max(map(len, RECIPES))
    for name, recipe in RECIPES.items():
        console.print(f"{name:<{width}}  {(recipe.__doc__ or '').splitlines()[0]}", markup=False)
    console.print("\nEach comes as NAME:tiny (CPU, minutes; the default), NAME:small (one GPU) and NAME:paper.")
    console.print("Models are masked language models; where the name ends in -clm, causal ones.")


@app.command
def show(source: Source, /, *, set_: Settings = None) -> None:
    """Print the fully resolved configuration as YAML, which `train` accepts back.

    Example: codistill show dwt:paper --set seed=1
    """
    print(to_yaml(resolve(source, set_ or [])), end="")


def _print_plan(run: Run, device: str | None) -> None:
    from codistill.progress import shown

    with shown("planning", 1):
        from codistill import distributed
        from codistill.findings import advice
        from codistill.plan import memory_lines, plan_table
        from codistill.plan import plan as plan_of

        found = plan_of(run, distributed.start("single", device).device)
    console.print(plan_table(found, run))
    lines = [*memory_lines(found), *advice(run, found.parameters, found.passes)]
    console.print("\n".join(lines), markup=False, highlight=False)


def _rate(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--rates: {text!r} is no number; write them as in --rates 1e-4,3e-4") from None


def _default_folder(source: str) -> Path:
    path = Path(source)
    if path.name == "run.yaml" and is_run_folder(path.parent):
        return path.parent
    return Path("runs") / (path.stem if path.suffix else source.replace(":", "-"))


def _check_places(run: Run, folder: Path, *, resume: bool, fresh: bool) -> None:
    """What can be refused at once: a folder that the run may not have, and text that is not there."""
    from codistill.claim import check_folder, check_free
    from codistill.data.sources import check_named, check_sources

    if "WORLD_SIZE" in os.environ:  # processes that torchrun starts anew go on with what they find
        return
    # What has changed since the run was made is asked later: some settings are the device's to say.
    check_folder(run, folder, resume=resume, fresh=fresh, accept_changes=True)
    check_free(folder)
    for part, names in (("train", run.data.train), ("validation", run.data.validation)):
        check_named(names, part)
        check_sources(names)


def _train(run: Run, folder: Path, **options: Any) -> None:
    from codistill.progress import live, quiet, shown

    view, wait = (live, shown) if speaks("RANK") else (quiet, quiet)
    with wait("loading", 1):
        from codistill import report
        from codistill.run_folder import check_losses
        from codistill.train import Stopped
        from codistill.train import train as train_run
    try:
        with view("training", run.steps) as advance:
            train_run(run, folder, advance=advance, **options)
    except Stopped:
        if speaks("RANK"):
            console.print(f"stopped and saved; to go on: {again(folder, options['device'])}", markup=False)
        sys.exit(STOPPED)
    if not speaks("RANK"):
        return
    console.print(report.results_table(folder))
    picture = report.draw_curves(folder)
    if skipped := report.skipped_steps(report.read_results(folder)):
        console.print(skipped, markup=False)
    console.print(f"run folder: {folder}" + (f"\nlearning curves: {picture}" if picture else ""), markup=False)
    check_losses(folder)


def again(folder: Path, device: str | None) -> str:
    """The command that resumes the run in `folder`."""
    command = ["codistill", "train", str(folder / "run.yaml"), "--resume"]
    command += ["--device", device] if device else []
    here, everywhere = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
    if here and here != everywhere:  # how the nodes meet is not known here
        return f"on every node, as it was started by torchrun: {shlex.join(command)}"
    launcher = f"torchrun --nproc-per-node={here} --no-python " if here else ""
    return launcher + shlex.join(command)
