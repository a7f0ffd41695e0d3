"""The command line: every command parses, calls the library, and prints. torch is imported only where it is used.

Exit status: 0 done; 1 the machine failed; 2 what was asked for cannot be done; 75 stopped by a signal, resumable;
130 interrupted.
"""

import sys
from collections.abc import Sequence
from io import TextIOWrapper

from cyclopts import CycloptsError
from rich.console import Console
from rich.markup import escape

from codistill.cli import bench, evaluate, export, make, report, run, study, teachers, text  # noqa: F401  they register commands
from codistill.cli.console import app, speaks
from codistill.errors import FailedElsewhere, MachineError, UserError, first_line


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `codistill` command; exits with the status given in this module's docstring."""
    _write_utf8()
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, UserError) as error:
        _fail(str(error), 2)
    except MachineError as error:
        _fail(str(error), 1)
    except (RuntimeError, MemoryError) as error:
        _fail_by_machine(error)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except FailedElsewhere as error:  # of several processes that torchrun started, another says why
        sys.exit(error.args[0])


def _write_utf8() -> None:
    """Prints UTF-8 whatever the locale, as our files are and as Python does by itself from 3.15 on: one without a
    character of a table would end the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # rather than what a notebook puts there
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _fail_by_machine(error: BaseException) -> None:
    """Ends with a line where `error` is want of memory or PyTorch's compiler's, and raises it again where it is not."""
    from codistill.machine import compiler_failure, is_out_of_memory  # import torch, as whatever raised this has

    if is_out_of_memory(error):
        remedy = "lower batch.sequences, raise batch.accumulate, or set gradient_checkpointing"
        _say(f"out of memory: {first_line(error)}; for a run, {remedy}")
    elif failure := compiler_failure(error):
        _say(f"PyTorch's compiler failed: {failure}; set compile: false")
    else:
        raise error
    sys.exit(1)  # on whichever rank it happens: the others do not know


def _fail(message: str, status: int) -> None:
    if speaks("LOCAL_RANK"):
        _say(message)
    sys.exit(status)


def _say(message: str) -> None:
    line = " ".join(message.split())
    Console(stderr=True, highlight=False, soft_wrap=True, emoji=False).print(f"[bold red]codistill:[/] {escape(line)}")


__all__ = ["app", "main"]
