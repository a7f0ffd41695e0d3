"""Documents to units (whole documents, paragraphs or sentences): which of them are kept, and where they end."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from codistill.data.builtin import share_of
from codistill.data.documents import Piece, Reading

UNITS = ("document", "paragraph", "sentence")
_BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")
_SENTENCE_END = re.compile(r"""[.!?]["'”’)\]]*\s+(?=["'“‘(\[]*[A-Z0-9À-Þ])|\n+""")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'“‘])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Sir|Rev|Hon|Gen|Col|Capt|Lt|Sgt|Jr|Sr|No|Vol|Fig|pp?|vs|cf|etc"
    r"|e\.g|i\.e|al|Inc|Ltd|Co|Corp|approx|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\.$"
)


class Fragment(NamedTuple):
    """Text to encode, and what ends with it. A long document comes in several fragments."""

    text: str
    ends_unit: bool
    ends_document: bool


@dataclass(frozen=True)
class Selection:
    """What of the text is kept: every `keep_every`-th unit, of the documents whose content hash lies in `share`."""

    unit: str = "document"
    keep_every: int = 1
    share: tuple[float, float] = (0.0, 1.0)


def fragments(pieces: Iterable[Piece], selection: Selection, reading: Reading) -> Iterator[Fragment]:
    """The kept fragments in order. Documents without any text are left out and counted as empty."""
    number = 0
    for document in documents(pieces, selection, reading):
        held: Fragment | None = None
        for text, ends_unit in _units_of(document, selection.unit):
            number += selection.unit != "document"
            if selection.unit != "document" and (number - 1) % selection.keep_every:
                continue
            if held:
                yield held
            held = Fragment(text, ends_unit, False)
        if held:
            yield Fragment(held.text, True, True)


def documents(pieces: Iterable[Piece], selection: Selection, reading: Reading) -> Iterator[Iterator[Piece]]:
    """Each kept document as a stream of its pieces; what of it is not consumed is passed over."""
    source, number = iter(pieces), 0
    for first in source:
        reading.counts["documents_read"] += 1
        if first.last and not first.text.strip():
            reading.counts["empty"] += 1
            continue
        rest = _until_last(first, source)
        if selection.share[0] <= share_of(first.text) < selection.share[1]:
            number += 1
            if selection.unit != "document" or (number - 1) % selection.keep_every == 0:
                yield rest
        for _ in rest:
            pass


def _until_last(piece: Piece, source: Iterator[Piece]) -> Iterator[Piece]:
    yield piece
    while not piece.last:
        piece = next(source)
        yield piece


def _units_of(document: Iterable[Piece], unit: str) -> Iterator[tuple[str, bool]]:
    """(text, whether a unit ends with it). A paragraph longer than a piece comes as several units."""
    blank_lines: bool | None = None
    for piece in document:
        if unit == "document":
            yield piece.text, piece.last
            continue
        if blank_lines is None:
            blank_lines = bool(_BLANK_LINES.search(piece.text.strip()))
        for paragraph in paragraphs(piece.text, blank_lines):
            for text in [paragraph] if unit == "paragraph" else sentences(paragraph):
                yield text, True


def paragraphs(text: str, blank_lines: bool) -> list[str]:
    """Stripped paragraphs: parted by blank lines where the document has any (wrapped text), else by line ends."""
    parts = _BLANK_LINES.split(text) if blank_lines else text.split("\n")
    return [part.strip() for part in parts if part.strip()]


def sentences(paragraph: str) -> list[str]:
    """Stripped sentences of a paragraph by a short rule of thumb: a full stop, question or exclamation mark, closing
    quotes, white space, then a capital or a figure; not after a common abbreviation or an initial.

    >>> sentences('He saw Mr. J. Smith. "Go!" he said. It was 3.5 miles.')
    ['He saw Mr. J. Smith.', '"Go!" he said.', 'It was 3.5 miles.']
    """
    text = re.sub(r"\s*\n\s*", " ", paragraph)
    found, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        head = text[start : match.end()].rstrip()
        if not _ABBREVIATION.search(head[-12:]):
            found.append(head)
            start = match.end()
    return [part for part in [*found, text[start:].strip()] if part]
