"""Cells: what the arms of a study came to, kept by content, so that nothing is computed twice.

OUT/cells/KEY.json    one finished or failed arm: scores, curves and costs of its members; written whole or not at all
OUT/models/KEY/ROLE   the models that other arms learn from or start from
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from codistill.errors import UserError
from codistill.files import machine_error, to_json, write_file
from codistill.study.arms import FORMAT

Cell = dict[str, Any]


class Cells:
    """The cells of an output folder."""

    def __init__(self, out: Path):
        self.out, self.folder = out, out / "cells"

    def get(self, key: str) -> Cell | None:
        """What is known under `key`; None if nothing."""
        return _read(self.folder / f"{key}.json")

    def put(self, key: str, cell: Mapping[str, Any]) -> None:
        """Keeps a cell; raises MachineError when the disk fails."""
        file = self.folder / f"{key}.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(file, to_json({"format": FORMAT, **cell}, indent=1) + "\n")
        except OSError as error:
            raise machine_error(error, file) from error

    def adopt(self, wanted: Mapping[str, Mapping[str, str]], text: Mapping[str, str]) -> None:
        """Copies from the studies beside this one the finished cells of the keys `wanted` that are of the same text and
        began from the same models from outside, whose content is given with the key."""
        for key, outside in wanted.items():
            found = (_read(place / "cells" / f"{key}.json") for place in self._beside())
            alike = next(
                (c for c in found if c is not None and not c["failed"] and _read_from(c) == (text, outside)), None
            )
            if self.get(key) is None and alike is not None:
                self.put(key, alike)

    def beside(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` whose finished cells lie in the studies beside this one, of whatever text."""
        places = self._beside()
        found = {key: [_read(place / "cells" / f"{key}.json") for place in places] for key in keys}
        return [key for key, cells in found.items() if any(c is not None and not c["failed"] for c in cells)]

    def model(self, key: str, role: str) -> Path | None:
        """The folder of a finished arm's model, here or beside; None where it was not kept."""
        own = self.get(key)
        if own is None or own["failed"]:
            return None
        for place in [self.out.resolve(), *self._beside()]:
            folder, cell = place / "models" / key / role, _read(place / "cells" / f"{key}.json")
            if (folder / "config.json").is_file() and cell is not None and _read_from(cell) == _read_from(own):
                return folder
        return None

    def _beside(self) -> list[Path]:
        folders = sorted(self.out.resolve().parent.glob("*/cells"))
        return [folder.parent for folder in folders if folder.parent != self.out.resolve()]


def _read(file: Path) -> Cell | None:
    try:
        cell = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(cell, dict) or cell.get("format") != FORMAT:
        raise UserError(
            f"{file}: it is no cell of format {FORMAT}, but of another version of codistill; give another --out, or "
            "remove it"
        )
    return cell


def _read_from(cell: Cell) -> tuple[Any, Any]:
    """The inputs of an arm that are not in its key: the text, and the models from outside."""
    return cell.get("text"), cell.get("outside", {})


def check_same_text(cells: Sequence[Cell]) -> None:
    """UserError when finished cells were made from different text: they cannot stand in one table."""
    found: dict[str, str] = {}
    for cell in cells:
        if not cell["failed"]:
            found.setdefault(json.dumps(cell["text"], sort_keys=True), cell["arm"])
    if len(found) > 1:
        names = " and ".join(sorted(found.values())[:2])
        raise UserError(
            f"the cells of {names} are of different text, so they cannot be compared; give the text of the first "
            "with --data, or another --out"
        )
