"""Studies: arms are what they would be alone, cells are kept by content, and what fails is empty and says why."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from codistill.blocks import Text, to_markdown
from codistill.cli import main
from codistill.config import Data, EarlyStop, Evaluation, ModelConfig, Run
from codistill.errors import MachineError, UserError
from codistill.files import locked
from codistill.loading import load, to_dict
from codistill.plan import Plan
from codistill.study import worker
from codistill.study.analysis import analysis, contrast
from codistill.study.arms import grouped, keys_of, member_names, merged, of_arm
from codistill.study.cells import Cells
from codistill.study.design import Contrast, Setting, edge, frozen, settings
from codistill.study.execute import Means, Stopped, execute
from codistill.study.figure import costs_figure, figure_of, spread
from codistill.study.grids import STUDIES
from codistill.study.page import study_blocks
from codistill.study.plan import plan_lines
from codistill.study.run import check_out, run_study, tabulate
from codistill.study.scales import SCALES
from codistill.study.scoring import Scoring
from codistill.study.statuses import NO_MEMORY
from codistill.train import train
from studies import SCALE, SIZE, STUDY, arms, data_folder, made_up, request

TEXT = Data(train=["text"], validation=["text"])


@pytest.fixture(scope="module")
def data(text, tmp_path_factory) -> Path:
    return data_folder(tmp_path_factory.mktemp("data"), text)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """The toy study of one seed, trained for good in processes of its own."""
    out = tmp_path_factory.mktemp("study") / "toy"
    run_study(request(out), data=data, jobs=1)
    return out


def cell_of(out: Path, name: str) -> dict:
    (arm,) = [arm for arm in arms(SCALE, 0) if arm.name == name]
    found = Cells(out).get(keys_of(arms(SCALE, 0))[arm.place])
    assert found is not None
    return found


def on_text(run: Run, data: Path) -> Run:
    """`run` on the text of the data folder, as a study's cohorts are."""
    text = {split: [str(data / f"text/prose/{split}.parquet")] for split in ("train", "validation")}
    return replace(run, data=replace(run.data, **text))


def ended(run: Run, folder: Path) -> dict[str, tuple[int, float]]:
    """Member → (steps, held-out loss) of `run`, trained in `folder`."""
    results = json.loads((train(run, folder, device="cpu") / "results.json").read_text())
    return {member: (results["steps"], of["loss"]) for member, of in results["members"].items()}


# ---- what an arm comes to ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "role"), [("alone", "large"), ("taught", "large"), ("pair", "small")])
def test_an_arm_in_company_is_the_arm_alone(name, role, finished, data, tmp_path):
    """The oracle trains the arm's own run, without the study: to the last bit the same losses."""
    (arm,) = [arm for arm in arms(SCALE, 0) if arm.name == name]
    teacher = str(finished / "models" / cell_of(finished, "teacher")["key"] / "teacher")
    members = {n: replace(m, path=teacher) if m.path else m for n, m in arm.run.members.items()}
    run = on_text(replace(arm.run, members=members), data)
    results = json.loads((train(run, tmp_path / "run", device="cpu") / "results.json").read_text())
    found = cell_of(finished, name)["members"][role]
    assert found["loss"] == results["members"][role]["loss"]
    assert found["flops"] == results["members"][role]["flops"]
    assert found["curve"][-1] == [8 * 8 * 32, results["members"][role]["loss"]]
    assert cell_of(finished, name)["text_names"] == ["prose"]


def test_what_is_known_is_not_trained_again_and_the_rest_comes_out_the_same(finished, data):
    before = {file.name: file.read_text() for file in (finished / "cells").iterdir()}
    table = json.loads((finished / "results.json").read_text())
    taught = cell_of(finished, "taught")
    (finished / "cells" / f"{taught['key']}.json").unlink()
    times = {file.name: file.stat().st_mtime_ns for file in (finished / "cells").iterdir()}
    run_study(request(finished), data=data, jobs=1)
    again = cell_of(finished, "taught")
    for cell in (taught, again):
        cell["members"]["large"].pop("seconds")
    assert again == taught
    assert {name: (finished / "cells" / name).stat().st_mtime_ns for name in times} == times
    assert before.keys() == {file.name for file in (finished / "cells").iterdir()}
    assert (
        json.loads((finished / "results.json").read_text())["regimes"]["one pass"]["contrasts"]
        == (table["regimes"]["one pass"]["contrasts"])
    )
    assert list((finished / "work").iterdir()) == []


def test_the_table_is_a_function_of_the_cells(finished):
    made = {name: (finished / name).read_bytes() for name in ("results.json", "table.md", "figure.png")}
    for name in made:
        (finished / name).unlink()
    tabulate(request(finished))
    assert {name: (finished / name).read_bytes() for name in made} == made
    assert "taught − alone" in made["table.md"].decode()
    assert "On the plateau: alone/large, seed 0" in made["table.md"].decode()


