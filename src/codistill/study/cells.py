"""Cells: what the arms of a study came to, kept by content, so that nothing is computed twice.

OUT/cells/KEY.json    one finished or failed arm: scores, curves and costs of its members; written whole or not at all
OUT/models/KEY/ROLE   the models that other arms learn from or start from
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codistill.errors import UserError
from codistill.files import machine_error, write_file
from codistill.study.arms import FORMAT

Cell = dict[str, Any]


class Cells:
    """The cells of an output folder. Those of folders beside it are used too, and copied."""

    def __init__(self, out: Path):
        self.out, self.folder = out, out / "cells"

    def get(self, key: str) -> Cell | None:
        """What is known under `key`; None if nothing."""
        return self._read(self.folder / f"{key}.json") or self._neighbours(key)

    def put(self, key: str, cell: Mapping[str, Any]) -> None:
        """Keeps a cell; raises MachineError when the disk fails."""
        file = self.folder / f"{key}.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(file, json.dumps({"format": FORMAT, **cell}, indent=1) + "\n")
        except OSError as error:
            raise machine_error(error, file) from error

    def model(self, key: str, role: str) -> Path | None:
        """The folder of a finished arm's model; None where it was not kept."""
        for place in [self.out, *self._beside()]:
            folder = place / "models" / key / role
            if (folder / "config.json").is_file():
                return folder
        return None

    def _neighbours(self, key: str) -> Cell | None:
        for place in self._beside():
            cell = self._read(place / "cells" / f"{key}.json")
            if cell is not None and not cell["failed"]:
                self.put(key, cell)
                return cell
        return None

    def _beside(self) -> list[Path]:
        folders = sorted(self.out.resolve().parent.glob("*/cells"))
        return [folder.parent for folder in folders if folder.parent != self.out.resolve()]

    def _read(self, file: Path) -> Cell | None:
        try:
            cell = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if cell.get("format") != FORMAT:
            raise UserError(
                f"{file}: a cell of format {cell.get('format')!r}, wanted {FORMAT}; it is of another version of "
                "codistill: give another --out, or remove it"
            )
        return cell


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


def say(line: str) -> None:
    """A line on standard error."""
    print(line, file=sys.stderr, flush=True)
