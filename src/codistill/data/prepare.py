"""Text to tokens: sources in, a verified folder of memory-mapped shards out, or nothing that looks like one."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from .corpus import FORMAT, Corpus, count_ids, read_manifest, remember_verified
from .documents import Reading, read_source
from .encode import Block, blocks_of, encode_all
from .shards import Shard, finished_shards, shard_files, write_atomically, write_shards, writing
from .sources import Source, find_sources, fingerprint
from .units import UNITS, Fragment, Selection, documents, fragments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAINING_CHARACTERS = 1 << 27
_WORTH_A_PROCESS = 4 << 20


@dataclass(frozen=True)
class Progress:
    """How far a preparation is. `part`: "text" or "held_out"; `total_bytes` is 0 when a source's size is not known."""

    part: str
    done_bytes: int
    total_bytes: int
    documents: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """By the bytes read so far; None when that cannot be told."""
        if not self.done_bytes or not self.total_bytes:
            return None
        return self.seconds * max(0, self.total_bytes - self.done_bytes) / self.done_bytes


@dataclass(frozen=True)
class _Job:
    """What is to be prepared: everything that decides the bytes of the result, and how many processes make them."""

    sources: list[Source]
    hashes: list[str]
    tokenizer: str | PreTrainedTokenizerFast
    column: str
    unit: str
    keep_every: int
    held_out: float
    bad_utf8: str

    def settings(self) -> dict:
        return {name: getattr(self, name) for name in ("column", "unit", "keep_every", "held_out", "bad_utf8")}

    def identity(self) -> str:
        content = [[source.format, digest] for source, digest in zip(self.sources, self.hashes, strict=True)]
        parts = [FORMAT, content, _behaviour(self.tokenizer), self.settings()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def prepare(
    sources: Sequence[str],
    tokenizer: str | PreTrainedTokenizerFast,
    out: str | Path,
    *,
    column: str = "text",
    unit: str = "document",
    keep_every: int = 1,
    held_out: float = 0.0,
    bad_utf8: str = "refuse",
    processes: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Corpus:
    """The corpus made of `sources` in the folder `out`, which appears whole or not at all.

    `tokenizer`: one, or a spec (`load_tokenizer`, or train:wordpiece:30522 on the text itself). `keep_every` 4 keeps
    one unit of every four. `held_out`: the share of documents, chosen by content, that goes to out/held_out instead.
    `processes`: by default one per core; it changes no byte. A preparation that was killed goes on from its last
    finished shard when called again with the same arguments. UserError for bad input and for a folder that holds
    something else, MachineError when it cannot be written.
    """
    job = _job(sources, tokenizer, column, unit, keep_every, held_out, bad_utf8, memory=None)
    return _prepare(job, Path(out), processes, progress)


def cached(
    sources: Sequence[str],
    tokenizer: str | PreTrainedTokenizerFast,
    *,
    cache: str | Path | None = None,
    processes: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    column: str = "text",
    unit: str = "document",
    keep_every: int = 1,
    held_out: float = 0.0,
    bad_utf8: str = "refuse",
) -> Corpus:
    """As `prepare`, in a folder of the cache named after the content: a second call opens it at once.

    A source that is itself a prepared folder is opened as it is, if it is the only one and its tokenizer agrees.
    """
    ready = _already_prepared(sources, tokenizer)
    if ready:
        return ready
    root = Path(cache) if cache else cache_folder()
    job = _job(sources, tokenizer, column, unit, keep_every, held_out, bad_utf8, memory=root / "hashes")
    return _prepare(job, root / "corpora" / job.identity()[:32], processes, progress)


def cache_folder() -> Path:
    """$CODISTILL_CACHE, else $XDG_CACHE_HOME/codistill, else ~/.cache/codistill."""
    if os.environ.get("CODISTILL_CACHE"):
        return Path(os.environ["CODISTILL_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codistill"


def _already_prepared(sources: Sequence[str], tokenizer: str | PreTrainedTokenizerFast) -> Corpus | None:
    if len(sources) != 1 or isinstance(sources, str) or not (Path(sources[0]) / "manifest.json").is_file():
        return None
    corpus = Corpus.open(sources[0])
    if not (isinstance(tokenizer, str) and tokenizer.startswith("train:")):
        corpus.require(_loaded(tokenizer), _name(tokenizer))
    return corpus


def _job(sources, tokenizer, column, unit, keep_every, held_out, bad_utf8, memory: Path | None) -> _Job:
    if unit not in UNITS:
        raise UserError(f"unit {unit!r}: unknown; there are {', '.join(UNITS)}")
    if bad_utf8 not in ("refuse", "replace"):
        raise UserError(f"bad_utf8 {bad_utf8!r}: unknown; there are refuse, replace")
    if keep_every < 1:
        raise UserError(f"keep_every {keep_every}: expected a whole number of at least 1")
    if not 0 <= held_out < 1:
        raise UserError(f"held_out {held_out}: expected a share of the documents, at least 0 and below 1")
    found = find_sources(sources)
    hashes = [fingerprint(source, memory) for source in found]
    if not (isinstance(tokenizer, str) and tokenizer.startswith("train:")):
        tokenizer = _loaded(tokenizer)
    return _Job(found, hashes, tokenizer, column, unit, keep_every, float(held_out), bad_utf8)


def _prepare(job: _Job, out: Path, processes: int | None, progress: Callable | None) -> Corpus:
    identity = job.identity()
    if _is_complete(out, identity):
        return Corpus.open(out)
    with _only_one(out, identity) as work:
        if work:
            _fill(job, identity, work, processes, progress)
            with writing(out):
                os.rename(work / "corpus", out)
    return Corpus.open(out)


def _is_complete(out: Path, identity: str) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "manifest.json").is_file():
        raise UserError(f"out {out}: exists and is no prepared text; name another folder")
    if read_manifest(out)["identity"] != identity:
        raise UserError(
            f"out {out}: holds text prepared from other sources or settings; name another folder or delete it"
        )
    return True


@contextmanager
def _only_one(out: Path, identity: str) -> Iterator[Path | None]:
    """The working folder beside `out`, locked against other processes; None when one of them has finished meanwhile.
    Work of an earlier attempt with the same identity is kept, any other is discarded."""
    work = out.with_name(f".{out.name}.partial")
    with writing(work):
        lock = _locked(work)
    try:
        if _is_complete(out, identity):
            yield None
        else:
            _discard_other(work, identity)
            yield work
        shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(lock)


def _locked(work: Path) -> int:
    """An open, locked descriptor of the folder. Whoever finishes removes the folder, so look again after waiting."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if work.exists() and os.path.samestat(os.stat(work), os.fstat(lock)):
            return lock
        os.close(lock)


def _discard_other(work: Path, identity: str) -> None:
    note = work / "identity"
    if note.is_file() and note.read_text() == identity:
        return
    for path in work.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_atomically(note, identity.encode())


def _fill(job: _Job, identity: str, work: Path, processes: int | None, progress: Callable | None) -> None:
    """Makes work/corpus complete."""
    folder, records = work / "corpus", work / "records"
    tokenizer = _tokenizer_for(job, work)
    parts = [("text", folder, (job.held_out, 1.0))]
    if job.held_out:
        parts.insert(0, ("held_out", folder / "held_out", (0.0, job.held_out)))
    for name, into, share in parts:
        if (into / "manifest.json").is_file():
            continue
        with writing(into):
            into.mkdir(parents=True, exist_ok=True)
            (records / name).mkdir(parents=True, exist_ok=True)
        selection = Selection(job.unit, job.keep_every, share)
        _fill_part(job, identity, name, selection, tokenizer, into, records / name, processes, progress)


def _fill_part(job, identity, part, selection, tokenizer, folder, records, processes, progress) -> None:
    from .tokenizers import Vocabulary, encoder_of, tokenizer_hash, vocabulary_size

    size, separator = vocabulary_size(tokenizer), Vocabulary.of(tokenizer).separator
    dtype = np.dtype("uint16" if size <= 1 << 16 else "uint32")
    done = finished_shards(folder, records)
    stream = _Stream(job, selection, part, progress)
    waiting = islice(stream.blocks(), sum(shard.blocks for shard in done), None)
    encoded = encode_all(waiting, encoder_of(tokenizer).to_str(), separator, _processes(job, processes))
    shards = [*done]
    for event in write_shards(encoded, folder, records, dtype, size, first=len(done)):
        if isinstance(event, Shard):
            shards.append(event)
        else:
            stream.report(event)
    _require_text(job, part, shards)
    about = {
        "name": _name(job.tokenizer),
        "hash": tokenizer_hash(tokenizer),
        "vocabulary": size,
        "separator": separator,
    }
    _finish(job, identity, part, tokenizer, folder, shards, dtype, about, stream.reading.counts)


def _finish(job, identity, part, tokenizer, folder, shards, dtype, about, counts) -> None:
    """Tokenizer, unigram counts and, last of all, the manifest."""
    with writing(folder / "tokenizer"):
        tokenizer.save_pretrained(folder / "tokenizer")
    maps = [np.memmap(folder / shard_files(i)[0], dtype=dtype, mode="r") for i in range(len(shards))]
    buffer = io.BytesIO()
    np.save(buffer, count_ids(maps, about["vocabulary"]))
    write_atomically(folder / "unigram.npy", buffer.getvalue())
    manifest = {
        "format": FORMAT,
        "identity": identity,
        "part": part,
        **{name: sum(getattr(shard, name) for shard in shards) for name in ("tokens", "units", "documents")},
        "dtype": dtype.name,
        "tokenizer": about,
        "settings": job.settings(),
        "counts": counts,
        "sources": [
            asdict(source) | {"sha256": digest} for source, digest in zip(job.sources, job.hashes, strict=True)
        ],
        "files": {"unigram.npy": [len(buffer.getvalue()), hashlib.sha256(buffer.getvalue()).hexdigest()]},
        "shards": [asdict(shard) for shard in shards],
    }
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    remember_verified(folder, manifest)


def _require_text(job: _Job, part: str, shards: list[Shard]) -> None:
    if sum(shard.tokens for shard in shards):
        return
    names = ", ".join(source.name for source in job.sources[:3])
    which = f"held_out {job.held_out}: no document of {names} fell into that part" if part == "held_out" else names
    raise UserError(f"{which}: no text found")


class _Stream:
    """The blocks of a job in order, and the report of how far the reading is."""

    def __init__(self, job: _Job, selection: Selection, part: str, progress: Callable | None):
        self.job, self.selection, self.part, self.progress = job, selection, part, progress
        self.reading = Reading(job.column, job.bad_utf8)
        self.before, self.tokens, self.documents, self.start = 0, 0, 0, time.monotonic()

    def blocks(self) -> Iterator[list[Fragment]]:
        return blocks_of(fragments(self._pieces(), self.selection, self.reading))

    def report(self, block: Block) -> None:
        self.tokens += block.tokens.size
        self.documents += block.document_ends.size
        if self.progress:
            done, total = self.before + self.reading.position, sum(source.size for source in self.job.sources)
            seconds = time.monotonic() - self.start
            self.progress(Progress(self.part, done, total, self.documents, self.tokens, seconds))

    def _pieces(self):
        for source in self.job.sources:
            yield from read_source(source, self.reading)
            self.before, self.reading.position = self.before + source.size, 0


def _tokenizer_for(job: _Job, work: Path) -> PreTrainedTokenizerFast:
    """The job's tokenizer; one that is to be trained is trained once, and kept for a second attempt."""
    from .tokenizers import load_tokenizer, parse_training_spec, train_tokenizer

    if not isinstance(job.tokenizer, str):
        return job.tokenizer
    kept = work / "tokenizer"
    if not (kept / "done").is_file():
        kind, size = parse_training_spec(job.tokenizer)
        tokenizer = train_tokenizer(kind, size, _training_texts(job))
        with writing(kept):
            tokenizer.save_pretrained(kept)
        write_atomically(kept / "done", b"")
    return load_tokenizer(kept)


def _training_texts(job: _Job) -> Iterator[str]:
    """The first 134 million characters of the documents that are not held out."""
    reading, held = Reading(job.column, job.bad_utf8), 0
    pieces = (piece for source in job.sources for piece in read_source(source, reading))
    for document in documents(pieces, Selection(share=(job.held_out, 1.0)), reading):
        for piece in document:
            yield piece.text
            held += len(piece.text)
            if held >= TRAINING_CHARACTERS:
                return


def _processes(job: _Job, wanted: int | None) -> int:
    if wanted is not None:
        return wanted
    if 0 < sum(source.size for source in job.sources) < _WORTH_A_PROCESS or job.sources[0].format == "builtin":
        return 1
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _loaded(tokenizer: str | PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    from .tokenizers import load_tokenizer

    return load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer


def _name(tokenizer: str | PreTrainedTokenizerFast) -> str:
    return tokenizer if isinstance(tokenizer, str) else tokenizer.name_or_path or type(tokenizer).__name__


def _behaviour(tokenizer: str | PreTrainedTokenizerFast) -> str:
    """What decides the ids that a tokenizer gives: its rules and its vocabulary, or how it is to be trained."""
    from .tokenizers import encoder_of, separator_of

    if isinstance(tokenizer, str):
        return tokenizer
    return hashlib.sha256(f"{separator_of(tokenizer)} {encoder_of(tokenizer).to_str()}".encode()).hexdigest()
