"""Progress that a person can read: a bar with time left on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_SECONDS_BETWEEN_LINES = 15.0


class Advance(Protocol):
    """Called with how much is done in all, a few words to show beside the bar, and the total once it is known.

    `numbers`: what a run just logged, by names as in `metrics.jsonl` (`NAME/hard`, …).
    """

    def __call__(
        self, done: int, note: str = "", total: int | None = None, *, numbers: Mapping[str, float] | None = None
    ) -> None: ...


def silent(done: int, note: str = "", total: int | None = None, *, numbers: Mapping[str, float] | None = None) -> None:
    """An `Advance` that shows nothing."""


@contextmanager
def shown(what: str, total: int, console: Console | None = None) -> Iterator[Advance]:
    """A bar for `total` units of `what`, on standard error."""
    console = console or Console(stderr=True, emoji=False)
    if not console.is_terminal:
        yield _lines(what, total, console)
        return
    with _bar(console) as progress:
        yield _on(progress, what, total)


@contextmanager
def live(what: str, total: int, console: Console | None = None) -> Iterator[Advance]:
    """As `shown`; on a terminal with a table of each member's newest numbers below the bar."""
    console = console or Console(stderr=True, emoji=False)
    if not console.is_terminal:
        yield _lines(what, total, console)
        return
    progress, newest = _bar(console), dict[str, float]()
    move = _on(progress, what, total)
    with Live(progress, console=console, refresh_per_second=4) as display:

        def advance(
            done: int, note: str = "", total: int | None = None, *, numbers: Mapping[str, float] | None = None
        ) -> None:
            newest.update(numbers or {})
            move(done, note.partition(" | ")[2], total)  # before it stand the losses, which the table shows
            display.update(Group(progress, members_table(newest)))

        yield advance


def members_table(numbers: Mapping[str, float]) -> Table:
    """A row for each member, a column for each kind of number: hard loss, held-out loss, each teacher's, gradient norm.

    `numbers` are named `MEMBER/KIND` as in `metrics.jsonl`; losses are in nats.
    """
    kinds = sorted({name.partition("/")[2] for name in numbers}, key=lambda kind: (_order(kind), kind))
    table = Table("member", *(kind.replace("_", " ") for kind in kinds), box=SIMPLE)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for member in dict.fromkeys(name.partition("/")[0] for name in numbers):
        values = (numbers.get(f"{member}/{kind}") for kind in kinds)
        table.add_row(member, *("" if value is None else f"{value:.3f}" for value in values))
    return table


def _order(kind: str) -> int:
    return (
        ("hard", "held_out_loss").index(kind)
        if kind in ("hard", "held_out_loss")
        else 2 + (not kind.startswith("from_"))
    )


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


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def _on(progress: Progress, what: str, total: int) -> Advance:
    """An `Advance` that moves a bar of `progress`."""
    task = progress.add_task(what, total=total, note="")

    def advance(
        done: int, note: str = "", total: int | None = None, *, numbers: Mapping[str, float] | None = None
    ) -> None:
        progress.update(task, completed=done, total=total, note=note or progress.tasks[task].fields["note"])

    return advance


def _lines(what: str, known: int, console: Console) -> Advance:
    started = last = time.monotonic()
    first: int | None = None
    said = ""

    def advance(
        done: int, note: str = "", total: int | None = None, *, numbers: Mapping[str, float] | None = None
    ) -> None:
        nonlocal last, first, started, said
        if not note:
            return
        total = total or known
        now = time.monotonic()
        if first is None:  # what came before, preparing and resuming, says nothing about the pace
            first, started = done, now
        if now - last < _SECONDS_BETWEEN_LINES and (done < total or not total):
            return
        last = now
        left = f", {(total - done) * (now - started) / (done - first):.0f} s left" if done > first else ""
        line = f"{what}: {done:,} of {total:,}{left}  {note}"
        if line != said:
            console.print(line, highlight=False, soft_wrap=True)
            said = line

    return advance
