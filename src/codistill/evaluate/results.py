"""Cells: what one model scored at one task with one seed, kept by content, so that nothing is computed twice.

OUT/cells/KEY.json     one cell with its predictions; written whole or not at all
OUT/results.json       the cells of the last evaluation without predictions, their comparisons, how many others are kept
"""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codistill.errors import UserError
from codistill.files import machine_error, write_file

FORMAT = 1  # of a cell: raise it when what is computed changes, and old cells are computed anew


@dataclass
class Cell:
    """`score` is the task's one number, NaN where its metric has none; None: it failed, and `failed` says why.

    `scores`: every metric. `predictions` and `labels`: of the examples that `score` is made of, in order. `counted`:
    what was done to the input (truncated examples…) and with it (rows, learning rate…).
    """

    model: str
    task: str
    seed: int | None
    score: float | None = None
    scores: dict[str, Any] = field(default_factory=dict)
    predictions: list = field(default_factory=list)
    labels: list = field(default_factory=list)
    counted: dict[str, Any] = field(default_factory=dict)
    failed: str = ""


class Store:
    """The cells of an output folder, by key."""

    def __init__(self, out: Path):
        self.folder = out / "cells"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise machine_error(error, out) from error

    def get(self, key: str) -> dict[str, Any] | None:
        """What was put under `key`; None if nothing was, or nothing readable."""
        try:
            return _with_nan(json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None

    def num_others(self, keys: Collection[str]) -> int:
        """How many cells there are beside those of `keys`; what else is kept, as chosen learning rates, is none."""
        others = {file.stem for file in self.folder.glob("*.json")} - set(keys)
        return sum("score" in (self.get(key) or {}) for key in others)

    def put(self, key: str, content: Mapping[str, Any]) -> None:
        """Keeps `content`; raises MachineError when the disk fails."""
        file = self.folder / f"{key}.json"
        try:
            write_file(file, json_with_nan(content))
        except OSError as error:
            raise machine_error(error, file) from error


def key_of(**content: Any) -> str:
    """A name for whatever is determined by `content`."""
    text = json.dumps({"format": FORMAT, **content}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def json_with_nan(content: Any, indent: int | None = None) -> str:
    """JSON in which a number that is none is spelled "nan": the standard knows no NaN, and null is a missing one."""
    return json.dumps(_without_nan(content), indent=indent, allow_nan=False)


def check_out(out: Path) -> None:
    """UserError when `out` is a file, or holds something else than an evaluation."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "cells").is_dir())):
        raise UserError(f"--out {out}: it holds something else than an evaluation; give another folder")


def _without_nan(content: Any) -> Any:
    return _mapped(content, lambda value: "nan" if isinstance(value, float) and not math.isfinite(value) else value)


def _with_nan(content: Any) -> Any:
    return _mapped(content, lambda value: math.nan if value == "nan" else value)


def _mapped(content: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(content, Mapping):
        return {key: _mapped(value, change) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_mapped(value, change) for value in content]
    return change(content)
