"""How fast text becomes tokens and tokens become batches, beside the bare tokenizers library in the same run."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

from codistill.data.batches import Batches
from codistill.data.corpus import Corpus
from codistill.data.documents import Reading, read_source
from codistill.data.prefetch import prefetched
from codistill.data.prepare import prepare
from codistill.data.sources import find_sources
from codistill.data.tokenizers import load_tokenizer
from codistill.errors import UserError
from codistill.objectives import MaskedLM

_SEQUENCES = 256
_SHORTEST = 8
_BARE_BATCH = 1000


def bench_data(
    sources: Sequence[str] = ("builtin:python",),
    tokenizer: str = "train:wordpiece:4096",
    *,
    length: int = 128,
    mask_rate: float = 0.3,
    seconds: float = 2.0,
    repeats: int = 1,
) -> list[dict]:
    """Rows of {"what", "cores", "tokens_per_second", "ratio"}: the bare library, `prepare` on one core and on two
    (`ratio` is to the bare library on one core), medians of `repeats`, and batches on one core, each `seconds` long,
    of 256 rows or, as their "what" then says, of all that the text has. Pins this process to cores on Linux, and undoes
    it. A repeat takes about four times as long as the bare library. UserError for text without a single row.
    """
    if length < _SHORTEST:
        raise UserError(f"--length {length}: wanted at least {_SHORTEST} tokens, as in a run")
    with tempfile.TemporaryDirectory() as folder:
        # A first preparation trains what is to be trained and warms the disk's cache.
        corpus = prepare(sources, tokenizer, Path(folder, "first"))
        cases = _cases(corpus, length, mask_rate)
        return _preparation(sources, corpus, Path(folder), repeats) + _batches(cases, seconds)


def _preparation(sources: Sequence[str], corpus: Corpus, folder: Path, repeats: int) -> list[dict]:
    """Medians over the repeats, which take turns, so that a slow minute of the machine touches all alike."""
    tokenizer = load_tokenizer(corpus.folder / "tokenizer")
    texts, bare = list(_texts(sources)), tokenizer.backend_tokenizer
    cases: dict[tuple[str, int], Callable[[int], int]] = {
        ("tokenizers.encode_batch", 1): lambda turn: _encode(bare.encode_batch, texts),
        ("tokenizers.encode_batch_fast", 1): lambda turn: _encode(bare.encode_batch_fast, texts),
        ("prepare", 1): lambda turn: _prepared(sources, tokenizer, folder / f"one{turn}", 1),
        ("prepare", 2): lambda turn: _prepared(sources, tokenizer, folder / f"two{turn}", 2),
    }
    rates: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for turn in range(repeats):
        for (what, cores), work in cases.items():
            with _cores(cores):
                rates[what, cores].append(_rate(partial(work, turn)))
    rows = [_row(what, cores, median(found)) for (what, cores), found in rates.items()]
    return [row | {"ratio": row["tokens_per_second"] / rows[0]["tokens_per_second"]} for row in rows]


def _cases(corpus: Corpus, length: int, mask_rate: float) -> dict[str, Batches]:
    """Every way to make batches that is measured, by its name."""
    plain, words = MaskedLM(mask_rate), MaskedLM(mask_rate, whole_word=True)
    of = partial(Batches, corpus, length=length)
    ways: dict[str, Callable[..., Batches]] = {
        "batches": partial(of, plain),
        "batches, whole words": partial(of, words),
        "batches, within documents": partial(of, plain, within_documents=True),
        "batches, padded": partial(of, plain, packing="padded"),
    }
    cases = {}
    for name, way in ways.items():
        held = way(sequences=0).num_rows
        if not held:
            raise UserError(
                f"--length {length}: the text has only {corpus.num_tokens} tokens; lower it, or give more text"
            )
        cases[name if held >= _SEQUENCES else f"{name}, {held} rows"] = way(sequences=min(held, _SEQUENCES))
    return cases


def _batches(cases: dict[str, Batches], seconds: float) -> list[dict]:
    with _cores(1):
        rows = [_row(name, 1, _rate(partial(_served, case, seconds))) for name, case in cases.items()]
        first = next(iter(cases.values()))
        rows.append(_row("batches, prefetched", 1, _rate(lambda: _ahead(first, seconds))))
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
