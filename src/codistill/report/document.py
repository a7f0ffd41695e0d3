"""Several folders as one page: HTML that needs nothing else, and the same as Markdown."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from codistill.blocks import Block, Heading, Picture, to_html, to_markdown
from codistill.errors import UserError
from codistill.files import machine_error, write_file
from codistill.report.compared import comparison, group_section
from codistill.report.groups import Group, grouped
from codistill.report.sections import section
from codistill.study import Study


def write_report(folders: Sequence[Path], out: Path, studies: Sequence[Study] = ()) -> tuple[Path, Path]:
    """Writes OUT (HTML) and the same with .md, whose pictures lie beside it; returns both. `studies`: what may be among
    `folders` besides the studies that codistill has."""
    if out.suffix != ".html":
        raise UserError(f"--out {out}: the page is HTML; give a name that ends in .html")
    names = [study.name for study in studies]
    if len(set(names)) < len(names):
        raise UserError(
            f"--study: two of the files hold a study of one name, {max(names, key=names.count)!r}; give one"
        )
    title = "Codistill: what came out"
    blocks: list[Block] = [Heading(title, 1)]
    folders = list(dict.fromkeys(folders))
    runs = [folder for folder in folders if (folder / "run.yaml").is_file()]
    groups = grouped(runs) if len(runs) > 1 else []
    blocks += comparison(groups) if groups else []
    for number, folder in enumerate(folders, start=1):
        blocks += [_numbered(block, number) for block in _section(folder, groups, studies)]
    markdown = out.with_suffix(".md")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, to_html(blocks, title))
        write_file(markdown, to_markdown(blocks))
        for block in blocks:
            if isinstance(block, Picture) and isinstance(block.content, str):
                write_file(out.parent / block.name, block.content)
    except OSError as error:
        raise machine_error(error, out) from error
    return out, markdown


def _section(folder: Path, groups: Sequence[Group], studies: Sequence[Study]) -> list[Block]:
    """The blocks of one folder; a group of several runs stands where the first of them was given."""
    group = next((group for group in groups if folder in group.folders), None)
    if group is None or len(group.folders) == 1:
        return section(folder, studies)
    return group_section(group) if folder == group.folders[0] else []


def _numbered(block: Block, number: int) -> Block:
    """A picture whose file no other folder of the same name writes."""
    return replace(block, name=f"{number}-{block.name}") if isinstance(block, Picture) else block
