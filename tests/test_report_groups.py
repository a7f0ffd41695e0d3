"""Runs that are equal but for the seed, on one page: means, paired differences, and what must not be compared."""

import json
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from codistill.config import DistillationConfig, Logging, MemberConfig
from codistill.errors import UserError
from codistill.loading import to_yaml
from codistill.recipes import find
from codistill.report import write_report
from codistill.report.groups import differences, grouped
from codistill.report.run import groups_figure
from codistill.train import train
from runs import small_run

PAIR = find("ctcd")
PAIR = replace(PAIR, members={**PAIR.members, "small-alone": replace(PAIR.members["small"], twin_of="small")})
STRONGER = replace(PAIR, distillation=[replace(PAIR.distillation[0], weight=4.0), *PAIR.distillation[1:]])
SMALL_A, ALONE_A, SMALL_B = (3.50, 3.61, 3.42), (3.75, 3.80, 3.70), (3.57, 3.66, 3.50)


def finished(folder: Path, run, losses: dict, seed: int = 0, *, curve=((1, 5.0), (2, 4.0)), **facts) -> Path:
    """A made-up finished run, with `facts` among its provenance."""
    folder.mkdir(parents=True)
    provenance = {
        "versions": {"torch": "2"},
        "data": {"train": {"identity": "a" * 64}, "validation": {"identity": "b" * 64}},
        "tokenizer": "c" * 64,
    }
    run = replace(run, seed=seed, provenance=provenance | facts)
    members = {
        name: {
            "loss": loss, "perplexity": None, "accuracy": 0.25, "parameters": 1_000_000,
            "frozen": run.members[name].frozen, "twin_of": run.members[name].twin_of,
            "taught_by": [edge.teacher for edge in run.distillation if edge.student == name],
        }
        for name, loss in losses.items()
    }  # fmt: skip
    results = {"members": members, "held_out": {"unigram_loss": 6.5, "rows": 100}, "steps": 2, "tokens": 64}
    (folder / "results.json").write_text(json.dumps({**results, "seconds": 1.0, "seed": seed}))
    lines = [{"step": step, "held_out": {name: {"loss": loss} for name in members}} for step, loss in curve]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "run.yaml").write_text(to_yaml(run))
    return folder


def group(place: Path, name: str, run, small, alone=ALONE_A, **facts) -> list[Path]:
    """Runs of the seeds 0, 1, …"""
    return [
        finished(
            place / f"{name}-{seed}", run, {"large": 3.0 + seed, "small": taught, "small-alone": other}, seed, **facts
        )
        for seed, (taught, other) in enumerate(zip(small, alone, strict=True))
    ]


def page(folders, place: Path) -> str:
    """The page as Markdown; the HTML, made of the same blocks, has the cells of all of its tables."""
    html, markdown = write_report(folders, place / "report.html")
    text, tagged = markdown.read_text(), html.read_text()
    for cells in rows(text):
        assert all(f">{escape(cell)}</t" in tagged for cell in cells)
    return text


