"""What `train --plan` says of whether to distil is what a committed study found, for edges like the run's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from codistill.cli import main
from codistill.data.corpus import FORMAT
from codistill.findings import (
    CAUSAL_LARGE_OF_A_PAIR,
    CAUSAL_SMALL_OF_A_PAIR,
    CAUSAL_TOO_WEAK_TEACHER,
    CAUSAL_WEAK_TEACHER,
    FINDINGS,
    LARGE_OF_A_PAIR,
    SMALL_OF_A_PAIR,
    TOO_WEAK_TEACHER,
    WEAK_TEACHER,
    Finding,
    advice,
)
from codistill.plan import plan
from codistill.recipes import find

STUDIES = Path(__file__).parents[1] / "studies"
LABELS = {
    ("dwt-soft-weight", WEAK_TEACHER): "weight 1 − alone",
    ("when-it-pays", WEAK_TEACHER): "large: DWT, weight 1 − alone",
    ("dwt-teacher-quality", TOO_WEAK_TEACHER): "extremely-weak teacher − alone",
    ("when-it-pays", LARGE_OF_A_PAIR): "large: CTCD, weight 1 − alone",
    ("when-it-pays", SMALL_OF_A_PAIR): "small: CTCD, weight 1 − alone",
    ("ctcd", LARGE_OF_A_PAIR): "large: both ways − alone",
    ("ctcd", SMALL_OF_A_PAIR): "small: both ways − alone",
    ("causal", CAUSAL_WEAK_TEACHER): "large: dwt, weak teacher − alone",
    ("causal", CAUSAL_TOO_WEAK_TEACHER): "large: dwt, weaker teacher − alone",
    ("causal", CAUSAL_LARGE_OF_A_PAIR): "large: ctcd − alone",
    ("causal", CAUSAL_SMALL_OF_A_PAIR): "small: ctcd − alone",
}


@pytest.mark.parametrize(("name", "finding"), [(name, f) for name, found in FINDINGS.items() for f in found])
def test_the_numbers_are_those_of_the_committed_study(name, finding):
    results = json.loads((STUDIES / finding.study / "results.json").read_text())
    often = "one pass" if finding.passes == 1 else f"{finding.passes} passes"
    regime = results["regimes"][f"{often}, regularised" if finding.regularised else often]
    (found,) = [c["loss"] for c in regime["contrasts"] if c["label"] == LABELS[finding.study, name]]
    numbers = [round(number, 3) for number in (found["mean"], *found["interval"])]
    assert [finding.mean, finding.low, finding.high] == numbers
    assert finding.seeds == found["seeds"]


def contrast(study: str, finding: str) -> tuple[str, str]:
    return study, LABELS[study, finding]


# The rows of the table of what was found: a contrast of masked models, and one of causal ones.
FOUND = {
    "student of a weak teacher nearly as good as it": (
        contrast("dwt-soft-weight", WEAK_TEACHER),
        contrast("causal", CAUSAL_WEAK_TEACHER),
    ),
    "student of a much weaker teacher": (
        contrast("dwt-teacher-quality", TOO_WEAK_TEACHER),
        contrast("causal", CAUSAL_TOO_WEAK_TEACHER),
    ),
    "large model of a pair, each teaching the other": (
        contrast("ctcd", LARGE_OF_A_PAIR),
        contrast("causal", CAUSAL_LARGE_OF_A_PAIR),
    ),
    "small model of that pair": (contrast("ctcd", SMALL_OF_A_PAIR), contrast("causal", CAUSAL_SMALL_OF_A_PAIR)),
    "small model of that pair − the large one alone": (
        ("ctcd", "small: both ways − large alone"),
        ("causal", "small: ctcd − large alone"),
    ),
    "student that starts from the weak model, grown, and is not taught": (
        ("dwt-remapping", "repeat-last − random, alone, whole rate"),
        ("causal", "not tried"),
    ),
}
OFTEN = (("one pass", "20 passes"), ("one pass", "20 passes", "20 passes, regularised"))


def written(study: str, label: str, regime: str) -> str:
    """A study's difference as the table writes it; a dash where there is none."""
    results = json.loads((STUDIES / study / "results.json").read_text())["regimes"][regime]
    found = [c["loss"] for c in results["contrasts"] if c["label"] == label]
    if not found:
        return "–"
    low, high = found[0]["interval"]
    mean, *interval = (f"{number:+.2f}".replace("-", "−") for number in (found[0]["mean"], low, high))
    return f"{f'**{mean}**' if low > 0 or high < 0 else mean} [{', '.join(interval)}]"


@pytest.mark.parametrize("place", ["README.md", "docs/studies.md"])
def test_the_table_of_what_was_found_is_what_the_studies_say(place):
    page = (STUDIES.parent / place).read_text()
    for row, contrasts in FOUND.items():
        cells = [written(*of, regime) for of, regimes in zip(contrasts, OFTEN, strict=True) for regime in regimes]
        assert f"| {row} | {' | '.join(cells)} |" in page


