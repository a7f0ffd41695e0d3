"""English prose that every Python installation carries: the language reference and the standard library's docstrings.

Read at run time with `ast`: nothing is imported but `pydoc_data.topics`, which is text.
"""

import ast
import hashlib
import inspect
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from codistill.errors import UserError

PARTS = {"builtin:python": (0.0, 1.0), "builtin:python/train": (0.05, 1.0), "builtin:python/validation": (0.0, 0.05)}
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
_SHORTEST = 40


def builtin_documents(name: str) -> Iterator[str]:
    """The documents of "builtin:python" or of its parts "/train" and "/validation" (about 5 %, chosen by the hash of
    the document), always in the same order: one per topic of the language reference, one per module (its docstrings,
    repeats left out). Raises UserError for another name.
    """
    low, high = _part(name)
    for text in _everything():
        if low <= share_of(text) < high:
            yield text


def builtin_fingerprint(name: str) -> str:
    """Changes when the text may have changed: the interpreter's version and the list of files read, with sizes."""
    _part(name)
    files = "\n".join(f"{path.relative_to(_library())} {path.stat().st_size}" for path in _modules())
    return hashlib.sha256(f"{name}\n{sys.version}\n{files}".encode()).hexdigest()


def share_of(text: str) -> float:
    """A number in [0, 1) from the content of a text: equal texts fall on the same side of every split."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big") / 2**64


def _part(name: str) -> tuple[float, float]:
    if name not in PARTS:
        raise UserError(f"source {name}: unknown built-in text; there are {', '.join(PARTS)}")
    return PARTS[name]


@cache
def _everything() -> tuple[str, ...]:
    """All documents; kept, for parsing the library takes seconds and the text two megabytes."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    reference = [text for topic in sorted(topics) for text in _new([topics[topic]], seen)]
    return (*reference, *(text for path in _modules() for text in _new(_docstrings(path), seen)))


def _new(texts: list[str], seen: set[str]) -> list[str]:
    """The texts not seen before, joined to one document; none when nothing is left."""
    fresh = [text for text in dict.fromkeys(texts) if text not in seen]
    seen.update(fresh)
    return ["\n\n".join(fresh)] if fresh else []


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _modules() -> list[Path]:
    found = []
    for folder, folders, files in os.walk(_library()):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED and not name.startswith("config-"))
        # Names with a leading "_sysconfigdata" hold tables of the build machine, not prose.
        found += [Path(folder, name) for name in sorted(files) if name.endswith(".py") and "sysconfigdata" not in name]
    return found


def _docstrings(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, owners)]
    cleaned = [inspect.cleandoc(text) for text in texts if text]
    return [text for text in cleaned if len(text) >= _SHORTEST]
