"""A study beside the same one from elsewhere: signs and distances counted by hand, of made-up cells."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from codistill.blocks import to_markdown
from codistill.cli import main
from codistill.errors import UserError
from codistill.study.arms import keys_of
from codistill.study.cells import Cells
from codistill.study.design import Contrast, Study
from codistill.study.rerun import check_against, compare, counts, rerun_blocks, write_comparison
from codistill.study.run import Request, tabulate
from studies import STUDY, made_up, request

CONTRASTS = [
    Contrast(f"{one} − {other}", f"{one}/large", f"{other}/large")
    for one, other in (("taught", "alone"), ("pair", "alone"), ("taught", "pair"), ("teacher", "alone"))
]
COMPARED = replace(STUDY, contrasts=CONTRASTS)
# By arm, the losses of the seeds. There `taught` is lower than alone and than `pair` (shown), the rest is not shown.
THERE = {"alone": (5.0, 5.1), "taught": (4.0, 4.11), "pair": (5.1, 4.9), "teacher": (5.2, 5.31)}


def finished(out: Path, losses: dict[str, tuple[float, ...]], study: Study = COMPARED, **changes) -> Request:
    seeds = max(map(len, losses.values()))
    made = request(out, study, seeds)
    keys, cells = keys_of(made.arms), Cells(out)
    for arm in made.arms:
        if arm.seed % 1000 < len(losses.get(arm.name, ())):
            loss = losses[arm.name][arm.seed % 1000]
            cells.put(keys[arm.place], made_up(arm.name, arm.seed, loss) | changes)
    tabulate(made)
    return made


@pytest.fixture
def there(tmp_path) -> Request:
    return finished(tmp_path / "there" / "toy", THERE)


def here(tmp_path: Path, losses: dict[str, tuple[float, ...]], **changes) -> Request:
    return finished(tmp_path / "here" / "toy", losses, **changes)


def test_only_what_was_shown_is_compared_and_signs_are_those_of_the_means(there, tmp_path):
    again = here(tmp_path, {"alone": (5.0,), "taught": (4.5,), "teacher": (5.1,), "pair": (4.4,)})
    found = compare(again, there.out)
    lines = {line["label"]: line["same_sign"] for line in found["regimes"]["one pass"]}
    # teacher − alone is 0.2 and 0.21 there: shown; taught − pair is −1.1 and −0.79: an interval of ±2, not shown
    assert lines == {"taught − alone": True, "teacher − alone": True}
    assert counts(found) == {"shown": 2, "same": 2, "other": 0, "not made": 0}


def test_an_interaction_is_not_taken_for_the_difference_that_it_begins_with(tmp_path):
    """(taught − alone) − (pair − alone) is −0.99 there and +0.5 here, taught − alone −1 in both."""
    plain = CONTRASTS[0]
    study = replace(COMPARED, contrasts=[plain, replace(plain, label="more", than=CONTRASTS[1])])
    there = finished(tmp_path / "there" / "toy", {**THERE, "pair": (5.0, 5.1)}, study=study)
    again = finished(tmp_path / "here" / "toy", {"alone": (5.0,), "taught": (4.0,), "pair": (3.5,)}, study=study)
    lines = {line["label"]: line["same_sign"] for line in compare(again, there.out)["regimes"]["one pass"]}
    assert lines == {"taught − alone": True, "more": False}


def test_a_sign_that_turned_is_counted_and_stands_out(there, tmp_path):
    found = compare(here(tmp_path, {"alone": (5.0, 5.0), "taught": (5.1, 4.95)}), there.out)
    assert counts(found) == {"shown": 2, "same": 0, "other": 1, "not made": 1}
    page = to_markdown(rerun_blocks(found))
    assert "**Of 2 differences shown there, 0 have the same sign here, 1 the other; 1 was not made again.**" in page
    row = next(line for line in page.splitlines() if line.startswith("| taught − alone"))
    assert "| -0.995 | [-1.059, -0.931] | 2 | +0.025 | [-0.928, +0.978] | 2 | no |" in row
    assert "| teacher − alone | +0.205 | [+0.141, +0.269] | 2 |  |  |  | not made again |" in page


def test_models_are_paired_with_their_doubles_by_seed(there, tmp_path):
    found = compare(here(tmp_path, {"alone": (5.01,), "taught": (3.97,)}), there.out)
    assert found["apart"] == pytest.approx([0.01, -0.03])
    page = to_markdown(rerun_blocks(found))
    assert "2 models of one name and seed end 0.020 nats apart in the mean, 0.030 at most; here − there -0.010." in page


def test_other_text_is_said_and_the_file_is_written(there, tmp_path):
    again = here(tmp_path, {"alone": (5.0,)}, text={"train": "c", "validation": "b"})
    assert "**The text is not the same.**" in write_comparison(again, there.out)
    assert (again.out / "rerun.md").read_text() == write_comparison(again, there.out)


def test_a_folder_beside_is_refused_whose_cells_would_be_taken(there, tmp_path):
    with pytest.raises(UserError, match=r"it lies beside --out .*, which takes the cells of studies beside it"):
        check_against(request(there.out.parent / "again", COMPARED), there.out)
    check_against(request(tmp_path / "here" / "toy", COMPARED), there.out)


def test_a_folder_without_this_study_is_one_line(there, tmp_path, capsys):
    with pytest.raises(UserError, match=r"--against .*: it holds the study 'toy' at 'toy', and 'other' at 'toy' was"):
        check_against(request(tmp_path / "out", replace(COMPARED, name="other")), there.out)
    with pytest.raises(SystemExit) as stopped:
        main(["study", "causal", "--out", str(tmp_path / "out"), "--against", str(tmp_path)])
    assert stopped.value.code == 2
    assert "there is no results.json; give the folder of a finished study causal" in capsys.readouterr().err


def test_the_command_prints_and_writes_the_comparison(tmp_path, capsys):
    """A committed study against a copy of itself: all signs are kept, and no model moved."""
    folder = Path(__file__).parents[1] / "studies" / "dwt-temperature"
    out = tmp_path / "again"
    shutil.copytree(folder / "cells", out / "cells")
    main(["study", "dwt-temperature", "--out", str(out), "--against", str(folder)])
    answer = "Of 13 differences shown there, 13 have the same sign here."
    assert answer in capsys.readouterr().out
    page = (out / "rerun.md").read_text()
    assert answer in page
    assert "0.000 nats apart in the mean, 0.000 at most; here − there +0.000." in page
