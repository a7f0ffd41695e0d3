"""Reading: every source is a stream of pieces, a document being one or several of them, so that memory stays bounded.

A file of text is one document. Of .jsonl and .parquet every row is one, in the named column.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from codistill.data.builtin import builtin_documents
from codistill.data.sources import Source
from codistill.errors import UserError, first_line

PIECE = 1 << 17
LONGEST_LINE = 64 << 20
_BATCH_BYTES = 8 << 20
_INSIDE = re.compile(rb"[0-9A-Za-z](?= [0-9A-Za-z])")


class Piece(NamedTuple):
    """A part of a document, and whether it is the last one."""

    text: str
    last: bool


@dataclass
class Reading:
    """How to read, and what was met on the way. `bad_utf8`: "refuse" or "replace". `position`: bytes of the source
    read so far (as stored, so compressed ones for a compressed file); the counts are over all sources."""

    column: str = "text"
    bad_utf8: str = "refuse"
    position: int = 0
    counts: dict[str, int] = field(default_factory=lambda: {"documents_read": 0, "empty": 0, "replaced_utf8": 0})

    def decode(self, raw: bytes, place: str, start: int = 0) -> str:
        """The text; broken UTF-8 is refused with its place, or replaced by U+FFFD and counted. `start`: the bytes of
        the place before these."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if self.bad_utf8 != "replace":
                what = f"broken UTF-8 at byte {start + error.start} ({raw[error.start : error.start + 4].hex(' ')})"
                remedy = "repair it, or prepare the text with `codistill prepare --bad-utf8 replace`"
                raise UserError(f"{place}: {what}; {remedy}") from error
        text = raw.decode("utf-8", "replace")
        self.counts["replaced_utf8"] += text.count("\ufffd") - raw.count(b"\xef\xbf\xbd")
        return text


def read_source(source: Source, reading: Reading) -> Iterator[Piece]:
    """The pieces of a source in order. UserError naming file and place for what cannot be read."""
    readers = {"text": _text, "jsonl": _jsonl, "parquet": _parquet, "builtin": _builtin, "hub": _hub}
    reading.position = 0
    yield from readers[source.format](source, reading)


def cut_point(raw: bytes, start: int = 0, limit: int = PIECE) -> int:
    """Where to cut a long text at most `limit` bytes after `start`: before a blank between two plain letters, where
    no common pre-tokenizer looks across, else before other white space, else between two characters."""
    low, high = start + limit - limit // 4, start + limit
    window = raw[low:high]
    inside = [match.end() for match in _INSIDE.finditer(window)]
    if inside:
        return low + inside[-1]
    blank = max(window.rfind(b" "), window.rfind(b"\n"))
    if blank > 0:
        return low + blank
    while 0x80 <= raw[high] < 0xC0 and high > start + limit - 4:
        high -= 1
    return high


def _pieces(raw: bytes, reading: Reading, place: str, before: int = 0) -> Iterator[Piece]:
    start = 0
    while len(raw) - start > PIECE:
        cut = cut_point(raw, start)
        yield Piece(reading.decode(raw[start:cut], place, before + start), last=False)
        start = cut
    yield Piece(reading.decode(raw[start:], place, before + start), last=True)


def _text(source: Source, reading: Reading) -> Iterator[Piece]:
    """Streams the file, so a file of any length is one document in bounded memory."""
    with _opened(source, reading) as file:
        held, start = b"", 0
        while chunk := file.read(2 * PIECE):
            held += chunk
            while len(held) > 2 * PIECE:
                cut = cut_point(held)
                yield Piece(reading.decode(held[:cut], source.name, start), last=False)
                held, start = held[cut:], start + cut
        yield from _pieces(held, reading, source.name, start)


def _jsonl(source: Source, reading: Reading) -> Iterator[Piece]:
    with _opened(source, reading) as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            place = f"{source.name}, line {number}"
            if len(line) > LONGEST_LINE:
                raise UserError(f"{place}: longer than {LONGEST_LINE >> 20} MiB; cut the document into several lines")
            if line.strip():
                yield from _pieces(_field(line, reading, place), reading, place)


def _field(line: bytes, reading: Reading, place: str) -> bytes:
    """The text of one line of JSON, as UTF-8."""
    try:
        row = json.loads(reading.decode(line, place))
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error})") from error
    if not isinstance(row, dict) or reading.column not in row:
        there = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}, no object"
        raise UserError(f"{place}: no column {reading.column!r}; there are: {there or 'none'}")
    return _encoded(row[reading.column], reading, place)