def test_a_plan_counts_every_model_once_and_a_frozen_teachers_passes(tmp_path, monkeypatch):
    """A layer costs 300 here. Trained are large (for `alone` and `pair`), small, the teacher and the taught one; the
    teacher takes a third of what it took to train."""

    def plan_of(run, device):
        layers = run.members["one"].model.layers
        return Plan(0, {}, {"one": {"own": 300 * layers, "teachers": 0}}, {}, 60.0 * layers)

    monkeypatch.setattr("codistill.study.plan.plan", plan_of)
    lines = plan_lines(request(tmp_path / "new"), None, jobs=1, devices=["cpu"])
    flops, seconds = 600 + 300 + 300 + (600 + 100), 120 + 60 + 60 + (120 + 20) + 3 * 15
    assert lines[-1].startswith(f"left: 4 models in 3 cohorts, {flops:.2g} FLOPs; with 1 at once about ")
    assert f"about {round(seconds / 60)} min, BLiMP not counted" in lines[-1]


def test_a_plan_says_what_studies_beside_hold(tmp_path, monkeypatch):
    """Two of the toy study's arms lie beside, and one that failed, which is tried again."""
    monkeypatch.setattr("codistill.study.plan.plan", lambda *_: Plan(0, {}, {"one": {"own": 1}}, {}, 1.0))
    new = request(tmp_path / "new")
    assert not any("beside" in line for line in plan_lines(new, None, jobs=1, devices=["cpu"]))
    keys, cells = keys_of(new.arms), Cells(tmp_path / "other")
    for arm, failed in zip(new.arms, ("", "", "a loss that is not finite"), strict=False):
        cells.put(keys[arm.place], made_up(arm.name, 0, 5.0, failed=failed))
    (line,) = [line for line in plan_lines(new, None, jobs=1, devices=["cpu"]) if "beside" in line]
    assert line.startswith("studies beside --out hold 2 of the others")


def test_another_studys_cell_of_the_same_content_is_used(finished, data):
    beside = request(finished.parent / "beside", replace(STUDY, name="another"))
    found = run_study(beside, data=data)
    assert found["missing"] == 0
    assert {file.name for file in (beside.out / "cells").iterdir()} == {
        file.name for file in (finished / "cells").iterdir()
    }


# ---- keys and cohorts ----------------------------------------------------------------------------


def test_a_key_is_the_content_and_not_the_name():
    (at,) = settings(SIZE, 0, passes=(1,))
    large, small = (at.learner(SIZE.models[role]) for role in ("large", "small"))

    def key(*, weight=1.0, teacher=small, named="teacher", **changes) -> str:
        first = at.arm(named, {"teacher": teacher}, seed=1000)
        second = at.arm(
            "taught", {"teacher": frozen(named), "large": large}, edge("teacher", "large", weight), **changes
        )
        return keys_of([first, second])[second.place]

    assert key() == key(named="otherwise") == key(checkpoint=SIZE.checkpoint, log=replace(SIZE.log, every=1))
    assert len({key(), key(weight=2.0), key(teacher=large), key(steps=9), key(seed=1)}) == 5


def test_members_that_are_alike_are_trained_once():
    found = arms(SCALE, 0)
    by_name = {arm.name: arm for arm in found}
    names = member_names([by_name["alone"], by_name["pair"]])
    assert names["pair", "large"] == names["alone", "large"] == "alone--large"
    run = merged([by_name["alone"], by_name["pair"]], TEXT, {})
    assert list(run.members) == ["alone--large", "pair--small"]
    assert [(e.teacher, e.student) for e in run.distillation] == [("alone--large", "pair--small")]
    assert load(to_dict(run)) == run


def test_a_member_is_seeded_by_its_role_or_as_it_says():
    (pair,) = (arm for arm in arms(SCALE, 0) if arm.name == "pair")
    members = {**pair.run.members, "small": replace(pair.run.members["small"], seeded_as="weak")}
    run = merged([replace(pair, run=replace(pair.run, members=members))], TEXT, {})
    assert {name: m.seeded_as for name, m in run.members.items()} == {"pair--large": "large", "pair--small": "weak"}


def test_what_is_needed_comes_before_and_cohorts_are_small():
    for study in STUDIES.values():
        every = study.arms(SCALES["tiny"], 0) + study.arms(SCALES["tiny"], 1)
        assert len({arm.place for arm in every}) == len(every)
        groups = grouped(every, 6)
        assert sorted(arm.place for group in groups for arm in group) == sorted(arm.place for arm in every)
        for group in groups:
            assert len({(arm.seed, arm.run.seed, arm.run.steps, arm.run.data.tokens) for arm in group}) == 1
            assert len(group) == 1 or len(member_names(group)) <= 20


def test_regimes_that_differ_in_their_models_only_stay_apart():
    """Arms of one name, steps, text and seed: in one cohort one of the two models would stand for both."""
    found = []
    for width in (32, 64):
        size = replace(SIZE, models={"large": ModelConfig(layers=2, width=width, heads=1)})
        at = Setting(size, f"{width} wide", 0, None)
        found += [at.arm(name, {"large": at.learner(size.models["large"])}) for name in ("alone", "again")]
    groups = grouped(found, 6)
    assert [[(arm.regime, arm.name) for arm in group] for group in groups] == [
        [("32 wide", "alone"), ("32 wide", "again")],
        [("64 wide", "alone"), ("64 wide", "again")],
    ]


@pytest.mark.parametrize("setting", [{"stop_early": EarlyStop(patience=1)}, {"non_finite": "skip"}])
def test_arms_whose_runs_end_early_or_skip_steps_have_no_company(setting):
    """Both act on a whole run, by the losses of all its members."""
    found = [replace(arm, run=replace(arm.run, **setting)) for arm in arms(SCALE, 0) + arms(SCALE, 1)]
    assert [(group[0].name, group[0].seed) for group in grouped(found, 20) if len(group) == 1] == [
        (name, seed) for name in ("alone", "teacher", "taught", "pair") for seed in (0, 1)
    ]


