"""Strict loading: what comes in round-trips, and what is wrong is refused in one line that says what to do."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codistill.errors import UserError
from codistill.loading import load, override, parse_yaml, read_run, to_dict, to_yaml
from codistill.recipes import RECIPES, find

MEMBERS = {"large": {"model": {"layers": 2}}, "small": {"model": {"layers": 1}}}


@pytest.mark.parametrize("size", ["tiny", "small", "paper"])
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_round_trips_through_yaml(name, size):
    run = find(f"{name}:{size}")
    assert load(parse_yaml(to_yaml(run), "test")) == run


def test_overrides_reach_every_part():
    tree = override(
        to_dict(find("ctcd")),
        ["steps=7", "members.large.lr=1e-4", "distillation.1.weight={linear: [4, 1]}", "members.small.model.layers=1"],
    )
    run = load(tree)
    assert (run.steps, run.members["large"].lr, run.members["small"].model.layers) == (7, 1e-4, 1)
    assert (run.distillation[0].weight, run.distillation[1].weight) == (1.0, {"linear": [4, 1]})


@pytest.mark.parametrize(
    "name",
    [
        "1e-3",
        "1E5",
        "1_0e2",
        ".5",
        "yes",
        "true",
        "null",
        "0x1f",
        "0o7",
        "1:30",
        "2026-11-24",
        "<<",
        "=",
        "- a",
        "a: b",
        "#",
        "é",
        " ",
    ],
)
def test_text_that_looks_like_something_else_stays_text(name):
    """As the folder of a sweep over learning rates, or a column, may be called."""
    run = load({"data": {"column": name, "train": [name]}, "members": {"a": {"path": name}}})
    assert (run.data.column, run.members["a"].path) == (name, name)
    assert load(parse_yaml(to_yaml(run), "test")) == run


def test_a_schedule_of_steps_round_trips():
    run = load({"members": {"a": {"model": {}, "lr": {"step": {0: 1e-3, 100: 1e-4}}}}})
    assert load(parse_yaml(to_yaml(run), "test")) == run


def test_names_of_members_stay_as_they_are():
    """`from_` is spelled `from` in a file; a member may be called anything."""
    tree = {"members": {"a": {"model": {}}, "a_": {"model": {}, "init": {"from": "b"}}}}
    tree["distillation"] = [{"teacher": "a_", "student": "a"}]
    written = parse_yaml(to_yaml(load(tree)), "test")
    assert list(written["members"]) == ["a", "a_"]
    assert written["members"]["a_"]["init"]["from"] == "b"
    assert load(written) == load(tree)


def test_a_home_folder_is_spelled_out():
    members = {"old": {"path": "~/old", "frozen": True}, "new": {"model": {}, "init": {"from": "~/old"}}}
    run = load({"members": members})
    assert run.members["old"].path == run.members["new"].init.from_ == str(Path.home() / "old")


def test_a_twin_follows_its_original():
    run = load(override(to_dict(find("quickstart")), ["members.large.model.layers=3", "members.small-alone.lr=1e-4"]))
    assert run.members["large-alone"].model.layers == 3
    assert run.members["small-alone"].lr == 1e-4
    assert run.members["small"].lr != 1e-4


def test_a_twin_may_leave_out_what_its_original_has():
    members = {"a": {"model": {}, "init": {"from": "somewhere"}}, "b": {"twin_of": "a", "init": None}}
    run = load({"members": members})
    assert run.members["b"].init is None
    assert load(parse_yaml(to_yaml(run), "test")) == run


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("5E+2", 500.0), ("3", 3), (".5", 0.5), ("-1.5e-3", -1.5e-3), ("true", True), ("on", "on")],
)
def test_numbers_are_what_people_write(text, value):
    parsed = parse_yaml(text, "test")
    assert parsed == value
    assert type(parsed) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_float_survives_yaml(value):
    assert parse_yaml(repr(value), "test") == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stpes": 1}, r"^stpes: there is no such setting \(did you mean steps\?\)"),
        ({"steps": "many"}, r"^steps: 'many' came in where a whole number is wanted"),
        ({"steps": True}, r"^steps: True came in where a whole number"),
        ({"steps": 0}, r"^steps: 0 came in where at least 1 is wanted"),
        ({"steps": 2.5}, r"^steps: 2.5 came in where a whole number"),
        ({"precision": "float16"}, r"^precision: 'float16' .* one of auto, float32, bfloat16"),
        ({"objective": {"mask_rate": 0}}, r"^objective\.mask_rate: 0.0 came in where more than 0"),
        ({"objective": {"mask_rate": 1.5}}, r"^objective\.mask_rate: 1.5 came in where at most 0.9"),
        ({"objective": {"mask_rate": 0.01}, "data": {"length": 16}}, r"rounds to no predicted row"),
        ({"data": []}, r"^data: \[\] came in where a mapping is wanted"),
        ({"members": {}}, r"^members: none is trained"),
        ({"members": {"a": {"model": {}, "frozen": True}}}, r"^members: none is trained"),
        ({"members": {"a": {}}}, r"^members\.a: give `model` \(random initialisation\) or `path`"),
        (
            {"members": {"a": {"model": {}, "path": "b"}}},
            r"^members\.a: give `model` \(random initialisation\) or `path`",
        ),
        ({"members": {"a/b": {"model": {}}}}, r"'a/b' cannot name a member"),
        ({"members": {"a": {"model": {"layer": 2}}}}, r"^members\.a\.model\.layer: .*did you mean layers"),
        ({"members": {"a": {"model": {"width": 100, "heads": 3}}}}, r"^members\.a\.model\.heads: a width of 100"),
        ({"members": {"a": {"model": {}, "betas": [0.9]}}}, r"^members\.a\.betas"),
        ({"members": {**MEMBERS, "lagre": {"lr": 1}}}, r"^members\.lagre: give `model` .* \(did you mean large\?\)"),
        (
            {"members": {"a": {"model": {"width": 30, "heads": 2}}}},
            r"^members\.a\.model\.heads: modernbert turns pairs of numbers, and 2 heads .* are 15 wide",
        ),
        ({"members": {"a": {"twin_of": "b"}}}, r"^members\.a\.twin_of: there is no member 'b'"),
        ({"members": {"a": {"model": {}, "twin_of": "a"}}}, r"^members\.a\.twin_of: 'a' cannot be its own twin"),
        ({"members": {"a": {"model": {}, "lr": -1}}}, r"^members\.a\.lr: -1 is no schedule"),
        ({"distillation": [{"teacher": "large"}]}, r"^distillation\.0\.student: missing; every distillation needs one"),
        (
            {"distillation": [{"teacher": "lage", "student": "small"}]},
            r"^distillation\.0\.teacher: there is no member 'lage' \(did you mean large\?\)",
        ),
        (
            {"distillation": [{"teacher": "large", "student": "large"}]},
            r"^distillation\.0: 'large' cannot teach itself",
        ),
        (
            {"distillation": [{"teacher": "large", "student": "small", "temperature": 0}]},
            r"^distillation\.0\.temperature: 0.0 came in where more than 0",
        ),
        (
            {"distillation": [{"teacher": "large", "student": "small", "divergence": "kl"}]},
            r"^distillation\.0: divergence 'kl'; wanted forward_kl",
        ),
        ({"members": {**MEMBERS, 1: {"model": {}}}}, r"^members: 1 cannot name a member"),
        ({"members": {"a": {"twin_of": ["b"]}}}, r"^members\.a\.twin_of: there is no member \['b'\]"),
        (
            {"members": {**MEMBERS, "b": {"twin_of": "large"}, "c": {"twin_of": "b"}}},
            r"^members\.c\.twin_of: 'b' is a twin itself",
        ),
        ({"distillation": [{"teacher": "large", "student": "small"}] * 2}, r"'large' teaches 'small' already"),
        ({"members": {"a": {"model": {}, "lr": 10**400}}}, r"^members\.a\.lr: 1000.* is no schedule"),
        (
            {
                "members": {**MEMBERS, "old": {"path": "b", "frozen": True, "cached": "c"}},
                "distillation": [{"teacher": "old", "student": "small", "kind": "hidden"}],
            },
            r"^distillation\.0\.kind: hidden looks into the layers of 'old', which is cached",
        ),
        (
            {"members": {"a": {"model": {"family": "roberta", "heads": 2, "key_value_heads": 1}}}},
            r"^members\.a\.model\.key_value_heads: 1 came in; roberta with 2 heads takes none",
        ),
        (
            {"members": {"a": {"model": {}, "init": {"from": "b", "learned": 5, "width": "replicate"}}}},
            r"^members\.a\.init: `learned` finds the widths itself",
        ),
        ({"batch": {"sequences": 10, "accumulate": 3}}, r"^batch\.accumulate: 3 does not divide the 10 sequences"),
    ],
)
def test_what_is_wrong_is_refused(change, message):
    with pytest.raises(UserError, match=message) as refusal:
        load({"members": MEMBERS, **change})
    assert "\n" not in str(refusal.value)


def test_an_edge_to_a_frozen_student_is_refused():
    members = {**MEMBERS, "old": {"path": "somewhere", "frozen": True}}
    with pytest.raises(UserError, match="'old' is frozen and cannot learn"):
        load({"members": members, "distillation": [{"teacher": "large", "student": "old"}]})


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "write KEY=VALUE"),
        ("distillation.5.weight=1", "'5' is no index of a list of 2"),
        ("steps.more=1", "single value"),
        ("data.train=[", "is not YAML"),
        ("members={a: 1, a: 2}", "^--set members: the key 'a' stands twice"),
        ("distillation.0.weight={{linear: [4, 1]}}", "is neither a name nor a number.*mind the braces"),
        ("steps=2020-99-99", "is not YAML"),
        ("steps=!!int abc", "is not YAML"),
        ("steps=!!timestamp abc", "is not YAML"),
    ],
)
def test_wrong_overrides_are_refused(assignment, message):
    with pytest.raises(UserError, match=message):
        load(override(to_dict(find("ctcd")), [assignment]))


def test_wrong_files_are_refused(tmp_path):
    for content, message in ((b"- 1", "holds no mapping"), (b"a: [", "is not YAML"), (b"\xff\xfe", "cannot be read")):
        (tmp_path / "run.yaml").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_run(tmp_path / "run.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        read_run(tmp_path / "absent.yaml")
