"""The repository's studies: their tables are what their cells say, and their pages say no more than is shown."""

import json
import re
import shutil
from pathlib import Path

import pytest

from codistill.study.grids import STUDIES
from codistill.study.rerun import compare, counts, write_comparison
from codistill.study.run import Request, known_cells, tabulate
from codistill.study.scales import SCALES

STUDIES_HERE = Path(__file__).parents[1] / "studies"
FOLDERS = sorted(folder for folder in STUDIES_HERE.glob("*") if (folder / "cells").is_dir())
ELSEWHERE = sorted(folder.parent for folder in (STUDIES_HERE / "elsewhere").glob("*/cells"))


def request_of(folder: Path) -> Request:
    results = json.loads((folder / "results.json").read_text())
    study, scale = STUDIES[results["study"]], SCALES[results["scale"]]
    seeds = results["arms"] // len(study.arms(scale, 0))
    return Request(study, scale, seeds, folder)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_committed_table_is_made_from_the_committed_cells(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / folder.name)
    made = {name: (copy / name).read_text() for name in ("results.json", "table.md", "README.md")}
    for name in ("results.json", "table.md"):
        (copy / name).unlink()
    tabulate(Request(*[getattr(request_of(folder), name) for name in ("study", "scale", "seeds")], copy))
    assert {name: (copy / name).read_text() for name in made} == made
    assert made["table.md"] in made["README.md"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_committed_cell_belongs_to_the_study(folder):
    held = {file.stem for file in (folder / "cells").glob("*.json")}
    assert {cell["key"] for cell in known_cells(request_of(folder))} == held


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_command_of_the_page_makes_this_table_and_none_of_fewer_seeds(folder):
    request = request_of(folder)
    assert request.seeds == request.study.seeds


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_page_has_a_question_an_answer_a_machine_and_its_figure(folder):
    page = (folder / "README.md").read_text()
    for part in ("## Question", "## Answer", "## Machine", "![", "codistill study"):
        assert part in page
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page):
        assert (folder / picture).is_file()


def test_no_committed_cell_names_a_place_on_somebodys_disk():
    for folder in [*FOLDERS, *ELSEWHERE]:
        for file in (folder / "cells").glob("*.json"):
            assert not re.search(r"/(work|home|root|tmp|Users)/", file.read_text())


def test_what_is_said_of_all_differences_together_is_so():
    """The count in docs/studies.md, from the committed results."""
    found = [json.loads((folder / "results.json").read_text())["regimes"].values() for folder in FOLDERS]
    contrasts = [c for regimes in found for of in regimes for c in of["contrasts"] if c["p"] is not None]
    shown = sum(c["loss"]["verdict"] in ("lower", "higher") for c in contrasts)
    words = " ".join((FOLDERS[0].parents[1] / "docs" / "studies.md").read_text().split())
    assert f"of the studies' {len(contrasts)} contrasts," in words
    assert f"{shown} exclude 0, and {sum(c['holm'] for c in contrasts)} after Holm's correction" in words


@pytest.mark.parametrize("folder", ELSEWHERE, ids=lambda folder: folder.name)
def test_a_rerun_is_compared_as_its_cells_say(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)
    of = request_of(folder)
    again = Request(of.study, of.scale, of.seeds, copy)
    tabulate(again)
    for name in ("results.json", "table.md"):
        assert (copy / name).read_text() == (folder / name).read_text()
    assert write_comparison(again, STUDIES_HERE / folder.name) == (folder / "rerun.md").read_text()
    assert {cell["key"] for cell in known_cells(of)} == {file.stem for file in (folder / "cells").glob("*.json")}


def test_the_page_about_reruns_counts_right():
    """Its table: study, differences shown, same sign, other sign, not made again; and their sums."""
    found = {folder.name: counts(compare(request_of(folder), STUDIES_HERE / folder.name)) for folder in ELSEWHERE}
    keys = ("shown", "same", "other", "not made")
    found["all"] = {key: sum(of[key] for of in found.values()) for key in keys}
    page = (STUDIES_HERE / "elsewhere" / "README.md").read_text().replace("`", "")
    for name, of in found.items():
        assert f"| {name} | {' | '.join(str(of[key]) for key in keys)} |" in page
