"""Folders that appear whole or not at all, and what to say when a disk fails."""

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from codistill.errors import MachineError


@contextmanager
def atomic_folder(place: Path) -> Iterator[Path]:
    """A fresh folder beside `place` that takes its name once the block has ended well, and vanishes if it has not.

    Every file is flushed before the rename, and the rename too, so that not even a loss of power leaves half a folder
    under the name. Raises MachineError for a failure of the disk.
    """
    fresh = place.with_name(f".{place.name}.partial")
    try:
        shutil.rmtree(fresh, ignore_errors=True)  # what a killed process left
        fresh.mkdir(parents=True)
        yield fresh
        for inside in [*fresh.rglob("*"), fresh]:
            _flush(inside)
        remove_folder(place)
        fresh.rename(place)
        _flush(place.parent)
    except (OSError, SafetensorError) as error:
        raise machine_error(error, place) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def remove_folder(place: Path) -> None:
    """Removes `place`, if it is there: at once under its name, whatever happens to the process meanwhile."""
    aside = place.with_name(f".{place.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    if place.exists():
        place.rename(aside)
        shutil.rmtree(aside)


def remove_left(folder: Path) -> None:
    """Removes what a process left in `folder` that was killed while it wrote; nobody else may be writing there."""
    for left in (found for ending in ("partial", "removed") for found in folder.glob(f".*.{ending}")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def write_file(file: Path, content: str | bytes) -> None:
    """Writes `content` so that `file` holds either all of it or what it held before, whatever happens.

    Processes that write the same file at the same time, on other machines too, do not disturb one another: the last
    one's content stays.
    """
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        _flush(partial)
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush(file.parent)


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON with null in place of numbers that are none: the standard knows no NaN, and a failure is no number."""
    return json.dumps(without_nan(content), indent=indent, allow_nan=False)


def without_nan(content: Any) -> Any:
    """`content` of mappings, lists and values with None in place of numbers that are none."""
    if isinstance(content, Mapping):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


@contextmanager
def locked(file: Path, *, wait: bool = True) -> Iterator[None]:
    """Inside, no other process is inside with the same `file`; BlockingIOError where one is and `wait` is off."""
    with file.open("a", encoding="utf-8") as held:
        take_lock(held.fileno(), wait=wait)
        yield


def is_locked(file: Path) -> bool:
    """Whether another process is inside `locked` with `file` at this moment."""
    try:
        with file.open("rb") as held:
            take_lock(held.fileno(), wait=False)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or whoever writes there will say what is wrong
        return False
    return False


def take_lock(descriptor: int, *, wait: bool) -> None:
    """Locks an open file or folder against other processes until it is closed; raises BlockingIOError as `locked` does.

    Where the system or the disk (a cluster's may) has no such locks, nothing is locked.
    """
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise


def machine_error(error: OSError | SafetensorError, place: Path) -> MachineError:
    """One line for a failure of the disk, with the remedy."""
    # safetensors tells what the system said in words only.
    what = (error.strerror if isinstance(error, OSError) else None) or str(error)
    is_full = os.strerror(errno.ENOSPC) in what
    remedy = "free some space and resume" if is_full else "what was there before is unchanged"
    return MachineError(f"{place} could not be written: {what}; {remedy}")


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
