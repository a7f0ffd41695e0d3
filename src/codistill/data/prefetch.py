"""Making batches ahead of their use, in a thread: numpy lets go of the interpreter's lock in all the long parts."""

from __future__ import annotations

from collections.abc import Generator
from queue import Full, Queue
from threading import Event, Thread
from typing import TYPE_CHECKING

from codistill.data.batches import Batches

if TYPE_CHECKING:
    from codistill.objectives import Batch

_PATIENCE = 0.05
_DEPTH = 2


def prefetched(
    batches: Batches, first: int, last: int, *, rank: int = 0, world: int = 1, pinned: bool = False
) -> Generator[list[Batch]]:
    """What `batches.at(step)` gives for each step from `first` to before `last`, made up to two steps ahead;
    `pinned`: in page-locked memory, for a GPU.

    A batch depends on nothing but its step, so this cannot change results. Errors are raised at the step they belong
    to. Close the generator (`contextlib.closing`) when it is left early; that ends the thread.
    """
    ready: Queue[list[Batch] | Exception] = Queue(_DEPTH)
    stop = Event()

    def make() -> None:
        for step in range(first, last):
            try:
                found = batches.at(step, rank=rank, world=world)
                made: list[Batch] | Exception = [batch.pinned() for batch in found] if pinned else found
            except Exception as error:
                made = error
            if not _put(ready, made, stop) or isinstance(made, Exception):
                return

    thread = Thread(target=make, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in range(first, last):
            made = ready.get()
            if isinstance(made, Exception):
                raise made
            yield made
    finally:
        stop.set()
        thread.join()


def _put(ready: Queue, made: object, stop: Event) -> bool:
    """Whether there was room before it was time to stop."""
    while not stop.is_set():
        try:
            ready.put(made, timeout=_PATIENCE)
            return True
        except Full:
            continue
    return False
