"""The ways in which a command can fail without being broken."""

from collections.abc import Iterable
from difflib import get_close_matches

STOPPED = 75  # the exit status of what stopped when asked to, and can go on: EX_TEMPFAIL of sysexits.h


class UserError(Exception):
    """Something that was asked for cannot be done as asked (exit status 2).

    The message is one line: the field or file, what came in, what was wanted, and what to do.
    """


class MachineError(Exception):
    """The machine failed: no space, no permission, no memory (exit status 1). One line, as in `UserError`."""


def first_line(error: BaseException) -> str:
    """What a library's error says, cut to a line; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """All that an error says, on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The nearest of `names` as words to end a sentence with; nothing where none is near."""
    close = get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


class FailedElsewhere(Exception):
    """Another process of the run failed, and rank 0 says why: this one ends quietly with `args[0]` as exit status."""
