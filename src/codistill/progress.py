"""Progress that a person can read: a bar with time left on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 15.0


class Advance(Protocol):
    """Called with how much is done in all, a few words to show beside the bar, and the total once it is known."""

    def __call__(self, done: int, note: str = "", total: int | None = None) -> None: ...


def silent(done: int, note: str = "", total: int | None = None) -> None:
    """An `Advance` that shows nothing."""


@contextmanager
def shown(what: str, total: int, console: Console | None = None) -> Iterator[Advance]:
    """A bar for `total` units of `what`, on standard error."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _lines(what, total, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total, note="")

        def advance(done: int, note: str = "", total: int | None = None) -> None:
            progress.update(task, completed=done, total=total, note=note or progress.tasks[task].fields["note"])

        yield advance


@contextmanager
def quiet(what: str, total: int, console: Console | None = None) -> Iterator[Advance]:
    """As `shown`, for a process that another one speaks for."""
    yield silent


class Reading(Protocol):
    """How far reading has come: bytes done and in all, and the rate (`codistill.data.prepare.Progress` is one)."""

    @property
    def done_bytes(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def tokens_per_second(self) -> float: ...


@contextmanager
def preparing(what: str) -> Iterator[Callable[[Reading], None]]:
    """A bar in megabytes read, for the text that is turned into tokens."""
    with shown(f"{what}, MB", 0) as advance:

        def progress(state: Reading) -> None:
            advance(state.done_bytes // 2**20, f"{state.tokens_per_second:,.0f} tokens/s", state.total_bytes // 2**20)

        yield progress


def _lines(what: str, known: int, console: Console) -> Advance:
    started = last = time.monotonic()
    first: int | None = None

    def advance(done: int, note: str = "", total: int | None = None) -> None:
        nonlocal last, first
        total = total or known
        first = done if first is None else first
        now = time.monotonic()
        if now - last < _SECONDS_BETWEEN_LINES and (done < total or not total):
            return
        last = now
        left = (total - done) * (now - started) / max(done - first, 1)
        console.print(f"{what}: {done:,} of {total:,}, {left:.0f} s left  {note}", highlight=False, soft_wrap=True)

    return advance
