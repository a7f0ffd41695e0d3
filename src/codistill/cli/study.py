"""study: the grids of runs behind a finding."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from codistill.cli.console import Device, app, console
from codistill.errors import STOPPED, UserError, did_you_mean

if TYPE_CHECKING:
    from codistill.study.run import Request


@app.command
def study(
    name: Annotated[str, Parameter(help="A study, or a Python file of your own; an unknown name lists them.")],
    /,
    *,
    out: Annotated[Path, Parameter(help="The study's folder; what it holds already is not trained again.")],
    scale: Annotated[str, Parameter(help="tiny (CPU), small (one GPU) or paper (as published).")] = "tiny",
    data: Annotated[Path | None, Parameter(help="A folder with text/, blimp/, glue/ (docs/studies.md).")] = None,
    seeds: Annotated[
        int | None, Parameter(help="Seeds of each arm; by default the study's own number, 5 for those that are here.")
    ] = None,
    jobs: Annotated[int | None, Parameter(help="Processes at once; by default one per GPU or core.")] = None,
    against: Annotated[
        Path | None, Parameter(help="This study's folder from elsewhere: which of its differences keep their sign?")
    ] = None,
    plan: Annotated[bool, Parameter(negative="", help="Print what would be trained, and stop.")] = False,
    device: Device = None,
) -> None:
    """Train a study's grid of runs, with seeds and controls, and make its table and figure.

    Example: codistill study ctcd --data data --out studies/ctcd
    """
    from codistill.progress import shown
    from codistill.study.find import check_study, find_study
    from codistill.study.run import Request, check_free
    from codistill.study.scales import SCALES

    for option, value in (("--seeds", seeds), ("--jobs", jobs)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: at least one is needed")
    if data is not None and not data.is_dir():
        raise UserError(f"--data {data}: there is no such folder")
    if scale not in SCALES:
        raise UserError(f"there is no scale {scale!r}{did_you_mean(scale, SCALES)}; the scales are {', '.join(SCALES)}")
    wanted, size = find_study(name), SCALES[scale]
    request = Request(wanted, size, seeds or wanted.seeds, out)
    if not plan:
        check_free(request)  # which is asked again when it begins: planning takes a while
    with shown("planning", 1):
        from codistill.study.plan import plan_lines
        from codistill.study.rerun import check_against, write_comparison
        from codistill.study.run import check_out, devices

        check_study(wanted, size)
        check_out(request)
        if against is not None:
            check_against(request, against)
        lines = plan_lines(request, data, jobs, devices(device))
    console.print("\n".join(lines), markup=False)
    if not plan:
        found = _run(request, data=data, jobs=jobs, device=device)
        if against is not None:
            console.print(write_comparison(request, against), markup=False)
        if found["failed"]:
            sys.exit(2)


def _run(request: "Request", *, data: Path | None, jobs: int | None, device: str | None) -> dict[str, Any]:
    from codistill.progress import shown
    from codistill.study.execute import Stopped
    from codistill.study.run import devices, run_study

    try:
        with shown(f"study {request.study.name}", 1) as advance:
            found = run_study(request, data=data, jobs=jobs, devices=devices(device), advance=advance)
    except Stopped:
        console.print("stopped; what was under way is saved, and the same command goes on with it")
        sys.exit(STOPPED)
    console.print((request.out / "table.md").read_text(encoding="utf-8"), markup=False)
    console.print(f"cells, table and figure: {request.out}", markup=False)
    return found