def rows(text: str) -> list[list[str]]:
    """The cells of all tables."""
    return [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ") and "| ---" not in line]


def row(text: str, *first: str) -> list[str]:
    """What follows the cells `first` in the only row that begins with them."""
    (found,) = (cells for cells in rows(text) if tuple(cells[: len(first)]) == first)
    return found[len(first) :]


def paired_t(one, other) -> list[str]:
    """The mean difference and its 95 % interval, by scipy's paired t-test."""
    low, high = stats.ttest_rel(one, other).confidence_interval(0.95)
    return [f"{np.mean(np.subtract(one, other)):+.3f}", f"[{low:+.3f}, {high:+.3f}]"]


def test_groups_have_means_paired_differences_and_what_they_differ_in(tmp_path):
    folders = [*group(tmp_path, "A", PAIR, SMALL_A), *group(tmp_path, "B", STRONGER, SMALL_B)]
    text = page(folders, tmp_path)
    mean = f"{np.mean(SMALL_A):.3f} ± {stats.tstd(SMALL_A):.3f}"
    assert row(text, "A / small") == ["large", "3", mean, *paired_t(SMALL_A, ALONE_A), "lower"]
    assert row(text, "A / small-alone")[:3] == ["nobody", "3", "3.750 ± 0.050"]
    assert row(text, "B / small")[3:] == [*paired_t(SMALL_B, ALONE_A), "lower"]
    assert row(text, "B − A", "small") == ["3", *paired_t(SMALL_B, SMALL_A), "higher"]
    assert row(text, "B − A", "large")[-1] == "not shown"
    assert row(text, "setting") == ["A", "B"]
    assert row(text, "distillation.0.weight") == ["1.0", "4.0"]
    assert sum(cells[0].startswith("distillation") for cells in rows(text)) == 1
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Runs together",
        "## Runs A",
        "## Runs B",
    ]
    assert text.count("<details>") == 2
    assert "all but the seed is that of seeds 0, 1, 2" in text
    assert row(text, "B-1", "1", "small")[3] == f"{SMALL_B[1]:.3f}"


def test_a_loss_that_is_no_number_is_in_no_mean_and_no_difference(tmp_path):
    folders = [
        *group(tmp_path, "A", PAIR, (3.5, None, 3.4), (3.7, 3.8, float("nan"))),
        *group(tmp_path, "B", STRONGER, (None, float("inf"), None)),
    ]
    text = page(folders, tmp_path)
    assert row(text, "A / small")[1:3] == ["2 of 3; no number: seed 1", "3.450 ± 0.071"]
    assert row(text, "A / small")[3:] == ["-0.200", "(of 1 only)", "a single run"]
    assert row(text, "A / small-alone")[1] == "2 of 3; no number: seed 2"
    assert row(text, "B / small")[1:] == ["0 of 3; no number: seeds 0, 1, 2", "no number", "", "", "no number"]
    assert row(text, "B − A", "small") == ["0", "", "", "no number"]
    assert not {"nan", "inf", "+nan"} & {cell for cells in rows(text) for cell in cells}
    assert row(text, "B-1", "1", "small")[3:5] == ["no number", ""]


def test_losses_of_other_tokens_are_not_compared(tmp_path):
    other = {"train": {"identity": "a" * 64}, "validation": {"identity": "d" * 64}}
    causal = replace(PAIR, objective=replace(PAIR.objective, name="clm"))
    folders = [
        *group(tmp_path, "A", PAIR, SMALL_A),
        *group(tmp_path, "B", STRONGER, SMALL_B, data=other),
        *group(tmp_path, "C", causal, SMALL_B),
        *group(tmp_path, "D", replace(PAIR, steps=PAIR.steps + 1), SMALL_B),
    ]
    text = page(folders, tmp_path)
    assert {cells[0] for cells in rows(text) if "−" in cells[0]} == {"D − A"}
    assert "**Not compared with A: B, whose losses are of other held-out tokens: provenance.data.vali" in text
    assert "C, whose losses are of other held-out tokens: objective.name differs." in text
    assert {"### A and D", "### B", "### C"} <= set(text.splitlines())
    assert row(text, "provenance.data.validation")[1].startswith("d" * 12 + " (")