def test_when_an_arm_stops_early_is_its_own_affair(data, tmp_path):
    """`wild`, whose rate is absurd, stops at once; `alone` goes on as in a run of its own, which is the oracle."""
    (at,) = settings(replace(SIZE, steps=24), 0, passes=(1,))
    changes = {"stop_early": EarlyStop(patience=2), "evaluate": Evaluation(every=2, sequences=16)}
    large = at.learner(at.size.models["large"])
    every = [at.arm(name, {"large": replace(large, lr=lr)}, **changes) for name, lr in (("alone", 1e-3), ("wild", 3.0))]

    found = {}
    for number, group in enumerate(grouped(every, 20)):
        found |= ended(on_text(merged(group, TEXT, {}), data), tmp_path / f"cohort-{number}")
    by_itself = ended(on_text(every[0].run, data), tmp_path / "by-itself")
    assert found["alone--large"] == by_itself["large"]
    assert found["wild--large"][0] < found["alone--large"][0]


def test_a_projection_between_widths_is_the_same_in_company(data, tmp_path):
    """The teacher of hidden states is another arm's member too, or is frozen and has another role in another arm. The
    oracle trains each arm's own run, without the study."""
    (at,) = settings(SIZE, 0, passes=(1,))
    wide, small = (at.learner(ModelConfig(layers=1, width=width, heads=1)) for width in (48, 32))
    of_states = replace(edge("teacher", "small", 10.0), kind="hidden")
    ended(on_text(at.arm("weak", {"large": wide}, seed=1000).run, data), tmp_path / "weak")
    weak, place = frozen("weak", "large"), str(tmp_path / "weak" / "members" / "large")
    cohorts = [
        [at.arm("alone", {"teacher": wide}), at.arm("pair", {"teacher": wide, "small": small}, of_states)],
        [
            at.arm("taught", {"teacher": weak, "small": small}, of_states),
            at.arm("guided", {"guide": weak, "small": small}, replace(of_states, teacher="guide")),
        ],
    ]
    for number, group in enumerate(cohorts):
        names = member_names(group)
        together = ended(on_text(merged(group, TEXT, {("weak", "large"): place}), data), tmp_path / str(number))
        for arm in group:
            members = {role: replace(m, path=place) if m.path else m for role, m in arm.run.members.items()}
            by_itself = ended(on_text(replace(arm.run, members=members), data), tmp_path / arm.name)
            assert {role: together[names[arm.name, role]] for role in by_itself} == by_itself


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
@pytest.mark.parametrize("name", STUDIES)
def test_every_cohort_of_every_study_is_a_valid_run(name, scale):
    study = STUDIES[name]
    every = study.arms(SCALES[scale], 0)
    known = {f"{arm.name}/{role}" for arm in every for role in arm.run.trained}
    for wanted in study.contrasts:
        assert {wanted.treated, wanted.control} <= known
    assert {*study.curves} <= known
    for group in grouped(every, SCALES[scale].most_members):
        needed = [of for arm in group for of in [*arm.taught_by.values(), *arm.begun_from.values()]]
        run = merged(group, TEXT, dict.fromkeys(needed, "folder"))
        assert load(to_dict(run)) == run


def test_a_teacher_that_is_no_arm_is_one_line():
    (at,) = settings(SIZE, 0, passes=(1,))
    large = at.learner(SIZE.models["large"])
    orphan = at.arm("taught", {"teacher": frozen("nobody"), "large": large}, edge("teacher", "large"))
    assert orphan.run.members["teacher"].path == of_arm("nobody", "teacher")
    with pytest.raises(UserError, match="its teacher 'nobody' is no arm of the study"):
        keys_of([orphan])


# ---- the numbers ---------------------------------------------------------------------------------


def test_intervals_are_those_of_a_paired_t_test():
    one, other = [5.1, 5.3, 5.0, 5.6], [5.0, 5.25, 4.8, 5.5]
    cells = [made_up("alone", s, loss) for s, loss in enumerate(one)]
    cells += [made_up("taught", s, loss) for s, loss in enumerate(other)]
    found = analysis(STUDY, "toy", 8, cells)["regimes"]["one pass"]
    loss = found["contrasts"][0]["loss"]
    expected = stats.ttest_rel(other, one).confidence_interval(0.95)
    assert loss["mean"] == pytest.approx(sum(b - a for a, b in zip(one, other, strict=True)) / 4)
    assert loss["interval"] == pytest.approx([expected.low, expected.high])
    assert loss["verdict"] == "lower"
    assert found["contrasts"][0]["blimp"]["verdict"] == "not known"
    assert found["rows"]["alone/large"]["flops"] == 8
    points = found["along"][0]["points"]
    assert [point["share"] for point in points] == [0.5, 1.0]
    assert points[1]["loss"] == loss


