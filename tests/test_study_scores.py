"""What a study's models are scored on beside their held-out loss: BLiMP and GLUE, where the folder has them."""

from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from scipy import stats

from codistill.blocks import to_markdown
from codistill.evaluate.results import json_with_nan
from codistill.evaluate.run import evaluate
from codistill.study.analysis import analysis
from codistill.study.arms import keys_of
from codistill.study.cells import Cells
from codistill.study.harvest import _glue
from codistill.study.page import study_blocks
from codistill.study.run import Request, missing_cells, run_study
from codistill.study.scoring import GLUE, found_in, is_scored, with_scores
from studies import SCALE, SIZE, STUDY, arms, data_folder, made_up

TASKS = ("blimp", "glue/rte", "glue/sst2")
PAIRS = [("the boat sails", "the boat sail"), ("they sail", "they sails"), ("a boat", "an boat"), ("we go", "we goes")]


def scored_data(folder: Path, text: Path) -> Path:
    """The toy text with four pairs of BLiMP and SST-2 of twelve sentences, and no RTE."""
    data_folder(folder, text)
    good, bad = zip(*PAIRS, strict=True)
    pairs = {"UID": ["one"] * 4, "field": ["syntax"] * 4, "sentence_good": good, "sentence_bad": bad}
    sentences = [f"a {word} film" for word in ("good", "bad", "fine", "dull", "great", "poor") for _ in range(2)]
    labels = [1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0]
    tables = {"blimp/one": pairs}
    for split, rows in (("train", slice(0, 12)), ("dev", slice(2, 9))):
        tables[f"glue/sst2/{split}"] = {"sentence": sentences[rows], "label": labels[rows]}
    for name, columns in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="module")
def data(text, tmp_path_factory) -> Path:
    return scored_data(tmp_path_factory.mktemp("data"), text)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("study") / "toy"
    run_study(scored(out), data=data, jobs=1)
    return out


def scored(out: Path) -> Request:
    return Request(STUDY, replace(SCALE, tasks=TASKS), 1, out)


