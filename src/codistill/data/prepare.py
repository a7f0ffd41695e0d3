"""Text to tokens: sources in, a verified folder of memory-mapped shards out, or nothing that looks like one."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from codistill.data.corpus import FORMAT, Corpus, count_ids, remember_verified
from codistill.data.encode import encode_all
from codistill.data.job import Job, Progress, Settings, Stream, name_of
from codistill.data.shards import Shard, finished_shards, shard_files, write_atomically, write_shards, writing
from codistill.data.workplace import is_complete, workplace
from codistill.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Progress", "cache_folder", "cached", "prepare"]


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

    `tokenizer`: one, or a spec (see `load_tokenizer`; train:wordpiece:30522 trains one on the text itself). `unit`:
    document, paragraph or sentence; a separator ends each. `keep_every` 4 keeps one unit of every four. `held_out`: the
    share of documents, chosen by content, that goes to out/held_out instead. `bad_utf8`: refuse, or replace (and
    count). `processes`: by default one per core; it changes no byte. A preparation that was killed goes on from its
    last finished shard when called again with the same arguments. UserError for bad input and for a folder that holds
    something else, MachineError when it cannot be written.
    """
    job = Job.of(sources, tokenizer, Settings(column, unit, keep_every, held_out, bad_utf8))
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

    `cache`: by default `cache_folder()`. A prepared folder, as the only source, is opened as it is if it was made with
    this tokenizer, and with whatever of the settings is not the default; UserError naming both otherwise.
    """
    settings = Settings(column, unit, keep_every, held_out, bad_utf8)
    ready = _already_prepared(sources, tokenizer, settings)
    if ready:
        return ready
    root = Path(cache) if cache else cache_folder()
    job = Job.of(sources, tokenizer, settings, memory=root / "hashes")
    return _prepare(job, root / "corpora" / job.identity()[:32], processes, progress)


def cache_folder() -> Path:
    """$CODISTILL_CACHE, else $XDG_CACHE_HOME/codistill, else ~/.cache/codistill."""
    if os.environ.get("CODISTILL_CACHE"):
        return Path(os.environ["CODISTILL_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codistill"


def _already_prepared(
    sources: Sequence[str], tokenizer: str | PreTrainedTokenizerFast, settings: Settings
) -> Corpus | None:
    from codistill.data.tokenizers import load_tokenizer

    if isinstance(sources, str) or len(sources) != 1 or not (Path(sources[0]) / "manifest.json").is_file():
        return None
    corpus = Corpus.open(sources[0])
    if isinstance(tokenizer, str):
        if tokenizer.startswith("train:"):
            raise UserError(
                f"data.tokenizer {tokenizer}: {corpus.folder} is prepared already, with a tokenizer of its own; "
                "use that with --set data.tokenizer=null"
            )
        corpus.with_tokenizer(load_tokenizer(tokenizer), tokenizer)
    else:
        corpus.with_tokenizer(tokenizer, name_of(tokenizer))
    made, usual = corpus.manifest["settings"], asdict(Settings())
    for name, wanted in asdict(settings).items():
        if wanted != usual[name] and wanted != made[name]:
            raise UserError(
                f"data.{name} {wanted}: {corpus.folder} was prepared with {name} {made[name]}; prepare it anew with "
                f"{wanted}, or leave that setting out"
            )
    return corpus


def _prepare(job: Job, out: Path, processes: int | None, progress: Callable | None) -> Corpus:
    if processes is not None and processes < 1:
        raise UserError(f"--processes {processes}: at least one is needed")
    identity = job.identity()
    if not is_complete(out, identity):
        with workplace(out, identity) as work:
            if work:
                _fill(job, identity, work, processes or job.processes(), progress)
    corpus = Corpus.open(out)
    # What is there may be of a tokenizer that gives the same tokens and begins its rows with another.
    return corpus if isinstance(job.tokenizer, str) else corpus.with_tokenizer(job.tokenizer, job.tokenizer_name())


def _fill(job: Job, identity: str, work: Path, processes: int, progress: Callable | None) -> None:
    """Makes work/corpus complete."""
    tokenizer = _tokenizer_of(job, work)
    for part, share in job.settings.parts():
        folder = work / "corpus" / ("" if part == "text" else part)
        records = work / "records" / part
        if (folder / "manifest.json").is_file():
            continue
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            records.mkdir(parents=True, exist_ok=True)
        stream = Stream(job, part, share, progress)
        shards = _write(stream, tokenizer, folder, records, processes)
        if not sum(shard.tokens for shard in shards):
            raise UserError(_no_text(job, part))
        _finish(stream, identity, tokenizer, folder, shards)


def _write(stream: Stream, tokenizer, folder: Path, records: Path, processes: int) -> list[Shard]:
    """All shards of one part, those of an earlier attempt first."""
    from codistill.data.tokenizers import encoder_of, separator_of, vocabulary_size

    shards = finished_shards(folder, records)
    blocks = stream.blocks(skip=sum(shard.blocks for shard in shards))
    encoded = encode_all(blocks, encoder_of(tokenizer).to_str(), separator_of(tokenizer), processes)
    size = vocabulary_size(tokenizer)
    events = write_shards(encoded, folder, records, _dtype(size), size, first=len(shards))
    # Closed here, for an error keeps the frames alive: files and worker processes must not wait for that to end.
    with closing(encoded), closing(events):
        for event in events:
            if isinstance(event, Shard):
                shards.append(event)
            else:
                stream.report(event)
    return shards


def _finish(stream: Stream, identity: str, tokenizer, folder: Path, shards: list[Shard]) -> None:
    """Tokenizer, unigram counts and, last of all, the manifest."""
    from codistill.data.tokenizers import separator_of, tokenizer_hash, vocabulary_size

    job, size = stream.job, vocabulary_size(tokenizer)
    with writing(folder / "tokenizer"):
        tokenizer.save_pretrained(folder / "tokenizer")
    manifest = {
        "format": FORMAT,
        "identity": identity,
        "part": stream.part,
        **{name: sum(getattr(shard, name) for shard in shards) for name in ("tokens", "units", "documents")},
        "dtype": _dtype(size).name,
        "tokenizer": {
            "name": job.tokenizer_name(),
            "hash": tokenizer_hash(tokenizer),
            "vocabulary": size,
            "separator": separator_of(tokenizer),
        },
        "settings": asdict(job.settings),
        "counts": stream.reading.counts,
        "sources": [asdict(source) | {"sha256": hash} for source, hash in zip(job.sources, job.hashes, strict=True)],
        "files": {"unigram.npy": _write_unigram(folder, len(shards), size)},
        "shards": [asdict(shard) for shard in shards],
    }
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    remember_verified(folder, manifest)


def _write_unigram(folder: Path, shards: int, size: int) -> list:
    maps = [np.memmap(folder / shard_files(i)[0], dtype=_dtype(size), mode="r") for i in range(shards)]
    buffer = io.BytesIO()
    np.save(buffer, count_ids(maps, size))
    write_atomically(folder / "unigram.npy", buffer.getvalue())
    return [len(buffer.getvalue()), hashlib.sha256(buffer.getvalue()).hexdigest()]


def _dtype(vocabulary: int) -> np.dtype:
    return np.dtype("uint16" if vocabulary <= 1 << 16 else "uint32")


def _no_text(job: Job, part: str) -> str:
    names = ", ".join(source.name for source in job.sources[:3]) + (", …" if len(job.sources) > 3 else "")
    if part == "held_out":
        return f"held_out {job.settings.held_out}: no document of {names} fell into that part; take a larger share"
    return f"{names}: no text found"


def _tokenizer_of(job: Job, work: Path) -> PreTrainedTokenizerFast:
    """The job's tokenizer; one that is to be trained is trained once, and kept for a second attempt."""
    from codistill.data.tokenizers import load_tokenizer

    if not isinstance(job.tokenizer, str):
        return job.tokenizer
    kept = work / "tokenizer"
    if not (kept / "done").is_file():
        tokenizer = job.trained_tokenizer()
        if len(tokenizer) == len(tokenizer.all_special_ids):  # of no text WordPiece learns nothing
            raise UserError(_no_text(job, "text"))
        with writing(kept):
            tokenizer.save_pretrained(kept)
        write_atomically(kept / "done", b"")
    return load_tokenizer(kept)