def test_many_differences_are_corrected_for_their_number():
    """p by scipy: 0.0009, 0.039 and 0.74. The second is below 0.05, which two ask of it, and not below the 0.025 of
    three."""
    losses = {"taught": (4.0, 4.1, 4.05), "pair": (4.87, 4.8, 4.73), "teacher": (5.0, 5.2, 4.9), "alone": (5.0,) * 3}
    cells = [made_up(arm, seed, loss) for arm, of in losses.items() for seed, loss in enumerate(of)]
    wanted = [Contrast(arm, f"{arm}/large", "alone/large") for arm in ("taught", "pair", "teacher")]

    def found(contrasts):
        made = analysis(replace(STUDY, contrasts=contrasts), "toy", 12, cells)
        of = made["regimes"]["one pass"]["contrasts"]
        return [(c["loss"]["verdict"], c["holm"]) for c in of], to_markdown(study_blocks(made))

    shown, page = found(wanted[:2])
    assert shown == [("lower", True), ("lower", True)]
    assert "Of 2 differences of the loss 2 exclude 0, each by itself; with Holm" in page
    shown, page = found(wanted)
    assert shown == [("lower", True), ("lower", False), ("not shown", False)]
    assert "1 still does (“by Holm too”)" in page
    assert page.count("| lower, by Holm too |") == 1


def test_differences_of_all_regimes_are_corrected_together():
    """The probabilities of above, each in a regime of its own."""
    taught = {"one": (4.0, 4.1, 4.05), "two": (4.87, 4.8, 4.73), "three": (5.0, 5.2, 4.9)}

    def found(regimes):
        cells = [
            made_up(arm, seed, loss) | {"regime": regime}
            for regime in regimes
            for arm, losses in (("taught", taught[regime]), ("alone", (5.0,) * 3))
            for seed, loss in enumerate(losses)
        ]
        made = analysis(STUDY, "toy", 2 * 3 * len(regimes), cells)["regimes"]
        return [made[regime]["contrasts"][0]["holm"] for regime in regimes]

    assert found(["one", "two"]) == [True, True]
    assert found(["one", "two", "three"]) == [True, False, False]


def test_an_interval_around_zero_shows_nothing_and_a_single_run_is_called_one():
    by = {
        "taught/large": {0: made_up("t", 0, 5.0)["members"]["large"], 1: made_up("t", 1, 5.3)["members"]["large"]},
        "alone/large": {0: made_up("a", 0, 5.1)["members"]["large"], 1: made_up("a", 1, 5.2)["members"]["large"]},
    }
    wanted = Contrast("", "taught/large", "alone/large")
    assert contrast(wanted, by)["loss"]["verdict"] == "not shown"
    single = contrast(wanted, {name: {0: of[0]} for name, of in by.items()})["loss"]
    assert (single["interval"], single["verdict"]) == (None, "a single run")


def test_an_interaction_is_a_difference_of_differences_seed_by_seed():
    """taught − alone is −0.5 and −0.7, pair − teacher −0.2 and −0.1: −0.3 and −0.6; halfway all are 1 higher. A seed
    that one of the four lacks counts in none, and what both sides have in common cancels."""
    losses = {"taught": (4.0, 4.1, 3.0), "alone": (4.5, 4.8, 5.0), "pair": (5.0, 5.1), "teacher": (5.2, 5.2, 5.0)}
    cells = [made_up(arm, seed, loss, blimp=loss / 10) for arm, of in losses.items() for seed, loss in enumerate(of)]
    of = {name: f"{name}/large" for name in losses}
    plain = Contrast("plain", of["pair"], of["teacher"])
    wanted = [
        Contrast("more", of["taught"], of["alone"], than=plain),
        Contrast("common", of["taught"], of["alone"], than=Contrast("", of["pair"], of["alone"])),
    ]
    found = analysis(replace(STUDY, contrasts=wanted, along=True), "toy", 12, cells)["regimes"]["one pass"]
    more, common = found["contrasts"]
    assert more["loss"]["seeds"] == 2
    assert more["loss"]["mean"] == pytest.approx(-0.45)
    # Student's t for one degree of freedom, 12.706, by 0.3 / 2
    assert more["loss"]["interval"] == pytest.approx((-0.45 - 1.9059, -0.45 + 1.9059), abs=1e-3)
    assert more["blimp"]["mean"] == pytest.approx(-4.5)
    assert more["than"] == {"treated": "pair/large", "control": "teacher/large"}
    assert common["loss"]["mean"] == pytest.approx(-1.0)
    assert [point["loss"]["mean"] for point in found["along"][0]["points"]] == pytest.approx([-0.45, -0.45])


def test_seeds_are_paired_and_a_failed_cell_is_empty_with_its_reason():
    cells = [made_up("alone", 0, 5.0), made_up("alone", 1, 9.0), made_up("taught", 0, 4.0)]
    cells.append(made_up("taught", 1, 0.0, failed="a loss that is not finite"))
    found = analysis(STUDY, "toy", 4, cells)
    assert found["regimes"]["one pass"]["contrasts"][0]["loss"]["mean"] == -1.0
    assert found["regimes"]["one pass"]["rows"]["taught/large"]["seeds"] == [0]
    assert found["failed"] == [
        {"arm": "taught", "regime": "one pass", "seed": 1, "failed": "a loss that is not finite"}
    ]


