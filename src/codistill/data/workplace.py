"""Where a preparation works: a folder beside its goal, locked, kept when killed, moved into place when done."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from codistill.data.corpus import read_manifest
from codistill.data.shards import write_atomically, writing
from codistill.errors import UserError
from codistill.files import take_lock


def is_complete(out: Path, identity: str) -> bool:
    """Whether `out` is the finished corpus of this identity; UserError when it is something else and not empty."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "manifest.json").is_file():
        raise UserError(f"out {out}: exists and is no prepared text; name another folder")
    if read_manifest(out)["identity"] != identity:
        what = "holds text prepared from other sources or settings"
        raise UserError(f"out {out}: {what}; name another folder or delete it")
    return True


@contextmanager
def workplace(out: Path, identity: str) -> Iterator[Path | None]:
    """The folder to work in, locked against other processes; None when one of those has finished meanwhile. What an
    earlier attempt of the same identity left there is kept, anything else discarded. Leaving it moves its folder
    "corpus" to `out`; leaving it by an error keeps everything."""
    work = out.with_name(f".{out.name}.partial")
    with writing(work):
        lock = _locked(work)
    try:
        if is_complete(out, identity):
            yield None
        else:
            _discard_other(work, identity)
            yield work
            with writing(out):
                os.rename(work / "corpus", out)
        shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(lock)


def _locked(work: Path) -> int:
    """An open, locked descriptor of the folder. Whoever finishes removes the folder, so look again after waiting."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work, os.O_RDONLY)
        take_lock(lock, wait=True)
        if work.exists() and os.path.samestat(os.stat(work), os.fstat(lock)):
            return lock
        os.close(lock)


def _discard_other(work: Path, identity: str) -> None:
    note = work / "identity"
    if note.is_file() and note.read_text(encoding="utf-8") == identity:
        return
    with writing(work):
        for path in work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_atomically(note, identity.encode())
