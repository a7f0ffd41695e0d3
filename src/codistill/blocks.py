"""Pages as data: headings, text, tables, pictures; written as Markdown or as one self-contained HTML page."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Colours that stay apart for colour-blind readers (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass(frozen=True)
class Heading:
    """`level` 1 is the page's title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; `important` ones stand out."""

    text: str
    important: bool = False


@dataclass(frozen=True)
class Written:
    """Somebody's Markdown as it is, but for where its links lead: beside another page they would lead elsewhere."""

    markdown: str


@dataclass(frozen=True)
class Table:
    """Rows of cells under `head`; the first column is of words, and so are those in `words`."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """SVG (text) or PNG (bytes) with what it shows; `name` is its file beside a Markdown page."""

    name: str
    content: str | bytes
    caption: str


@dataclass(frozen=True)
class Listing:
    """Text as it is, folded away under `summary`."""

    summary: str
    text: str


Block = Heading | Text | Written | Table | Picture | Listing


def to_markdown(blocks: Sequence[Block]) -> str:
    """The page as Markdown; its pictures are files beside it."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block], title: str) -> str:
    """The page as HTML that needs nothing else, no network either."""
    body = "\n".join(_html(block) for block in blocks)
    return f"{_HEAD.replace('TITLE', escape(title))}<main>\n{body}\n</main></body></html>\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text, important):
            return f"**{text}**" if important else text
        case Written(markdown):
            return _without_targets(markdown)
        case Table(head, rows):
            aligned = ["---" if _is_words(block, column) else "---:" for column in range(len(head))]
            lines = [head, aligned, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case Picture(name, _, caption):
            return f"![{caption}]({name})"
        case Listing(summary, text):
            return f"<details><summary>{summary}</summary>\n\n```yaml\n{text.rstrip()}\n```\n\n</details>"


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Text(text, important):
            return f"<p{' class=important' if important else ''}>{escape(text)}</p>"
        case Written(markdown):
            return f"<div class=written>{_rendered(markdown)}</div>"
        case Table(head, rows):
            lines = [_row(block, head, "th"), *(_row(block, row, "td") for row in rows)]
            return f"<div class=wide><table>{''.join(lines)}</table></div>"
        case Picture(_, content, caption):
            return f"<figure>{_image(content, caption)}<figcaption>{escape(caption)}</figcaption></figure>"
        case Listing(summary, text):
            return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def _without_targets(markdown: str) -> str:
    """Links as their words, pictures as nothing."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"!\[[^\]]*\]\([^)]*\)", "", markdown)).strip()


def _rendered(markdown: str) -> str:
    """As HTML; HTML that stands in it is shown, not taken."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable("table").render(_without_targets(markdown))


def _row(table: Table, cells: Sequence[str], tag: str) -> str:
    parts = (
        f"<{tag}{' class=w' if _is_words(table, column) else ''}>{escape(cell)}</{tag}>"
        for column, cell in enumerate(cells)
    )
    return f"<tr>{''.join(parts)}</tr>"


def _is_words(table: Table, column: int) -> bool:
    return column == 0 or column in table.words


def _image(content: str | bytes, caption: str) -> str:
    if isinstance(content, str):
        return content[content.index("<svg") :]
    return f'<img alt="{escape(caption)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title><style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; margin: 0; background: #fff }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem }
h1 { font-size: 1.7rem } h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid #d0d7de }
h3 { font-size: 1.05rem; margin-top: 1.8rem }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e4e8ec; white-space: nowrap }
th { border-bottom: 2px solid #8c959f } .w { text-align: left } tr:hover td { background: #f6f8fa }
figure { margin: 1rem 0 } figure svg, figure img { max-width: 100%; height: auto } figcaption { color: #57606a }
.written th, .written td { text-align: left; white-space: normal; vertical-align: top }
.important { border-left: .3rem solid #d55e00; padding-left: .8rem; font-weight: 600 }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: .8rem } summary { cursor: pointer }
</style></head><body>
"""