def test_a_stand_alone_model_on_the_plateau_is_named_a_teacher_too():
    """1.5 nats below the unigram loss of 7 is 5.5; `taught` has a teacher, so it says nothing of the text alone."""
    cells = [made_up("alone", 0, 5.6), made_up("alone", 1, 5.4), made_up("taught", 0, 6.0), made_up("guide", 0, 6.5)]
    found = analysis(STUDY, "toy", 2, cells)["regimes"]["one pass"]["on_the_plateau"]
    assert [(f["member"], f["seed"]) for f in found] == [("alone/large", 0), ("guide/large", 0)]
    assert [f["below"] for f in found] == pytest.approx([1.4, 0.5])


def test_a_model_that_overfits_is_told_from_one_on_the_plateau():
    """Seed 0 stood at 5.3 before it came back to 5.6; seed 1 never was below its end."""
    cells = [made_up("alone", 0, 5.6), made_up("alone", 1, 5.7)]
    cells[0]["members"]["large"]["curve"] = [[1, 6.0], [2, 5.3], [3, 5.6]]
    found = analysis(STUDY, "toy", 2, cells)
    assert [f["best"] for f in found["regimes"]["one pass"]["on_the_plateau"]] == pytest.approx([1.7, 1.3])
    said = [block.text for block in study_blocks(found) if isinstance(block, Text) and block.important]
    assert said == [
        "Overfits: alone/large, seed 0, ended 1.40 nats below the unigram, and was 1.70 below at its best.",
        "On the plateau: alone/large, seed 1, ended only 1.30 nats below the unigram.",
    ]


def test_a_model_that_ends_above_the_unigram_is_not_said_to_be_below_it():
    """The unigram loss is 7: one that ends at 7.42 and 7.5, one at 7.1 and 6.7, one that had been at 6.95."""
    ends = {"alone": (7.42, 7.5), "guide": (7.1, 6.7), "once": (7.2,)}
    cells = [made_up(arm, seed, loss) for arm, of in ends.items() for seed, loss in enumerate(of)]
    teaching = replace(STUDY, arms=lambda scale, seed: [])
    for cell in cells:
        loss = cell["members"]["large"]["loss"]
        cell["members"]["large"]["curve"] = [[50, 6.95 if cell["arm"] == "once" else loss], [100, loss]]
    said = [getattr(block, "text", "") for block in study_blocks(analysis(teaching, "toy", 5, cells))]
    assert "On the plateau: alone/large, seeds 0, 1, ended 0.42 to 0.50 nats above the unigram." in said
    assert "On the plateau: guide/large, seeds 0, 1, ended only 0.10 nats above to 0.30 nats below the unigram." in said
    assert "Overfits: once/large, seed 0, ended 0.20 nats above the unigram, and was 0.05 below at its best." in said


def test_models_that_overfit_are_compared_at_their_best_too():
    """Alone: 5.3 and 5.1 at best, 5.6 and 5.5 at the end; taught: 5.0 and 5.2, where it ends."""
    cells = [
        made_up(arm, seed, end)
        for arm, ends in (("alone", (5.6, 5.5)), ("taught", (5.0, 5.2)))
        for seed, end in enumerate(ends)
    ]
    fit = analysis(STUDY, "toy", 4, cells)["regimes"]["one pass"]["at_best"]
    for cell, best in zip(cells, (5.3, 5.1), strict=False):
        cell["members"]["large"]["curve"] = [[50, best], [100, cell["members"]["large"]["loss"]]]
    found = analysis(STUDY, "toy", 4, cells)
    (line,) = found["regimes"]["one pass"]["at_best"]
    assert fit == []
    assert line["label"] == STUDY.contrasts[0].label
    assert line["loss"]["mean"] == pytest.approx((-0.3 + 0.1) / 2)
    half = 12.706 * np.std([-0.3, 0.1], ddof=1) / np.sqrt(2)  # Student's t of one degree of freedom
    assert line["loss"]["interval"] == pytest.approx((-0.1 - half, -0.1 + half), abs=1e-3)
    assert any("overfit" in getattr(block, "text", "") for block in study_blocks(found))


def test_a_figures_rows_are_the_same_in_all_regimes_whatever_is_missing():
    """The first contrast is missing in the second regime: what is there stays in the second row."""
    contrasts = [Contrast(label, f"{label}/large", "alone/large") for label in ("one", "two")]
    study = replace(STUDY, contrasts=contrasts, curves=["alone/large"])
    cells = [made_up(arm, seed, 5.0 + seed) for arm in ("alone", "one", "two") for seed in (0, 1)]
    later = [made_up(arm, seed, 5.0 + seed) | {"regime": "20 passes"} for arm in ("alone", "two") for seed in (0, 1)]
    later.append(made_up("two", 2, 5.0) | {"regime": "20 passes"})
    later.append(made_up("alone", 2, 5.0) | {"regime": "20 passes"})
    figure = figure_of(study, analysis(study, "toy", 12, [*cells, *later]), [*cells, *later])
    first, second = figure.subfigs[1].axes
    assert [text.get_text() for text in first.get_yticklabels()] == ["one (2)", "two (2 or 3)"]
    marks = [line.get_ydata()[0] for line in second.get_lines() if line.get_marker() == "o"]
    assert marks == [1]


