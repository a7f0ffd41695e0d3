"""Sources: what a user names (files, folders, globs, built-in text, hub data sets) to a list of readable things."""

import glob
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from codistill.data.builtin import builtin_fingerprint
from codistill.errors import UserError
from codistill.files import sha256

FORMATS = {
    ".txt": "text",
    ".txt.gz": "text",
    ".txt.zst": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class Source:
    """One file, built-in text or hub data set: how the user named it, its format, its bytes (0 when not known)."""

    name: str
    format: str
    size: int = 0

    @property
    def path(self) -> Path:
        return Path(self.name)


def find_sources(names: Sequence[str]) -> list[Source]:
    """The sources in the order given, each folder and glob in sorted order. UserError for what does not exist or
    holds nothing readable."""
    if isinstance(names, str):
        names = [names]
    found = [source for name in names for source in _find(str(name))]
    seen = set()
    for source in found:
        place = os.path.realpath(source.name) if source.format in FORMATS.values() else source.name
        if place in seen:
            raise UserError(
                f"data: {source.name} is named twice, by itself or by a folder or glob that it lies in; name it once"
            )
        seen.add(place)
    if not found:
        raise UserError("data: no source was named; give files, folders, globs or builtin:python/train")
    return found


def check_sources(names: Sequence[str]) -> None:
    """As `find_sources`; a prepared folder, which stands alone, is another's to open."""
    if not (len(names) == 1 and (Path(names[0]) / "manifest.json").is_file()):
        find_sources(names)


def check_named(names: Sequence[str], part: str) -> None:
    """UserError where a run names no text for this `part` of its data."""
    if not names:
        raise UserError(
            f"data.{part}: no text is named; give .txt, .jsonl or .parquet files, folders or globs, as in "
            f"--set data.{part}=[corpus/*.parquet]"
        )


def fingerprint(source: Source, memory: Path | None = None) -> str:
    """SHA-256 of the content. For built-in text of what determines it, and for a hub data set of its name, for it
    cannot be read twice. `memory`: a folder that keeps the hashes of files by path, size and time of change.
    """
    if source.format == "builtin":
        return builtin_fingerprint(source.name)
    if source.format == "hub":
        return hashlib.sha256(source.name.encode()).hexdigest()
    return _hash_once(source.path, memory) if memory else hash_file(source.path)


def hash_file(path: Path) -> str:
    """SHA-256 (hex) of a file; UserError when it cannot be read."""
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _find(name: str) -> list[Source]:
    if name.startswith("builtin:"):
        builtin_fingerprint(name)
        return [Source(name, "builtin")]
    if name.startswith("hub:"):
        return [Source(name, "hub")]
    path = Path(name).expanduser()
    if path.is_dir():
        return _inside(path)
    if path.is_file():
        return [_file(path)]
    matches = sorted(glob.glob(str(path), recursive=True))
    if "**" in name:  # which names folders beside all that is in them
        matches = [match for match in matches if Path(match).is_file() and _format(Path(match))]
    if not matches:
        raise UserError(f"source {name}: no such file, folder or glob (hub data sets are spelled hub:NAME)")
    return [source for match in matches for source in _find(match)]


def _inside(folder: Path) -> list[Source]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _format(path))
    if not files and (folder / "manifest.json").is_file():
        raise UserError(f"source {folder}: a prepared folder stands alone; it cannot be mixed or prepared again")
    if not files:
        raise UserError(f"source {folder}: the folder holds no {', '.join(FORMATS)} file")
    return [_file(path) for path in files]


def _file(path: Path) -> Source:
    found = _format(path)
    if found is None:
        raise UserError(f"source {path}: unknown kind of file; expected {', '.join(FORMATS)}")
    return Source(str(path), found, path.stat().st_size)


def _format(path: Path) -> str | None:
    return next((kind for suffix, kind in FORMATS.items() if path.name.lower().endswith(suffix)), None)


def _hash_once(path: Path, memory: Path) -> str:
    state = os.stat(path)
    name = str(path.resolve())
    stamp = [name, state.st_size, state.st_mtime_ns]
    kept = memory / (hashlib.sha256(name.encode()).hexdigest() + ".json")
    try:
        known = json.loads(kept.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return known["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = hash_file(path)
    # Not being able to remember costs time, and nothing else.
    with suppress(OSError):
        memory.mkdir(parents=True, exist_ok=True)
        beside = kept.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps({"stamp": stamp, "sha256": digest}), encoding="utf-8")
        beside.replace(kept)
    return digest
