"""A study in a file of one's own: it runs, and whatever is wrong with it is said before anything is trained."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from codistill.cli import main
from codistill.config import MemberConfig
from codistill.errors import UserError
from codistill.study import Contrast, edge, frozen, settings
from codistill.study.arms import keys_of
from codistill.study.cells import Cells
from codistill.study.execute import missing
from codistill.study.find import check_study, find_study
from codistill.study.run import run_study, tabulate
from studies import SCALE, STUDY, data_folder, request

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_study.py"


def test_the_example_is_trained_and_told(text, tmp_path):
    study = find_study(str(EXAMPLE))
    found = run_study(request(tmp_path / "out", study), data=data_folder(tmp_path / "data", text), jobs=1)
    assert (found["arms"], found["missing"], found["failed"]) == (4, 0, [])
    contrasts = found["regimes"]["one pass"]["contrasts"]
    assert [c["label"] for c in contrasts] == [
        f"small: {n} − alone" for n in ("forward_kl", "reverse_kl", "jensen_shannon")
    ]
    assert len({c["loss"]["mean"] for c in contrasts} - {0.0}) == 3
    assert (tmp_path / "out" / "table.md").read_text().count("forward_kl − alone") == 1


def test_a_changed_divergence_of_ones_own_is_refused(text, tmp_path):
    """A cell's key has the place of the file only; its content is recorded beside it."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def squares(student_NV, teacher_NV, temperature):\n    return (student_NV - teacher_NV).square().mean(-1)"
    )

    def arms(scale, seed):
        (at,) = settings(scale.masked, seed, passes=(1,))
        pair = {role: at.learner(at.size.models[role]) for role in ("large", "small")}
        own = replace(edge("large", "small"), divergence=f"{file}:squares")
        return [at.arm("alone", {"large": pair["large"]}), at.arm("taught", pair, own)]

    study, data = replace(STUDY, arms=arms), data_folder(tmp_path / "data", text)
    out = tmp_path / "studies" / "out"
    assert run_study(request(out, study), data=data, jobs=1)["missing"] == 0
    file.write_text(file.read_text().replace("mean", "sum"))
    with pytest.raises(
        UserError, match=r"taught, seed 0 and what is trained now begin from .* code in one place \(mine.py\)"
    ):
        run_study(request(out, study, 2), data=data, jobs=1)


def test_the_command_takes_a_file(tmp_path, capsys):
    main(["study", str(EXAMPLE), "--plan", "--out", str(tmp_path / "out")])
    assert "study divergences at tiny, 3 seeds: Which divergence" in " ".join(capsys.readouterr().out.split())


def with_a_model_from_outside(place):
    """`alone`, `taught` by the model in the folder `place`, and `further`, which `taught` teaches in turn."""

    def arms(scale, seed):
        (at,) = settings(scale.masked, seed, passes=(1,))
        large = at.learner(at.size.models["large"])
        outside = MemberConfig(path=str(place), frozen=True)
        found = [
            at.arm("alone", {"large": large}),
            at.arm("taught", {"weak": outside, "large": large}, edge("weak", "large")),
            at.arm("further", {"next": frozen("taught", "large"), "large": large}, edge("next", "large")),
        ]
        return [replace(a, run=replace(a.run, data=replace(a.run.data, tokenizer=str(place)))) for a in found]

    return replace(STUDY, arms=arms)


def test_another_model_in_a_teachers_place_is_refused_and_its_cells_are_not_taken_over(
    text, teacher, tmp_path, monkeypatch
):
    place = shutil.copytree(teacher, tmp_path / "own" / "weak")
    study, data = with_a_model_from_outside(place), data_folder(tmp_path / "data", text)
    out = tmp_path / "studies" / "mine"
    assert run_study(request(out, study), data=data, jobs=1)["missing"] == 0
    held = {cell["arm"]: cell for cell in (json.loads(file.read_text()) for file in (out / "cells").iterdir())}
    assert {arm: len(cell["outside"]) for arm, cell in held.items()} == {"alone": 0, "taught": 1, "further": 1}
    assert str(tmp_path) not in json.dumps(list(held.values()))

    def trained_in(folder, seeds):
        """What is left to train there, which is not trained."""
        found = []
        monkeypatch.setattr(
            "codistill.study.run.execute", lambda arms, out, *_: found.append(missing(arms, Cells(out)))
        )
        run_study(request(folder, study, seeds), data=data, jobs=1)
        return [(arm.name, arm.seed) for arm in found[0]]

    assert trained_in(out, 2) == [("alone", 1), ("taught", 1), ("further", 1)]
    assert trained_in(out.parent / "same", 2) == trained_in(out, 2)
    weights = load_file(place / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, place / "model.safetensors")
    assert trained_in(out.parent / "other", 1) == [("taught", 0), ("further", 0)]
    with pytest.raises(UserError, match=r"taught, seed 0 and what is trained now begin from different models or code"):
        run_study(request(out, study, 2), data=data, jobs=1)
    tabulate(request(out, study, 2))  # which reads no model

    later = held["taught"] | {"seed": 1, "outside": dict.fromkeys(held["taught"]["outside"], "another")}
    every = study.arms(SCALE, 0) + study.arms(SCALE, 1)
    Cells(out).put(keys_of(every)["one pass", "taught", 1], later)
    with pytest.raises(UserError, match=r"taught, seed 0 and taught, seed 1 begin from .* \(weak\); they cannot be"):
        tabulate(request(out, study, 2))