def _encoded(text: object, reading: Reading, place: str) -> bytes:
    if text is None:
        return b""
    if not isinstance(text, str):
        raise UserError(f"{place}: column {reading.column!r} holds a {type(text).__name__}, expected text")
    # "surrogatepass" turns a lone surrogate, which JSON can spell, into bytes that `decode` then treats as broken.
    return text.encode("utf-8", "surrogatepass")


def _parquet(source: Source, reading: Reading) -> Iterator[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(source.name, buffer_size=1 << 20, pre_buffer=False) as file:
            _require_column(file.schema_arrow, source, reading)
            row = 0
            for batch in file.iter_batches(_rows_at_once(file.metadata), columns=[reading.column]):
                for raw in batch.column(0).cast(pa.large_binary()).to_pylist():
                    yield from _pieces(raw or b"", reading, f"{source.name}, row {row}")
                    row += 1
                reading.position = source.size * row // max(1, file.metadata.num_rows)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{source.name}: damaged or no Parquet file ({first_line(error)})") from error


def _require_column(schema, source: Source, reading: Reading) -> None:
    if reading.column not in schema.names:
        raise UserError(f"{source.name}: no column {reading.column!r}; there are: {', '.join(schema.names) or 'none'}")
    kind = str(schema.field(reading.column).type)
    if kind not in ("string", "large_string", "string_view", "binary", "large_binary"):
        raise UserError(f"{source.name}: column {reading.column!r} holds {kind}, expected text")


def _rows_at_once(metadata) -> int:
    stored = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    per_row = max(1, stored // max(1, metadata.num_rows))
    return max(1, min(8192, _BATCH_BYTES // per_row))


def _builtin(source: Source, reading: Reading) -> Iterator[Piece]:
    for text in builtin_documents(source.name):
        yield from _pieces(text.encode("utf-8", "replace"), reading, source.name)


def _hub(source: Source, reading: Reading) -> Iterator[Piece]:
    """A data set of the Hugging Face hub, streamed: hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIGURATION:SPLIT."""
    for number, row in enumerate(_hub_rows(source)):
        place = f"{source.name}, row {number}"
        if reading.column not in row:
            raise UserError(f"{place}: no column {reading.column!r}; there are: {', '.join(row)}")
        yield from _pieces(_encoded(row[reading.column], reading, place), reading, place)


def _hub_rows(source: Source) -> Iterable[dict]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"source {source.name}: it needs codistill's extra `data` (docs/install.md)") from error
    name, *rest = source.name.removeprefix("hub:").split(":")
    split = rest[-1] if rest else "train"
    try:
        return load_dataset(name, *rest[:-1], split=split, streaming=True)
    except Exception as error:
        raise UserError(f"source {source.name}: cannot be opened ({first_line(error)})") from error


class _Watched(io.RawIOBase):
    """A file that counts what was read of it, and turns what is wrong with it into one clear error."""

    def __init__(self, stream: IO[bytes], counted: IO[bytes], source: Source, reading: Reading):
        self.stream, self.counted, self.source, self.reading = stream, counted, source, reading

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self.stream.close()
            self.counted.close()
        super().close()

    def readinto(self, buffer) -> int:
        try:
            data = self.stream.read(len(buffer))
            self.reading.position = self.counted.tell()
        except (OSError, EOFError, zlib.error) as error:
            place = f"{self.source.name}, near byte {self.counted.tell()} of {self.source.size}"
            raise UserError(f"{place}: damaged or cut short ({first_line(error)})") from error
        buffer[: len(data)] = data
        return len(data)


def _opened(source: Source, reading: Reading) -> IO[bytes]:
    try:
        plain = open(source.path, "rb")  # noqa: SIM115 (closed with the reader that wraps it)
    except OSError as error:
        raise UserError(f"{source.name}: cannot be read ({error.strerror})") from error
    stream = _decompressed(plain, Path(source.name).suffix.lower())
    return io.BufferedReader(_Watched(stream, plain, source, reading), 1 << 18)


def _decompressed(plain: IO[bytes], suffix: str):
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=plain)
    if suffix == ".zst":
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(plain, mode="r"), "zstd")
    return plain
