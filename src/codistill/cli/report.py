"""report: runs, studies and evaluations as a page."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from codistill.cli.console import app, console


@app.command
def report(
    folders: Annotated[list[Path], Parameter(help="Folders of finished runs, studies and evaluations.")],
    /,
    *,
    out: Annotated[Path, Parameter(help="The page; the same as Markdown lies beside it.")] = Path("report.html"),
    study: Annotated[
        list[Path] | None, Parameter(negative="", help="The file of a study of your own, if one is among them.")
    ] = None,
) -> None:
    """Write tables and figures of runs, studies and evaluations as one self-contained HTML page, and as Markdown.

    Runs that are equal but for the seed are one group, and groups are compared with intervals over seeds.

    Example: codistill report studies/ctcd runs/ctcd-tiny --out report.html
    """
    from codistill.progress import shown

    with shown("loading", 1):
        from codistill.report import write_report
        from codistill.study.find import find_study
    page, markdown = write_report(folders, out, [find_study(str(file)) for file in study or []])
    console.print(f"page: {page}\nas Markdown: {markdown}", markup=False)
