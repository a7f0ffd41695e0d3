"""The house in order: imports point one way, and files and functions stay short."""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "codistill"
# Rooms from the ground up, as docs/architecture.md draws them: a room uses only what stands on a lower floor.
FLOORS = [
    {"errors", "seeds", "blocks"},
    {"progress", "files", "folders", "own_code", "torchrun"},
    {"distributed"},
    {"schedules", "divergences", "machine", "data", "checkpoint"},
    {"config"},
    {"checks"},
    {"loading", "findings"},
    {"history"},
    {
        "objectives",
        "attention",
        "families",
        "recipes",
        "kernels",
        "remap",
        "provenance",
        "model_card",
        "claim",
        "edges",
    },
    {"models", "watch", "teacher_cache", "texts", "taps"},
    {"relations", "member"},
    {"cohort", "scores", "costs", "initial"},
    {"build"},
    {"plan", "run_folder", "metrics", "tracking"},
    {"train", "caching"},
    {"bench", "evaluate", "generate", "rates"},
    {"export", "study"},
    {"report"},
    {"cli"},
]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
FILES = sorted(SOURCE.rglob("*.py"))
DOORS = [SOURCE / "__init__.py", SOURCE / "__main__.py"]  # the package's own: they lead to any room


def rooms_drawn() -> list[set[str]]:
    """The words that each line of the picture begins with, from the top, where they are rooms."""
    page = SOURCE.parents[1] / "docs" / "architecture.md"
    return [set(line[:24].split()) & set(FLOOR) for line in page.read_text().split("```")[1].splitlines()]


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(file: Path) -> set[str]:
    """The rooms that a file needs when it runs: names of types alone do not count."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("codistill"):
            parts = (node.module or "").split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("codistill.")}
    return names


@pytest.mark.parametrize("file", [file for file in FILES if file not in DOORS], ids=str)
def test_imports_point_one_way(file):
    room = room_of(file)
    for other in imported_rooms(file) - {room}:
        assert FLOOR[other] < FLOOR[room], f"{file.name} ({room}) must not import {other}"


def test_the_picture_in_the_docs_is_of_these_rooms():
    """Every room is drawn once, and what it uses is drawn below it or beside it."""
    lines = rooms_drawn()
    assert sorted(room for line in lines for room in line) == sorted(FLOOR)
    height = {room: -number for number, line in enumerate(lines) for room in line}
    for file in FILES:
        if file not in DOORS:
            for other in imported_rooms(file) - {room := room_of(file)}:
                assert height[other] <= height[room], f"the picture has {other} above {room}, which uses it"


def test_no_import_is_relative():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: write imports from codistill"


def test_text_is_utf_8_whatever_the_locale():
    opened = {"read_text", "write_text", "open"}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in opened:
                call = ast.unparse(node)
                binary = re.search(r"open\((.*, )?'[rwax]?b\+?'|os\.open|Corpus\.open|TeacherCache\.open|_taps", call)
                assert binary or "encoding='utf-8'" in call, f"{file}: {call}"


def test_files_and_functions_are_short():
    for file in FILES:
        text = file.read_text()
        assert text.count("\n") <= 350, f"{file} has more than 350 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{file}: {node.name} has more than 60 lines"
