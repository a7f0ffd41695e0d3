"""What is to be prepared, and how far it is: everything that decides the bytes of a corpus, in one value."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from codistill.data.corpus import FORMAT
from codistill.data.documents import Piece, Reading, read_source
from codistill.data.encode import Block, blocks_of
from codistill.data.sources import Source, find_sources, fingerprint
from codistill.data.units import UNITS, Fragment, Selection, documents, fragments
from codistill.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAINING_CHARACTERS = 1 << 27
_WORTH_A_PROCESS = 4 << 20


@dataclass(frozen=True)
class Progress:
    """How far a preparation is. `part`: "text" or "held_out". Bytes are those of the sources as stored, `total_bytes`
    0 when not known; documents and tokens are those of this one.
    """

    part: str
    done_bytes: int
    total_bytes: int
    documents: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Settings:
    """How text is read and cut: see `prepare`. UserError for a value that makes no sense."""

    column: str = "text"
    unit: str = "document"
    keep_every: int = 1
    held_out: float = 0.0
    bad_utf8: str = "refuse"

    def __post_init__(self) -> None:
        for name, known in (("unit", UNITS), ("bad_utf8", ("refuse", "replace"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name}: {getattr(self, name)!r} is unknown; there are {', '.join(known)}")
        if self.keep_every < 1:
            raise UserError(f"keep_every: {self.keep_every}; wanted a whole number of at least 1")
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out: {self.held_out}; wanted a share of the documents, at least 0 and below 1")

    def parts(self) -> list[tuple[str, tuple[float, float]]]:
        """The names of the corpora that are made, and which documents go there, by content hash."""
        if not self.held_out:
            return [("text", (0.0, 1.0))]
        return [("held_out", (0.0, self.held_out)), ("text", (self.held_out, 1.0))]


@dataclass(frozen=True)
class Job:
    """Everything that decides the bytes of the result. `tokenizer` is one, or the spec of one to be trained."""

    sources: list[Source]
    hashes: list[str]
    tokenizer: str | PreTrainedTokenizerFast
    settings: Settings

    @classmethod
    def of(cls, names: Sequence[str], tokenizer, settings: Settings, memory: Path | None = None) -> Job:
        """Finds and hashes the sources and loads the tokenizer; `memory` as in `fingerprint`."""
        from codistill.data.tokenizers import load_tokenizer, parse_training_spec

        sources = find_sources(names)
        if isinstance(tokenizer, str) and tokenizer.startswith("train:"):
            parse_training_spec(tokenizer)
        elif isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer)
        return cls(sources, [fingerprint(source, memory) for source in sources], tokenizer, settings)

    def identity(self) -> str:
        """Equal for jobs that give the same corpus: by the content of the sources, not by their names."""
        content = [[source.format, digest] for source, digest in zip(self.sources, self.hashes, strict=True)]
        parts = [FORMAT, content, _behaviour(self.tokenizer), vars(self.settings)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def tokenizer_name(self) -> str:
        return name_of(self.tokenizer)

    def processes(self) -> int:
        """How many processes are worth starting: one per core, one for little text."""
        if sum(source.size for source in self.sources) < _WORTH_A_PROCESS and self.sources[0].format != "hub":
            return 1
        return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

    def trained_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of a train:… spec, from the first 134 million characters that are not held out."""
        from codistill.data.tokenizers import parse_training_spec, train_tokenizer

        kind, size = parse_training_spec(str(self.tokenizer))
        return train_tokenizer(kind, size, self._training_texts())

    def _training_texts(self) -> Iterator[str]:
        reading, held = Reading(self.settings.column, self.settings.bad_utf8), 0
        pieces = (piece for source in self.sources for piece in read_source(source, reading))
        for document in documents(pieces, Selection(share=(self.settings.held_out, 1.0)), reading):
            for piece in document:
                yield piece.text
                held += len(piece.text)
                if held >= TRAINING_CHARACTERS:
                    return


class Stream:
    """The blocks of one part of a job in order, and the report of how far the reading is."""

    def __init__(
        self, job: Job, part: str, share: tuple[float, float], progress: Callable[[Progress], None] | None = None
    ):
        self.job, self.part, self.progress = job, part, progress
        self.selection = Selection(job.settings.unit, job.settings.keep_every, share)
        self.reading = Reading(job.settings.column, job.settings.bad_utf8)
        self.before = self.tokens = self.documents = 0
        self.start = time.monotonic()

    def blocks(self, skip: int) -> Iterator[list[Fragment]]:
        """All blocks but the first `skip`, which are read all the same, so that every count comes out the same."""
        blocks = blocks_of(fragments(self._pieces(), self.selection, self.reading))
        for _ in range(skip):
            next(blocks)
        self.start = time.monotonic()
        yield from blocks

    def report(self, block: Block) -> None:
        """Tells that a block has been written."""
        self.tokens += block.tokens.size
        self.documents += block.document_ends.size
        if self.progress:
            total, seconds = sum(source.size for source in self.job.sources), time.monotonic() - self.start
            counts = (self._done(), total, self.documents, self.tokens, seconds)
            self.progress(Progress(self.part, *counts))

    def _done(self) -> int:
        return self.before + self.reading.position

    def _pieces(self) -> Iterator[Piece]:
        for source in self.job.sources:
            yield from read_source(source, self.reading)
            self.before, self.reading.position = self.before + source.size, 0


def name_of(tokenizer: str | PreTrainedTokenizerFast) -> str:
    """What a tokenizer is called in messages and manifests."""
    return tokenizer if isinstance(tokenizer, str) else tokenizer.name_or_path or type(tokenizer).__name__


def _behaviour(tokenizer: str | PreTrainedTokenizerFast) -> str:
    """What decides the ids that a tokenizer gives: its rules and its vocabulary, or how it is to be trained."""
    from codistill.data.saved_tokenizer import closing_encoder_of
    from codistill.data.tokenizers import separator_of

    if isinstance(tokenizer, str):
        return tokenizer
    return hashlib.sha256(f"{separator_of(tokenizer)} {closing_encoder_of(tokenizer).to_str()}".encode()).hexdigest()
