"""How fast text becomes tokens and tokens become batches, beside the bare tokenizers library in the same run."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .data.batches import Batches
from .data.corpus import Corpus
from .data.documents import Reading, read_source
from .data.prefetch import prefetched
from .data.prepare import prepare
from .data.sources import find_sources
from .data.tokenizers import load_tokenizer
from .objectives import MaskedLM

_SEQUENCES = 256
_BARE_BATCH = 1000


def bench_data(
    sources: Sequence[str] = ("builtin:python",),
    tokenizer: str = "train:wordpiece:4096",
    *,
    length: int = 128,
    mask_rate: float = 0.3,
    seconds: float = 2.0,
) -> list[dict]:
    """Rows of {"what", "cores", "tokens_per_second", "ratio"}: the bare library, `prepare` on one core and on two
    (`ratio` is to the bare library on one core), and batches on one core, each `seconds` long. Pins this process to
    cores on Linux, and undoes it. About twice the time the bare library needs for the text, and some seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        # A first preparation trains what is to be trained and warms the disk's cache.
        corpus = prepare(sources, tokenizer, Path(folder, "first"))
        rows = _preparation(sources, corpus, Path(folder))
        return rows + _batches(corpus, length, mask_rate, seconds)


def _preparation(sources: Sequence[str], corpus: Corpus, folder: Path) -> list[dict]:
    tokenizer = load_tokenizer(corpus.folder / "tokenizer")
    texts = list(_texts(sources))
    bare = tokenizer.backend_tokenizer
    rows = []
    with _cores(1):
        for name in ("encode_batch", "encode_batch_fast"):
            encode = getattr(bare, name)
            rows.append(_row(f"tokenizers.{name}", 1, _rate(partial(_encode, encode, texts))))
        rows.append(_row("prepare", 1, _rate(lambda: _prepared(sources, tokenizer, folder / "one", 1))))
    if len(_allowed()) > 1:
        with _cores(2):
            rows.append(_row("prepare", 2, _rate(lambda: _prepared(sources, tokenizer, folder / "two", 2))))
    for row in rows:
        row["ratio"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
    return rows


def _batches(corpus: Corpus, length: int, mask_rate: float, seconds: float) -> list[dict]:
    plain, words = MaskedLM(mask_rate), MaskedLM(mask_rate, whole_word=True)
    cases = {
        "batches": Batches(corpus, plain, length=length, sequences=_SEQUENCES),
        "batches, whole words": Batches(corpus, words, length=length, sequences=_SEQUENCES),
        "batches, within documents": Batches(corpus, plain, length=length, sequences=_SEQUENCES, within_documents=True),
        "batches, padded": Batches(corpus, plain, length=length, sequences=_SEQUENCES, packing="padded"),
    }
    with _cores(1):
        rows = [_row(name, 1, _rate(partial(_served, case, seconds))) for name, case in cases.items()]
        rows.append(_row("batches, prefetched", 1, _rate(lambda: _ahead(cases["batches"], seconds))))
    return rows


def _row(what: str, cores: int, rate: float) -> dict:
    return {"what": what, "cores": cores, "tokens_per_second": rate, "ratio": None}


def _rate(work: Callable[[], int]) -> float:
    start = time.perf_counter()
    tokens = work()
    return tokens / (time.perf_counter() - start)


def _encode(encode: Callable, texts: list[str]) -> int:
    parts = (texts[i : i + _BARE_BATCH] for i in range(0, len(texts), _BARE_BATCH))
    return sum(len(encoding) for part in parts for encoding in encode(part, add_special_tokens=False))


def _prepared(sources: Sequence[str], tokenizer, out: Path, processes: int) -> int:
    return prepare(sources, tokenizer, out, processes=processes).num_tokens


def _served(batches: Batches, seconds: float) -> int:
    end, step = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        batches.at(step)
        step += 1
    return step * batches.sequences * batches.length


def _ahead(batches: Batches, seconds: float) -> int:
    end, steps = time.perf_counter() + seconds, 0
    stream = prefetched(batches, 0, 1 << 40)
    for _ in stream:
        steps += 1
        if time.perf_counter() > end:
            break
    stream.close()
    return steps * batches.sequences * batches.length


def _texts(sources: Sequence[str]) -> Iterator[str]:
    reading = Reading()
    for source in find_sources(sources):
        yield from (piece.text for piece in read_source(source, reading))


def _allowed() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


@contextmanager
def _cores(count: int) -> Iterator[None]:
    """Only so many cores, and no threads of the tokenizers library besides."""
    before, parallel = _allowed(), os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if before:
        os.sched_setaffinity(0, set(sorted(before)[:count]))
    try:
        yield
    finally:
        if before:
            os.sched_setaffinity(0, before)
        if parallel is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = parallel