def test_the_scores_of_a_cell_are_those_of_codistill_evaluate(finished, data, tmp_path):
    cells, keys = Cells(finished), keys_of(arms(SCALE, 0))
    teacher, pair = (cells.get(keys["one pass", name, seed]) for name, seed in (("teacher", 0), ("pair", 0)))
    folder = cells.model(teacher["key"], "teacher")
    found = evaluate([str(folder)], ["blimp", "glue/sst2"], tmp_path / "scores", data=data, device="cpu")["cells"]
    score = {cell["task"]: cell["score"] for cell in found}
    assert teacher["members"]["teacher"]["blimp"] == {"score": score["blimp"], "pairs": 4}
    assert teacher["members"]["teacher"]["glue"]["sst2"]["score"] == score["glue/sst2"]
    assert set(pair["members"]["small"]["glue"]) == {"sst2"}
    assert 0 <= pair["agreement"] <= 1
    steps, tokens = teacher["steps"], teacher["tokens"]
    assert tokens == steps * SIZE.batch.sequences * SIZE.data.length
    curve = teacher["members"]["teacher"]["curve"]
    looks = sorted({*range(SIZE.evaluate.every, steps, SIZE.evaluate.every), steps})
    assert [at for at, _ in curve] == [look * tokens // steps for look in looks]
    assert curve[-1][1] == teacher["members"]["teacher"]["loss"]


def test_a_cell_that_lacks_a_score_is_missing_once_there_are_examples(finished, data):
    there = found_in(data, TASKS, None).tasks
    assert there == ("blimp", "glue/sst2")
    every = scored(finished).arms
    assert missing_cells(every, Cells(finished), there) == []
    assert missing_cells(every, Cells(finished)) == []
    assert len(missing_cells(every, Cells(finished), TASKS)) == 4


def test_part_of_a_task_is_named_on_the_page(finished):
    page = (finished / "table.md").read_text()
    assert "Not whole, so not comparable with published scores: glue/sst2 (train 12 of 67349, dev 7 of 872)." in page


def graded(arm: str, seed: int, points: float, **changes) -> dict:
    """A made-up cell with eight tasks at 50, 51, … and `points` more."""
    cell = made_up(arm, seed, 5.0)
    glue = {task.removeprefix("glue/"): {"score": (50 + i + points) / 100} for i, task in enumerate(GLUE)}
    cell["members"]["large"]["glue"] = glue | changes
    return cell


def test_glue_is_the_mean_of_eight_tasks_with_paired_intervals():
    one, other = [0.0, 1.0, 0.5], [2.0, 2.5, 2.25]
    cells = [graded("alone", s, p) for s, p in enumerate(one)] + [graded("taught", s, p) for s, p in enumerate(other)]
    found = analysis(STUDY, "toy", 6, cells)
    of = found["regimes"]["one pass"]
    assert of["rows"]["alone/large"]["glue"]["mean"] == pytest.approx(53.5 + 0.5)
    assert of["rows"]["alone/large"]["tasks"]["glue/sst2"]["mean"] == pytest.approx(51.5)
    expected = stats.ttest_rel(other, one).confidence_interval(0.95)
    assert of["contrasts"][0]["glue"]["interval"] == pytest.approx([expected.low, expected.high])
    page = to_markdown(study_blocks(found))
    assert "| Δ GLUE, points | 95 % interval | shown |" in page
    assert "| alone/large | 50.5 ± 0.5 | 51.5 ± 0.5 |" in page


def test_a_mean_without_one_of_its_tasks_is_empty_and_says_why():
    cells = [graded("alone", 0, 0.0), graded("taught", 0, 0.0, rte={"failed": "no rte"})]
    found = analysis(STUDY, "toy", 2, cells)
    assert found["regimes"]["one pass"]["rows"]["taught/large"]["glue"]["mean"] is None
    assert found["regimes"]["one pass"]["contrasts"][0]["glue"]["verdict"] == "not known"
    assert found["failed"][0]["failed"] == "glue/rte of large: no rte"


def test_a_score_that_is_no_number_is_empty_and_says_why(tmp_path):
    """As `codistill evaluate` writes the correlation of predictions that are all alike."""
    (tmp_path / "run" / "scores").mkdir(parents=True)
    cell = {"model": "run/one", "task": "glue/stsb", "score": float("nan"), "failed": "", "counted": {"partial": {}}}
    (tmp_path / "run" / "scores" / "results.json").write_text(json_with_nan({"cells": [cell]}))
    found = _glue(tmp_path / "run", "one")
    assert found == {"stsb": {"failed": "its score is nan: the predictions are all alike"}}
    cells = [graded("alone", 0, 0.0), graded("taught", 0, 0.0, **found)]
    assert analysis(STUDY, "toy", 2, cells)["regimes"]["one pass"]["rows"]["taught/large"]["glue"]["mean"] is None


def test_the_scores_of_a_member_are_not_those_of_one_whose_name_goes_on(tmp_path):
    (tmp_path / "run" / "scores").mkdir(parents=True)
    told = {"task": "glue/rte", "failed": "", "counted": {"partial": {}}}
    cells = [{"model": f"run/{name}", "score": score, **told} for name, score in (("one", 0.75), ("one-b", 0.5))]
    (tmp_path / "run" / "scores" / "results.json").write_text(json_with_nan({"cells": cells}))
    assert _glue(tmp_path / "run", "one") == {"rte": {"score": 0.75, "partial": {}}}


def test_a_score_that_failed_is_an_answer_and_scores_are_not_lost():
    """What was asked and failed is not asked again; what is asked later stands beside what is known."""
    failed = graded("alone", 0, 0.0, rte={"failed": "no rte"})
    assert is_scored(failed["members"]["large"], ("glue/rte", "glue/sst2"))
    assert not is_scored(failed["members"]["large"], ("blimp",))
    old = made_up("alone", 0, 5.0, blimp=0.6) | {"agreement": 0.9}
    found = with_scores(failed, old)
    assert found["members"]["large"]["blimp"] == {"score": 0.6, "pairs": 100}
    assert found["members"]["large"]["glue"] == failed["members"]["large"]["glue"]
    assert found["agreement"] == 0.9
    other = old | {"text": {"train": "c", "validation": "b"}}
    assert with_scores(failed, other) == failed


def test_without_glue_there_are_no_empty_columns():
    page = to_markdown(study_blocks(analysis(STUDY, "toy", 2, [made_up("alone", 0, 5.0), made_up("taught", 0, 4.0)])))
    assert "GLUE" not in page