def test_what_changes_no_number_parts_no_group(tmp_path):
    moved = replace(
        PAIR, recipe=None, data=replace(PAIR.data, train=["/elsewhere"]), track=["trackio"], log=Logging(every=7)
    )
    losses = {"large": 3.0, "small": 3.5, "small-alone": 3.6}
    folders = [
        finished(tmp_path / "A", PAIR, losses, 0),
        finished(tmp_path / "B", moved, losses, 1),
        finished(tmp_path / "text", PAIR, losses, 2, data={k: {"identity": k} for k in ("train", "validation")}),
        finished(tmp_path / "words", PAIR, losses, 3, tokenizer="d"),
        finished(tmp_path / "teacher", PAIR, losses, 4, members={"large": "weights"}),
        finished(tmp_path / "shape", PAIR, losses, 5, configurations={"large": "rope_theta"}),
        finished(tmp_path / "resumed", PAIR, losses, 6, changed=[{"from_step": 1, "was": {"steps": 9}}]),
    ]
    found = grouped(folders)
    assert [[run.name for run in one.runs] for one in found] == [
        ["A", "B"],
        ["text"],
        ["words"],
        ["teacher"],
        ["shape"],
        ["resumed"],
    ]


def test_a_model_that_nobody_trains_is_not_compared(tmp_path):
    losses = {"large": 3.0, "small": 3.5, "small-alone": 3.6}
    frozen = [replace(run, members={**run.members, "large": MemberConfig(path="/m", frozen=True)}, distillation=[])
              for run in (PAIR, replace(PAIR, steps=9))]  # fmt: skip
    folders = [finished(tmp_path / f"{n}-{seed}", frozen[n], losses, seed) for n in (0, 1) for seed in (0, 1)]
    text = page(folders, tmp_path)
    assert [cells[1] for cells in rows(text) if cells[0] == "1 − 0"] == ["small", "small-alone"]
    assert row(text, "1 / large")[:2] == ["frozen", "2"]


def test_a_seed_counts_once(tmp_path):
    losses = {"large": 3.0, "small": 3.5, "small-alone": 3.6}
    folders = [*group(tmp_path, "A", PAIR, SMALL_A), finished(tmp_path / "again", PAIR, losses | {"small": 9.0}, 1)]
    text = page([*folders, folders[0]], tmp_path)
    assert "**again repeats A-1, with the same settings and seed: it is in no mean.**" in text
    assert row(text, "A / small")[1:3] == ["3", f"{np.mean(SMALL_A):.3f} ± {stats.tstd(SMALL_A):.3f}"]
    assert row(text, "again", "1", "small")[3] == "9.000"
    assert text.count("## Runs A") == 1


def test_single_runs_are_called_single_and_stay_as_they_are(tmp_path):
    one, other = group(tmp_path, "A", PAIR, SMALL_A)[0], group(tmp_path, "B", STRONGER, SMALL_B)[1]
    alone = page([one], tmp_path)
    assert "Runs together" not in alone
    text = page([one, other], tmp_path)
    assert row(text, "A-0 / small") == ["large", "a single run", "3.500", "-0.250", "", "a single run"]
    assert row(text, "B-1 − A-0", "small") == ["0", "", "", "no seed in common"]
    assert alone.partition("\n## ")[2].replace("1-A-0", "") in text.replace("1-A-0", "")


def test_groups_are_named_by_what_the_folders_have_in_common(tmp_path):
    losses = {"large": 3.0, "small": 3.5, "small-alone": 3.6}

    def names(**folders):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        settings = zip(folders.values(), (PAIR, STRONGER, replace(PAIR, steps=9)), strict=False)
        found = [
            finished(place / name, run, losses, seed) for names, run in settings for seed, name in enumerate(names)
        ]
        return [one.name for one in grouped(found)]

    assert names(a=["t-1/seed-0", "t-1/seed-1"], b=["t-2/seed-0", "t-2/seed-1"]) == ["t-1", "t-2"]
    assert names(a=["ctcd-seed-10", "ctcd-seed-11"], b=["ctcd2_0", "ctcd2_1"]) == ["ctcd", "ctcd2"]
    assert names(a=["first", "seed-1", "seed-2"], b=["B-0", "B-1"], c=["x"]) == ["first and 2 more", "B", "x"]


