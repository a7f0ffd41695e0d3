"""A study in a file of one's own: it runs, and whatever is wrong with it is said before anything is trained."""

from dataclasses import replace
from pathlib import Path

import pytest

from codistill.cli import main
from codistill.errors import UserError
from codistill.study import Contrast, edge
from codistill.study.find import check_study, find_study
from codistill.study.run import run_study
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


def test_the_command_takes_a_file(tmp_path, capsys):
    main(["study", str(EXAMPLE), "--plan", "--out", str(tmp_path / "out")])
    assert "study divergences at tiny, 3 seeds: Which divergence" in " ".join(capsys.readouterr().out.split())


START = "from codistill.study import *\n"
RIGHT = 'def arms(scale, seed):\n    return []\nSTUDY = Study("mine", "?", arms, [], [])\n'


@pytest.mark.parametrize(
    ("source", "message"),
    [
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
def test_a_file_that_is_no_study_is_one_line(source, message, tmp_path):
    file = tmp_path / "mine.py"
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


def of_two_regimes(arms):
    return [replace(arm, regime="other") if arm.name in ("taught", "teacher") else arm for arm in arms]


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (changed(lambda arms: arms + arms[:1]), "study toy: two arms are called 'alone' in the regime 'one pass'"),
        (
            changed(lambda arms: [replace(arm, seed=1) for arm in arms]),
            "asked for seed 0, it returns the arm 'alone' of",
        ),
        (changed(without_teacher), "its teacher 'teacher' is no arm of the study"),
        (changed(with_unknown_teacher), "study toy, arm alone: distillation.*teacher: .*'nobody'"),
        (
            changed(contrasts=[Contrast("c", "taught/larg", "alone/large")]),
            r"contrast 'c': no arm trains 'taught/larg' \(",
        ),
        (changed(contrasts=[Contrast("c", "taught/teacher", "alone/large")]), "no arm trains 'taught/teacher'"),
        (changed(curves=["alone/small"]), "curve 'alone/small': no arm trains 'alone/small'"),
        (changed(of_two_regimes), "no regime has both sides; compare within one"),
    ],
)
def test_what_does_not_fit_together_is_one_line(study, message):
    with pytest.raises(UserError, match=message):
        check_study(study, SCALE)