START = "from codistill.study import *\n"
RIGHT = 'def arms(scale, seed):\n    return []\nSTUDY = Study("mine", "?", arms, [], [])\n'


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from beside import NOTHING", r"mine\.py: ImportError in line 1: cannot import name 'NOTHING' from 'beside'"),
        (None, r"mine\.py: there is no such file; give a study's name or a Python file that has a STUDY"),
        ("x = 1", r"mine\.py: its STUDY is None; give it STUDY = Study"),
        (START + "STUDY = Study", r"mine\.py: its STUDY is <class"),
        ("x = 1\ny = x / 0", r"mine\.py: ZeroDivisionError in line 2: division by zero"),
        ("x = (", r"mine\.py: SyntaxError: .*line 1"),
        ("import nothing_of_the_kind", r"mine\.py: ModuleNotFoundError in line 1: No module"),
        (START + RIGHT.replace("mine", "ctcd"), r"codistill has a study 'ctcd' itself; give yours another name"),
        (START + RIGHT, "study mine: it has no arms"),
        (START + RIGHT.replace("[]", "[][scale]", 1), r"mine\.py: TypeError in line 3: list indices"),
    ],
)
def test_a_file_that_is_no_study_is_one_line(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = Path("mine.py")
    Path("beside.py").touch()
    if source is not None:
        file.write_text(source)
    with pytest.raises(UserError, match=message) as raised:
        check_study(find_study(str(file)), SCALE)
    assert "\n" not in str(raised.value)


def changed(arms=None, **changes):
    """The toy study with something wrong; `arms`: what becomes of its own."""
    return replace(STUDY, arms=lambda scale, seed: (arms or list)(STUDY.arms(scale, seed)), **changes)


def without_teacher(arms):
    return [arm for arm in arms if arm.name != "teacher"]


def with_unknown_teacher(arms):
    return [replace(arm, run=replace(arm.run, distillation=[edge("nobody", "large")])) for arm in arms]


def with_other_roles(arms):
    return [from_alone(arm) if arm.name == "taught" else arm for arm in arms]


def from_alone(arm):
    members = arm.run.members | {"teacher": frozen("alone")}
    return replace(arm, run=replace(arm.run, members=members))


def in_a_circle(arms):
    taught = next(arm for arm in arms if arm.name == "taught")
    members = taught.run.members | {"teacher": frozen("taught", "large")}
    return [replace(taught, run=replace(taught.run, members=members))]


def with_tokenizers(arms):
    other = replace(arms[0].run, data=replace(arms[0].run.data, tokenizer="train:wordpiece:400"))
    return [replace(arms[0], run=other), *arms[1:]]


def of_two_regimes(arms):
    return [replace(arm, regime="other") if arm.name in ("taught", "teacher") else arm for arm in arms]


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (changed(lambda arms: arms + arms[:1]), "study toy: two arms are called 'alone' in the regime 'one pass'"),
        (
            changed(lambda arms: [replace(arm, seed=1) for arm in arms]),
            "the arm 'alone' does not heed the seed that its function is",
        ),
        (changed(without_teacher), "arm taught: it needs teacher/teacher, and 'teacher' is no arm of the study"),
        (changed(with_unknown_teacher), "study toy, arm alone: distillation.*teacher: .*'nobody'"),
        (
            changed(contrasts=[Contrast("c", "taught/larg", "alone/large")]),
            r"contrast 'c': no arm trains 'taught/larg' \(",
        ),
        (changed(contrasts=[Contrast("c", "taught/teacher", "alone/large")]), "no arm trains 'taught/teacher'"),
        (changed(curves=["alone/small"]), "curve 'alone/small': no arm trains 'alone/small'"),
        (changed(of_two_regimes), "no regime has all of it; compare within one"),
        (changed(with_other_roles), "arm taught: it needs alone/teacher, and the arm 'alone' trains large"),
        (changed(in_a_circle), "what it needs is not there, or needs it in turn"),
        (replace(STUDY, arms=lambda scale, seed: STUDY.arms(scale, 0)), "the arm .* does not heed the seed"),
        (changed(with_tokenizers), "its arms have several tokenizers or texts"),
        (changed(lambda arms: [replace(arms[0], name="τ = 2"), *arms[1:]]), "an arm is called 'τ = 2'; use letters"),
        (changed(lambda arms: [*arms, "more"]), "its function returned 'more' among the arms; wanted Arm"),
        (changed(seeds=0), "seeds 0; at least one is needed"),
    ],
)
def test_what_does_not_fit_together_is_one_line(study, message):
    with pytest.raises(UserError, match=message):
        check_study(study, SCALE)