def test_a_member_or_edge_that_only_some_have_is_one_line():
    one = {"members.a.lr": 1, "members.b.lr": 1, "members.b.model.width": 8, "steps": 5}
    edge = {"distillation.0.teacher": "b", "distillation.0.student": "a", "distillation.0.weight": 1.0}
    other = {"members.a.lr": 2, "steps": 5}
    third = {**one, **edge, "members.b.lr": 3}
    assert differences([one, other, third]) == {
        "members.a.lr": [1, 2, 1],
        "members.b": ["there", None, "there"],
        "members.b.lr": [1, None, 3],
        "distillation.0": [None, None, "b → a"],
    }


def test_runs_that_were_not_made_alike_are_told(tmp_path):
    losses = {"large": 3.0, "small": 3.5, "small-alone": 3.6}
    folders = [finished(tmp_path / f"A-{n}", PAIR, losses, n, versions={"torch": str(n)}) for n in (2, 3)]
    assert "**The runs were not all made alike: torch 2 and 3.**" in page(folders, tmp_path)


def test_bands_are_over_the_points_that_all_seeds_have(tmp_path):
    losses = {"large": 3.0, "small": 3.5, "small-alone": 3.6}
    curves = ([(1, 5.0), (2, 4.0), (3, 3.5)], [(1, 6.0), (2, 4.5)], [(1, 7.0), (2, None), (3, 3.0)])
    folders = [finished(tmp_path / f"A-{n}", PAIR, losses, n, curve=curve) for n, curve in enumerate(curves)]
    axes = groups_figure({"A": folders[:2], "B": folders}).axes
    lines = {line.get_label(): line for line in axes[0].lines}
    assert lines["small-alone"].get_ydata().tolist() == [5.5, 4.25]
    assert lines["small-alone"].get_linestyle() == "--"
    band = axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(5.5 + np.sqrt(0.5))
    assert list(axes[1].lines[0].get_ydata()) == [6.0]


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    folders = group(tmp_path, "A", PAIR, SMALL_A)
    (folders[1] / "run.yaml").write_text("steps: no")
    with pytest.raises(UserError, match=rf"^{folders[1]}: steps: 'no' came in"):
        write_report(folders, tmp_path / "report.html")
    for wrong in ('{"members": {}}', '{"members": {}, "held_out": {"rows": 1, "unigram_loss": "x"}}', "nothing"):
        (folders[2] / "results.json").write_text(wrong)
        with pytest.raises(UserError, match=rf"{folders[2]}: .*results\.json"):
            write_report([folders[0], folders[2]], tmp_path / "report.html")


def test_runs_of_two_seeds_and_two_settings_make_two_groups(text, tmp_path):
    """Real ones: of other members too, and a pre-trained one that is not trained."""
    teacher = train(small_run("standalone", text, "steps=2"), tmp_path / "teacher") / "members" / "large"
    taught = small_run("standalone", text, "steps=2")
    members = {**taught.members, "teacher": MemberConfig(path=str(teacher), frozen=True)}
    taught = replace(taught, members=members, distillation=[DistillationConfig(teacher="teacher", student="large")])
    taught = replace(taught, data=replace(taught.data, tokenizer=None))
    runs = {"alone": small_run("standalone", text, "steps=2", f"data.tokenizer={teacher}"), "taught": taught}
    folders = [
        train(replace(run, seed=seed), tmp_path / f"{name}-{seed}") for name, run in runs.items() for seed in (0, 1)
    ]
    found = page(folders, tmp_path)
    losses = [json.loads((folder / "results.json").read_text())["members"]["large"]["loss"] for folder in folders]
    assert row(found, "taught − alone", "large")[:3] == ["2", *paired_t(losses[2:], losses[:2])]
    assert not any(cells[:2] == ["taught − alone", "teacher"] for cells in rows(found))
    assert row(found, "members.teacher") == ["none", "there"]
    assert row(found, "distillation.0") == ["none", "teacher → large"]
    assert row(found, "taught / teacher")[:2] == ["frozen", "2"]
