"""A user's own Python: a file is run, and what is wrong with it is said in one line, with the place."""

import sys
import traceback
from collections.abc import Callable
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from codistill.errors import UserError, one_line

_T = TypeVar("_T")


def is_own(spec: str) -> bool:
    """Whether `spec` has the form FILE.py:FUNCTION."""
    file, colon, name = spec.rpartition(":")
    return bool(colon) and file.endswith(".py") and name.isidentifier()


def file_of(spec: str) -> Path:
    """The file of FILE.py:FUNCTION."""
    return Path(spec.rpartition(":")[0]).expanduser()


def function_of(spec: str, field: str) -> Callable:
    """The function that FILE.py:FUNCTION names; UserError beginning with `field` where there is none."""
    file, name = file_of(spec), spec.rpartition(":")[2]
    if not file.is_file():
        raise UserError(f"{field}: there is no file {str(file)!r}; wanted FILE.py:FUNCTION")
    found = getattr(module_of(file.absolute()), name, None)
    if not callable(found):
        raise UserError(f"{field}: {str(file)!r} has no function {name!r}; wanted FILE.py:FUNCTION")
    return found


@cache
def module_of(file: Path) -> ModuleType:
    """What running `file` (an absolute path) leaves; once in a process."""
    return tried(file, lambda: _run(file))


def tried(file: Path, call: Callable[[], _T]) -> _T:
    """What `call`, which runs code of `file`, returns; what it raises as one line with its place."""
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file.absolute())]
        place = f" in line {lines[-1]}" if lines else ""
        raise UserError(f"{file}: {type(error).__name__}{place}: {one_line(error)}") from error


def _run(file: Path) -> ModuleType:
    name = f"codistill_own_{file.stem}"
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)  # where dataclasses look for it
    sys.path.insert(0, str(file.parent))  # as `python FILE` would, for what lies beside it
    spec.loader.exec_module(module)
    return module