def test_a_study_over_passes_is_drawn_so_and_those_alike_share_axes():
    """Gains of 0.2 and 0.4 nats in one pass, and of the first in 5 too: a line to each, at its mean."""
    labels = ("a: DWT, weight 1 − alone", "a: DWT, weight 4 − alone", "b: CTCD, weight 1 − alone")
    loss = {"seeds": 3, "verdict": "lower"}
    one = [{"label": label, "loss": loss | {"mean": mean, "interval": (mean - 0.1, mean + 0.1)}}
           for label, mean in zip(labels, (-0.2, -0.4, -0.3), strict=True)]  # fmt: skip
    five = [{"label": labels[0], "loss": {"seeds": 2, "mean": 0.0, "interval": (-0.1, 0.1), "verdict": "not shown"}}]
    found = {
        "regimes": {"one pass": {"passes": [0.1], "contrasts": one}, "5 passes": {"passes": [5], "contrasts": five}}
    }
    figure = figure_of(replace(STUDY, over_passes=True), found, [])
    left, right = figure.subfigs[1].axes
    assert (left.get_title(), right.get_title()) == ("a: DWT", "b: CTCD")
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "weight 1 − alone (2 or 3)",
        "weight 4 − alone (3)",
    ]
    lines = {line.get_label(): list(line.get_ydata()) for line in left.get_lines()}
    assert (lines["weight 1 − alone (2 or 3)"], lines["weight 4 − alone (3)"]) == ([-0.2, 0.0], [-0.4])
    filled = [line.get_markerfacecolor() != "white" for line in left.get_lines() if line.get_marker() == "o"]
    assert filled == [True, False, True]


def test_a_contrast_whose_arm_failed_everywhere_has_an_empty_row():
    cells = [made_up("alone", 0, 5.0), made_up("taught", 0, 0.0, failed="a loss that is not finite")]
    (found,) = [
        c for c in analysis(STUDY, "toy", 2, cells)["regimes"]["one pass"]["contrasts"] if "taught" in c["treated"]
    ]
    assert (found["loss"]["seeds"], found["loss"]["mean"], found["loss"]["verdict"]) == (0, None, "not known")


# ---- running, failing, stopping: with a worker that only pretends ---------------------------------

PRETENDER = textwrap.dedent("""
    import json, os, pathlib, signal, sys, time
    request = json.loads(pathlib.Path(sys.argv[1]).read_text())
    run, out = pathlib.Path(request["run"]).read_text(), pathlib.Path(request["out"])
    with open(pathlib.Path(__file__).with_suffix(".calls"), "a") as calls:
        calls.write(" ".join(request["members"]) + "\\n")
    if "bad--" in run:
        print("a warning", file=sys.stderr); print("large: its loss was not finite", file=sys.stderr); sys.exit(3)
    if "slow--" in run:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); time.sleep(60)
    if "full--" in run:
        print("no space", file=sys.stderr); sys.exit(1)
    if "large--" in run.replace("--large", "") or ("crowd--" in run and len(request["members"]) > 1):
        print("CUDA out of memory", file=sys.stderr); sys.exit(4)
    if "killed--" in run:
        (out / "checkpoints").mkdir(parents=True); os.kill(os.getpid(), signal.SIGKILL)
    member = dict(loss=5.0, accuracy=0.1, parameters=10, flops=dict(own=6, teachers=0), seconds=1.0)
    for name in request["members"]:
        folder = out / "members" / name
        folder.mkdir(parents=True); (folder / "config.json").write_text("{}")
    facts = dict(data=dict(train=dict(identity="a"), validation=dict(identity="b")), machine={}, versions={})
    import yaml
    (out / "run.yaml").write_text(yaml.dump(yaml.safe_load(run) | {"provenance": facts}))
    (out / "results.json").write_text(json.dumps(dict(
        members={name: member for name in request["members"]}, held_out=dict(unigram_loss=7.0), steps=8, tokens=80,
        passes=1.0, precision="float32")))
""")


@pytest.fixture
def means(tmp_path) -> Means:
    (tmp_path / "worker.py").write_text(PRETENDER)
    return Means(TEXT, Scoring(), 2, ["cpu"], 3, (sys.executable, str(tmp_path / "worker.py")))


def renamed(**names: str):
    """The toy study's arms, some of them under another name."""
    found = []
    for arm in arms(SCALE, 0):
        paths = {r: replace(m, path=of_arm(names.get("teacher", "teacher"), "teacher")) if m.path else m
                 for r, m in arm.run.members.items()}  # fmt: skip
        found.append(replace(arm, name=names.get(arm.name, arm.name), run=replace(arm.run, members=paths)))
    return found


def test_an_arm_that_fails_leaves_the_others_of_its_cohort(means, tmp_path):
    every = renamed(pair="bad")
    execute(every, tmp_path / "out", means)
    cells, keys = Cells(tmp_path / "out"), keys_of(every)
    found = {arm.name: cells.get(keys[arm.place]) for arm in every}
    assert found["bad"]["failed"] == "large: its loss was not finite"
    assert [name for name, cell in found.items() if cell["failed"]] == ["bad"]
    assert found["bad"]["members"] == {}


def test_what_is_wrong_with_the_text_is_no_result(means, tmp_path):
    (tmp_path / "worker.py").write_text("import sys; print('data.train: too short', file=sys.stderr); sys.exit(2)")
    with pytest.raises(UserError, match=r"data\.train: too short"):
        execute(renamed(), tmp_path / "out", means)
    assert list((tmp_path / "out").glob("cells/*.json")) == []


