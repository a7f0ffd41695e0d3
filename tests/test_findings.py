"""What `train --plan` says of whether to distil is what a committed study found, for edges like the run's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from codistill.cli import main
from codistill.data.corpus import FORMAT
from codistill.findings import FINDINGS, PEER_OF_LARGE, PEER_OF_SMALL, SOURCE, WEAK_TEACHER, Finding, advice
from codistill.plan import plan
from codistill.recipes import find

STUDY = json.loads((Path(__file__).parents[1] / "studies" / "when-it-pays" / "results.json").read_text())


def test_the_numbers_are_those_of_the_committed_study():
    found: dict[str, list[tuple]] = {name: [] for name in FINDINGS}
    for regime, of in STUDY["regimes"].items():
        for contrast in of["contrasts"]:
            if contrast["label"] in found and contrast["loss"]["interval"] is not None:
                passes = 1 if regime == "one pass" else int(regime.split()[0])
                numbers = (contrast["loss"]["mean"], *contrast["loss"]["interval"])
                found[contrast["label"]].append((passes, *(round(number, 3) for number in numbers)))
                assert f"{contrast['loss']['seeds']} seeds" in SOURCE
    for name, findings in FINDINGS.items():
        assert sorted((f.passes, f.mean, f.low, f.high) for f in findings) == sorted(found[name])


@pytest.mark.parametrize(
    ("recipe", "sizes", "said"),
    [
        ("ctcd:tiny", {"large": 2, "small": 1}, [PEER_OF_LARGE, PEER_OF_SMALL]),
        ("dwt:tiny", {"weak": 1, "large": 2}, [WEAK_TEACHER]),
        ("dwt:tiny", {"weak": 2, "large": 1}, []),
        ("one-way:tiny", {"large": 2, "small": 1}, []),
        ("standalone:tiny", {"large": 1}, []),
        ("ctcd-clm:tiny", {"large": 2, "small": 1}, []),
    ],
)
def test_it_speaks_of_edges_like_those_of_the_study_only(recipe, sizes, said):
    run = find(recipe)
    assert set(run.members) == set(sizes)
    lines = advice(run, sizes, 3.0)
    assert len(lines) == (1 + len(said) if said else 0)
    for name, line in zip(said, lines[1:], strict=True):
        assert all(str(finding) in line for finding in FINDINGS[name])
    assert not said or "the text is seen 3 times" in lines[0]


def test_a_finding_whose_interval_holds_0_is_not_shown():
    assert str(Finding(1, -0.049, -0.144, 0.046)) == "-0.049 [-0.144, +0.046], not shown in one pass"
    assert str(Finding(20, -0.128, -0.185, -0.072)) == "-0.128 [-0.185, -0.072] in 20 passes"


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