def test_every_number_of_passes_is_there_once():
    assert [[finding.passes for finding in found] for found in FINDINGS.values()] == [
        [1, 5, 20],
        [1, 20],
        [1, 5, 20],
        [1, 5, 20],
        *([1, 20, 20], [1, 20], [1, 20, 20], [1, 20, 20]),
    ]


def test_how_weak_the_teachers_were_is_what_the_study_says():
    """The student is `large`; a teacher's own loss is on other masks, 0.03 nats easier."""
    for study, teacher, worse, size in (
        ("when-it-pays", "teacher-weak", (0.05, 0.2), 0.75),
        ("dwt-teacher-quality", "teacher-extremely-weak", (0.8, 1.05), 0.3),
    ):
        for regime in json.loads((STUDIES / study / "results.json").read_text())["regimes"].values():
            alone, taught = regime["rows"]["alone-large/large"], regime["rows"][f"{teacher}/teacher"]
            assert worse[0] < taught["loss"]["mean"] - alone["loss"]["mean"] < worse[1]
            assert taught["parameters"] / alone["parameters"] == pytest.approx(size, abs=0.03)
    both = json.loads((STUDIES / "causal" / "results.json").read_text())["regimes"]
    rows = both["one pass"]["rows"]
    for teacher, worse, size in (("weak", 0.07, 0.7), ("weaker", 0.25, 0.5)):
        alone, taught = rows["alone-large/large"], rows[f"{teacher}/teacher"]
        assert taught["loss"]["mean"] - alone["loss"]["mean"] == pytest.approx(worse, abs=0.005)
        assert taught["parameters"] / alone["parameters"] == pytest.approx(size, abs=0.04)
    for member in ("alone-large/large", "alone-small/small"):  # "alone it overfits in 20": for one seed it hardly does
        fell = [of["best"] - of["below"] for of in both["20 passes"]["on_the_plateau"] if of["member"] == member]
        assert len(fell) == 5
        assert sum(fall > 0.02 for fall in fell) >= 4


@pytest.mark.parametrize(
    ("recipe", "sizes", "said"),
    [
        ("ctcd:tiny", {"large": 2, "small": 1}, [LARGE_OF_A_PAIR, SMALL_OF_A_PAIR]),
        ("dwt:tiny", {"weak": 1, "large": 2}, [WEAK_TEACHER, TOO_WEAK_TEACHER]),
        ("dwt:tiny", {"weak": 2, "large": 1}, []),
        ("one-way:tiny", {"large": 2, "small": 1}, []),
        ("standalone:tiny", {"large": 1}, []),
        ("ctcd-clm:tiny", {"large": 2, "small": 1}, [CAUSAL_LARGE_OF_A_PAIR, CAUSAL_SMALL_OF_A_PAIR]),
    ],
)
def test_it_speaks_of_edges_like_those_of_the_study_only(recipe, sizes, said):
    run = find(recipe)
    assert set(run.members) == set(sizes)
    lines = advice(run, sizes, 3.0)
    expected = [line for name in said for line in (f"  {name}", *(f"    {finding}" for finding in FINDINGS[name]))]
    assert lines[1:] == expected
    assert not said or "the text is seen 3 times" in lines[0]
    assert bool(lines) == bool(said)


def test_a_finding_whose_interval_holds_0_is_not_shown():
    found = {low: str(Finding("ctcd", 20, 0.01, low, 0.02, 5)) for low in (-0.004, 0.004)}
    assert found[-0.004] == "20 passes: +0.010 nats [-0.004, +0.020], not shown (5 seeds)"
    assert found[0.004].endswith("[+0.004, +0.020], higher (5 seeds)")
    assert str(Finding("ctcd", 1, -0.2, -0.3, -0.1, 3)).endswith("[-0.300, -0.100], lower (3 seeds)")


def test_a_plan_knows_how_often_the_text_is_seen(monkeypatch, tmp_path, capsys):
    """6,400 tokens in all: of 320 that `data.tokens` allows, or of 100 that a prepared folder has."""
    monkeypatch.setattr("codistill.plan.why_not_try", lambda *_: "not tried")
    run = find("ctcd:tiny")
    run = replace(run, steps=10, batch=replace(run.batch, sequences=10), data=replace(run.data, length=64))
    cpu = torch.device("cpu")
    assert plan(run, cpu).passes is None
    assert plan(replace(run, data=replace(run.data, tokens=320)), cpu).passes == 20
    (tmp_path / "manifest.json").write_text(json.dumps({"format": FORMAT, "tokens": 100}))
    prepared = replace(run.data, train=[str(tmp_path)], tokens=320)
    assert plan(replace(run, data=prepared), cpu).passes == 64
    main(["train", "ctcd:tiny", "--plan", "--set", "data.tokens=1000"])
    assert "does it pay? the text is seen " in capsys.readouterr().out