def test_a_student_whose_teacher_failed_is_empty_and_says_so(means, tmp_path):
    every = renamed(teacher="bad")
    execute(every, tmp_path / "out", means)
    cells, keys = Cells(tmp_path / "out"), keys_of(every)
    failed = {arm.name: cells.get(keys[arm.place])["failed"] for arm in every}
    assert failed["taught"] == "what it needs failed: bad: large: its loss was not finite"
    assert failed["alone"] == failed["pair"] == ""


def test_what_needs_what_needs_a_failure_is_empty_in_whatever_order_it_stands(means, tmp_path):
    """taught-again learns from taught, taught from the teacher, which fails; the last comes first."""
    found = {arm.name: arm for arm in renamed(teacher="bad")}
    members = found["taught"].run.members | {"teacher": frozen("taught", "large")}
    again = replace(found["taught"], name="again", run=replace(found["taught"].run, members=members))
    out = tmp_path / "out"
    assert execute([again, found["taught"], found["bad"]], out, means) == []
    cells, keys = Cells(out), keys_of([again, found["taught"], found["bad"]])
    assert all(cells.get(key)["failed"] for key in keys.values())


def test_a_machine_that_fails_is_no_result(means, tmp_path):
    with pytest.raises(MachineError, match="no space"):
        execute(renamed(pair="full"), tmp_path / "out", means)
    assert all(not json.loads(file.read_text())["failed"] for file in (tmp_path / "out").glob("cells/*.json"))


def test_what_there_is_no_memory_for_leaves_the_rest(means, tmp_path):
    """The teacher does not fit, so neither it nor its student has a cell, and with more memory they are tried again."""
    every = renamed(teacher="large")
    found = execute(every, tmp_path / "out", means)
    assert found == [
        "large, one pass, seed 0: CUDA out of memory",
        "taught, one pass, seed 0: it needs large",
    ]
    cells, keys = Cells(tmp_path / "out"), keys_of(every)
    assert {arm.name for arm in every if cells.get(keys[arm.place]) is not None} == {"alone", "pair"}


def test_a_cohort_that_there_is_no_memory_for_is_tried_arm_by_arm(means, tmp_path):
    every = renamed(alone="crowd")  # shares a cohort with `pair`, and fits alone
    told = []
    assert execute(every, tmp_path / "out", means, lambda done, note, total: told.append((done, total, note))) == []
    cells, keys = Cells(tmp_path / "out"), keys_of(every)
    assert all(cells.get(keys[arm.place]) is not None for arm in every)
    assert all(done <= total for done, total, _ in told)
    assert told[-1][0] == told[-1][1]
    # Between the cohort that was split and its arms nothing runs, and nothing is done either.
    assert [note for *_, note in told].index("done") == len(told) - 1


def test_a_worker_without_memory_says_so_by_its_status(tmp_path, monkeypatch, capsys):
    def no_room(request):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    (tmp_path / "request.json").write_text('{"study": 0}')
    monkeypatch.setattr(worker, "work", no_room)
    monkeypatch.setattr(worker, "_stop_without", lambda study: None)
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path / "request.json")])
    with pytest.raises(SystemExit) as ended:
        worker.main()
    assert ended.value.code == NO_MEMORY
    assert capsys.readouterr().err == "DefaultCPUAllocator: can't allocate memory\n"


def test_a_process_that_is_killed_is_no_result_and_leaves_its_checkpoints(means, tmp_path):
    with pytest.raises(MachineError, match="signal 9"):
        execute(renamed(teacher="killed"), tmp_path / "out", means)
    assert len(list((tmp_path / "out" / "work").glob("*/checkpoints"))) == 1
    assert len(list((tmp_path / "out" / "work").glob("*.log"))) >= 1


def test_a_study_with_too_little_memory_makes_its_table_and_says_what_is_missing(data, tmp_path, monkeypatch):
    monkeypatch.setattr("codistill.study.run.execute", lambda *given: ["taught: CUDA out of memory", "it too"])
    with pytest.raises(
        MachineError, match=r"out of memory for taught: CUDA out of memory \(and 1 more\); the rest is done"
    ):
        run_study(request(tmp_path / "toy"), data=data)
    assert (tmp_path / "toy" / "table.md").exists()


