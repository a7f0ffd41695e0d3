"""What a person reads at the end of a run."""

import json

from rich.console import Console

from codistill.report import draw_curves, results_table


def finished(folder) -> None:
    member = {"perplexity": 20.1, "accuracy": 0.25, "parameters": 1_100_000, "frozen": False, "twin_of": None}
    members = {
        "large": {**member, "loss": 3.25, "taught_by": ["small"]},
        "small": {**member, "loss": 3.5, "taught_by": ["large"], "twin_of": "small-alone"},
        "large-alone": {**member, "loss": 3.0, "taught_by": [], "twin_of": "large"},
        "small-alone": {**member, "loss": 3.75, "taught_by": []},
    }
    results = {"members": members, "held_out": {"unigram_loss": 6.5, "rows": 9728}, "steps": 2, "tokens": 64}
    (folder / "results.json").write_text(json.dumps({**results, "seconds": 1.0}))
    lines = [{"step": step, "held_out": {n: {"loss": 5.0 / step} for n in members}} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_the_table_shows_what_the_teaching_made_of_each_member(tmp_path):
    finished(tmp_path)
    console = Console(width=80, record=True)
    console.print(results_table(tmp_path))
    rows = {line.split()[0]: line.split()[-1] for line in console.export_text().splitlines() if line.strip()}
    assert (rows["large"], rows["small"]) == ("+0.250", "-0.250")
    assert (rows["large-alone"], rows["small-alone"]) == ("25.0%", "25.0%")


def test_numbers_are_whole_however_long_the_names(tmp_path):
    finished(tmp_path)
    text = (tmp_path / "results.json").read_text().replace("small-alone", "a-member-with-a-very-long-name-indeed")
    (tmp_path / "results.json").write_text(text)
    console = Console(width=80, record=True)
    console.print(results_table(tmp_path))
    lines = console.export_text()
    assert all(number in lines for number in ("3.250", "3.500", "3.000", "3.750", "+0.250", "-0.250", "1.10 M"))


def test_the_picture_is_drawn(tmp_path):
    finished(tmp_path)
    assert draw_curves(tmp_path).read_bytes().startswith(b"\x89PNG")
