"""What a resumption changed: the run of before comes back whole, and all parts count in what the run took."""

import json
from dataclasses import replace

import pytest

from codistill.config import DistillationConfig
from codistill.history import changed, differing, parts, scored_from, tokens_by
from codistill.loading import load, override, parse_yaml, to_dict, to_yaml
from codistill.recipes import find
from codistill.report.run import draw_curves
from codistill.train import train
from runs import with_teachers

CHANGES = {
    "a number": ("ctcd:tiny", ["steps=7"]),
    "a number to a schedule": ("ctcd:tiny", ["distillation.0.weight={linear: [4, 1]}"]),
    "marks of a schedule": ("ctcd:tiny", ["distillation.0.weight={step: {0: 0, 300: 1}}"]),
    "a list": ("standalone:tiny", ["track=[tensorboard]", "evaluate.every=3"]),
    "a twin's own": ("quickstart", ["members.large-alone.lr=0.5"]),
    "a setting that was none": ("ctcd:tiny", ["stop_early.patience=3"]),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("turned", [False, True])
def test_the_settings_of_before_come_back(name, turned):
    recipe, sets = CHANGES[name]
    one = find(recipe)
    other = load(override(to_dict(one), sets))
    assert _of_before(*((other, one) if turned else (one, other))) == to_dict(other if turned else one)


def test_an_edge_that_was_not_there_goes_and_one_that_was_comes_back():
    one = find("ctcd:tiny")
    tree = to_dict(one)
    fewer = load(tree | {"distillation": tree["distillation"][:1]})
    none = load(tree | {"distillation": []})
    for old, new in ((one, fewer), (fewer, one), (one, none), (none, one)):
        assert _of_before(old, new) == to_dict(old)


def test_members_may_be_called_as_settings_are():
    one = load(override(to_dict(find("ctcd:tiny")), ["distillation=[]"]))
    called = {"step": one.members["large"], "distillation": one.members["small"]}
    one = replace(one, members=called, distillation=[DistillationConfig(teacher="step", student="distillation")])
    assert _of_before(one, load(override(to_dict(one), ["seed=3"]))) == to_dict(one)


def _of_before(old, new):
    was = {key: before for key, (before, _) in differing(old, new).items()}
    kept = to_yaml(replace(new, provenance={"changed": [{"from_step": 2, "was": was}]}))
    first, second = parts(load(parse_yaml(kept, "the run's own file")), 5)
    assert (first[:2], second[:2]) == ((0, 2), (2, 5))
    return to_dict(replace(first.run, track=old.track))  # where lines go is no setting of the numbers


def test_what_a_resumption_changed_is_as_it_was_before():
    facts = {"data": {"train": {"identity": "a"}, "validation": {"identity": "v"}}, "tokenizer": "t"}
    old = replace(find("ctcd:tiny"), provenance=facts)
    later = facts | {"data": {"train": {"identity": "b"}, "validation": {"identity": "v"}}}
    new = replace(load(override(to_dict(find("ctcd:tiny")), [f"seed={old.seed + 3}"])), provenance=later)
    part = {"was": {"seed": old.seed}, "inputs": {"data.train.identity": "a"}}
    assert changed(old, new, 5) == [{"from_step": 5, **part}]
    assert changed(old, new, 0) == []  # nothing is left of what was
    past = [{"from_step": 3, "was": {"steps": 9}}, {"from_step": 7, "was": {"steps": 8}}]
    old = replace(old, provenance=facts | {"changed": past})
    assert changed(old, new, 5) == [past[0], past[1] | {"from_step": 5}, {"from_step": 5, **part}]


@pytest.mark.parametrize(
    ("parts_changed", "expected"),
    [
        ([{"was": {"steps": 9}}], 0),
        ([{"was": {"seed": 1}}, {"was": {"steps": 9}}], 10),
        ([{"was": {"data.length": 64}}, {"was": {"seed": 1}}, {"was": {"batch.sequences": 4}}], 20),
        ([{"was": {}, "inputs": {"data.train.identity": "a"}}], 0),
        ([{"was": {}, "inputs": {"data.validation.identity": "a"}}, {"was": {}, "inputs": {"machine": "b"}}], 10),
    ],
)
def test_losses_are_of_the_same_tokens_after_the_last_change_of_what_is_scored(parts_changed, expected):
    parts_changed = [{"from_step": 10 * number, **part} for number, part in enumerate(parts_changed, start=1)]
    assert scored_from(replace(find("ctcd:tiny"), provenance={"changed": parts_changed})) == expected


def test_a_run_took_what_its_parts_would_have_taken_alone(text, teacher, tmp_path):
    """The oracle: whole runs with each part's settings. The teacher teaches in 3 of the first 4 steps, then always."""
    old = with_teachers("dwt", text, teacher, "steps=4", "distillation.0.weight={step: {0: 1, 3: 0}}")
    new = load(override(to_dict(old), ["steps=6", "batch.sequences=4", "data.length=16", "distillation.0.weight=1"]))
    before, whole = (_flops(train(run, tmp_path / name)) for name, run in (("before", old), ("whole", new)))
    out = train(old, tmp_path / "run")
    train(new, out, resume=True, accept_changes=True)
    for name, found in _flops(out).items():
        assert found == {key: count + whole[name][key] * 2 // 6 for key, count in before[name].items()}
    assert json.loads((out / "results.json").read_text())["tokens"] == 4 * 8 * 32 + 2 * 4 * 16


def test_a_teacher_that_came_later_is_paid_for_from_then_on(text, teacher, tmp_path):
    taught = with_teachers("dwt", text, teacher, "steps=4", f"data.tokenizer={teacher}")
    tree = to_dict(taught)
    alone = load(tree | {"members": {"large": tree["members"]["large"]}, "distillation": []})
    later = load(tree | {"steps": 6})
    out = train(alone, tmp_path / "run")
    train(later, out, resume=True, accept_changes=True)
    always = _flops(train(later, tmp_path / "always"))
    found = _flops(out)
    assert found["large"]["own"] == always["large"]["own"]
    assert found["large"]["teachers"] == found["weak"]["own"] == always["weak"]["own"] * 2 // 6


def test_a_teacher_may_be_left_out_on_the_way(text, teacher, tmp_path):
    """It is paid for by nobody any more: there is no model to count. The picture shows what is there."""
    taught = with_teachers("dwt", text, teacher, "steps=4", "evaluate.every=2", f"data.tokenizer={teacher}")
    tree = to_dict(taught)
    alone = load(tree | {"members": {"large": tree["members"]["large"]}, "distillation": [], "steps": 6})
    out = train(taught, tmp_path / "run")
    train(alone, out, resume=True, accept_changes=True)
    assert _flops(out) == _flops(train(alone, tmp_path / "always"))
    assert draw_curves(out).is_file()


def test_tokens_count_up_to_any_step():
    run = replace(find("ctcd:tiny"), provenance={"changed": [{"from_step": 2, "was": {"batch.sequences": 1}}]})
    a_row, now = run.data.length, run.batch.sequences
    assert [tokens_by(run, step) // a_row for step in range(5)] == [0, 1, 2, 2 + now, 2 + 2 * now]


def _flops(out):
    members = json.loads((out / "results.json").read_text())["members"]
    return {name: member["flops"] for name, member in members.items()}