def test_a_study_that_is_stopped_goes_on(means, tmp_path):
    """A process stops itself by the signal that a scheduler would send; then the same arms without what is slow."""
    out = tmp_path / "out"
    code = (
        "import test_study as t, sys; from pathlib import Path\n"
        "from codistill.study.execute import Means, Stopped, execute\n"
        f"means = Means(t.TEXT, t.Scoring(), 2, ['cpu'], 3, (sys.executable, {str(tmp_path / 'worker.py')!r}))\n"
        f"try: execute(t.renamed(taught='slow'), Path({str(out)!r}), means)\n"
        "except Stopped: sys.exit(75)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1] / "src")])
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    for _ in range(1200):
        if len(list(out.glob("cells/*.json"))) == 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    execute(renamed(), out, means)
    calls = (tmp_path / "worker.calls").read_text().split("\n")
    assert [line for line in calls if line and "slow" not in line and "taught" not in line] == [
        line for line in dict.fromkeys(calls) if line and "slow" not in line and "taught" not in line
    ]
    assert sum("taught--large" in line for line in calls) == 1


def test_stopped_is_what_a_worker_that_was_stopped_means(means, tmp_path):
    text = (tmp_path / "worker.py").read_text()
    (tmp_path / "worker.py").write_text("import sys; sys.exit(75)\n" + text)
    with pytest.raises(Stopped):
        execute(renamed(), tmp_path / "out", means)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ctdc"], "there is no study 'ctdc' (did you mean ctcd?); the studies are dwt-teacher-quality,"),
        (["ctcd", "--scale", "large"], "there is no scale 'large'"),
        (["ctcd", "--seeds", "0"], "--seeds 0: at least one is needed"),
        (["ctcd", "--jobs", "-1"], "--jobs -1: at least one is needed"),
        (["ctcd", "--device", "foo"], "foo"),
        (["causal", "--seeds", "1"], "some of its arms are not trained yet, which needs text; give a folder with"),
        (["causal", "--seeds", "1", "--data", "nowhere"], "nowhere: there is no such folder"),
        (["causal", "--seeds", "1", "--data", "docs"], "docs: there is no text/*/train*.parquet"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(SystemExit) as stopped:
        main(["study", *arguments, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(finished, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="it holds something else than a study"):
        run_study(request(tmp_path), data=None)
    with pytest.raises(UserError, match="it holds the study 'toy' at 'toy', and 'other' at 'toy' was asked for"):
        run_study(request(finished, replace(STUDY, name="other")), data=None)


def test_a_study_that_was_killed_before_its_first_cell_goes_on(tmp_path):
    (tmp_path / "out" / "work").mkdir(parents=True)
    (tmp_path / "out" / ".lock").touch()
    check_out(request(tmp_path / "out"))


def test_two_studies_in_one_folder_are_refused(data, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        locked(tmp_path / "out" / ".lock"),
        pytest.raises(UserError, match="another `codistill study` is at work there"),
    ):
        run_study(request(tmp_path / "out"), data=data)


def test_a_study_at_work_is_told_of_before_another_is_planned(tmp_path, monkeypatch, capsys):
    example, out = str(Path(__file__).parents[1] / "examples" / "own_study.py"), tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr("codistill.study.plan.plan_lines", lambda *_: ["what is planned"])
    with locked(out / ".lock"):
        with pytest.raises(SystemExit) as ended:
            main(["study", example, "--out", str(out)])
        said = capsys.readouterr()
        assert (ended.value.code, said.out) == (2, "")
        assert "another `codistill study` is at work there" in said.err
        main(["study", example, "--out", str(out), "--plan"])  # which changes nothing there
    assert capsys.readouterr().out == "what is planned\n"


def test_cells_of_other_text_are_refused_before_anything_is_trained(finished, text, tmp_path):
    out = tmp_path / "toy"
    shutil.copytree(finished / "cells", out / "cells")
    next((out / "cells").glob("*.json")).unlink()
    (tmp_path / "other.txt").write_text(text.read_text()[:9000])
    with pytest.raises(UserError, match=r"the cells of .* and --data are of different text|the cells of --data and"):
        run_study(request(out), data=data_folder(tmp_path / "data", tmp_path / "other.txt"))
    assert not (out / "work").exists()


def test_a_cell_of_another_version_or_text_is_refused(tmp_path):
    every, cells = arms(SCALE, 0), Cells(tmp_path / "out")
    for number, arm in enumerate(every):
        key = keys_of(every)[arm.place]
        cells.put(key, made_up(arm.name, 0, 5.0) | {"key": key, "text": {"train": str(number > 1)}})
    with pytest.raises(UserError, match="the cells of alone and taught are of different text"):
        tabulate(request(tmp_path / "out"))
    file = tmp_path / "out" / "cells" / f"{key}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 0}))
    with pytest.raises(UserError, match=r"it is no cell of format 1, but of another version of codistill"):
        tabulate(request(tmp_path / "out"))


@pytest.mark.parametrize(
    ("wanted", "heights"),
    [
        ([0.1, 0.5], [0.1, 0.5]),  # far apart: left where they are
        ([0.5, 0.5], [0.45, 0.55]),  # alike: both give way
        ([0.3, 0.35, 0.4, 0.9], [0.25, 0.35, 0.45, 0.9]),  # the middle one stays, the far one too
        ([0.5, 0.5, 0.62], [0.44, 0.54, 0.64]),  # (.5 + .4 + .42) / 3 = .44: the two push the third
        ([], []),
    ],
)
def test_names_are_moved_apart_and_no_further(wanted, heights):
    assert spread(wanted, 0.1) == pytest.approx(heights)


def test_every_point_of_the_costs_is_named_and_no_name_lies_on_another():
    """Ten arms as good and as dear as one another, as stand-alone models and their twins in a pair are."""
    from matplotlib.text import Text

    row = {"parameters": 10, "flops": 5e12, "seconds": 3.0, "loss": {"mean": 4.0, "sd": 0.1}}
    rows = {f"arm-{number}/small": row for number in range(10)} | {"other/large": {**row, "flops": 9e12}}
    figure = costs_figure({"regimes": {"one pass": {"rows": rows}}})
    named = figure.axes[1].texts
    assert {text.get_text() for text in named} == {name.rpartition("/")[0] for name in rows}
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in named]  # without the line to its point
    assert not any(a.overlaps(b) for number, a in enumerate(boxes) for b in boxes[:number])
