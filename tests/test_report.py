"""What a person reads at the end of a run, and of many."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from codistill.blocks import Heading, Listing, Table, to_html
from codistill.errors import UserError
from codistill.evaluate.run import evaluate
from codistill.loading import to_yaml
from codistill.recipes import find
from codistill.report import draw_curves, results_table, sections, write_report
from codistill.study.arms import keys_of
from codistill.study.cells import Cells
from codistill.study.run import tabulate
from codistill.train import train
from evaluations import QUICK
from runs import small_run
from studies import SCALE, SIZE, STUDY, request


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
    (folder / "run.yaml").write_text(to_yaml(find("ctcd")))


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


# ---- pages of several folders ---------------------------------------------------------------------


ANSWER = """It **helped** a
[little](../other/README.md), 1 < 2 <b>nats</b>.

| who | by |
|---|---:|
| small | 0.1 |

![curves](figure.png)"""


@pytest.fixture(scope="module")
def folders(text, tmp_path_factory) -> dict[str, Path]:
    """A run, a study with made-up cells, and an evaluation with a failed task."""
    place = tmp_path_factory.mktemp("folders")
    run = train(small_run("ctcd", text), place / "pair")
    study = request(place / "toy-study", seeds=2)
    cells = Cells(study.out)
    for arm in study.arms:
        cells.put(keys_of(study.arms)[arm.place], made_up_cell(arm))
    tabulate(study)
    (study.out / "README.md").write_text("# Toy\n\n## Answer\n\n" + ANSWER + "\n\n## More\n\nNo.\n")
    evaluate([str(run)], ["mlm,nothing"], place / "scores", text=[str(text)], protocol=QUICK)
    return {"run": run, "study": study.out, "evaluation": place / "scores"}


@pytest.fixture
def known_study(monkeypatch):
    monkeypatch.setattr(sections, "STUDIES", {"toy": STUDY})
    monkeypatch.setattr(sections, "SCALES", {"toy": SCALE})


TEXT = {"train": "0123456789abcdef" * 4, "validation": "fedcba9876543210" * 4}


def made_up_cell(arm) -> dict:
    taught = 0.25 if arm.name == "taught" else 0.0
    loss = 5.0 + arm.seed - taught - taught * arm.seed / 5
    member = {
        "loss": loss, "accuracy": 0.1, "parameters": 10, "seconds": 1.0,
        "flops": {"own": 6, "teachers": 2}, "teachers": [], "curve": [[50, 6.0], [100, loss]], "blimp": None,
    }  # fmt: skip
    return {
        "key": "", "arm": arm.name, "regime": arm.regime, "seed": arm.seed, "failed": "", "unigram_loss": 7.0,
        "steps": 1, "tokens": 100, "passes": 0.5, "precision": "float32", "text": TEXT, "agreement": 0.5,
        "machine": {"device": "a machine", "threads": 1}, "versions": {"torch": "2"}, "date": "2026-01-01",
        "members": dict.fromkeys(arm.run.trained, member),
    }  # fmt: skip


class Outside(HTMLParser):
    """Collects whatever a page would have to fetch, and its tables' cells."""

    def __init__(self, page: str):
        super().__init__()
        self.fetched, self.cells, self.open = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "img", "path", "use", "link"):
            self.open.append(tag)
        names = ("src", "href", "xlink:href")
        self.fetched += [v for k, v in attributes if k in names and v and not v.startswith(("#", "data:"))]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th", "p", "h2", "figcaption", "pre"):
            self.cells.append(data)


def test_a_page_needs_nothing_else_and_says_what_the_folders_hold(folders, known_study, tmp_path):
    page, markdown = write_report(list(folders.values()), tmp_path / "pages" / "report.html")
    html = Outside(page.read_text())
    assert html.fetched == []
    results = json.loads((folders["run"] / "results.json").read_text())
    for name, member in results["members"].items():
        assert {name, f"{member['loss']:.3f}", f"{sum(member['flops'].values()):.3g}"} <= set(html.cells)
    assert {"taught − alone", "-0.275", "Study toy", "Run pair"} <= set(html.cells)
    assert any("On the plateau" in cell or "wanted" in cell for cell in html.cells)
    assert any("there is no task 'nothing'" in cell or "nothing" in cell for cell in html.cells)
    assert (folders["run"] / "run.yaml").read_text() in "".join(html.cells)
    text = markdown.read_text()
    for row in ("| taught − alone | 2 | -0.275 |", "# Codistill: what came out"):
        assert row in text
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(pictures) == 3
    assert all((markdown.parent / name).read_text().count("<svg") == 1 for name in pictures)


def test_an_answer_is_on_the_page_as_it_was_written(folders, known_study, tmp_path):
    """Bold and tables stay; links, which would lead nowhere from here, are words; HTML is shown and not taken."""
    page, markdown = write_report([folders["study"]], tmp_path / "report.html")
    html = page.read_text()
    assert "<p>It <strong>helped</strong> a\nlittle, 1 &lt; 2 &lt;b&gt;nats&lt;/b&gt;.</p>" in html
    assert {"who", "by", "small", "0.1"} <= set(Outside(html).cells)
    assert "It **helped** a\nlittle, 1 < 2 <b>nats</b>.\n\n| who | by |\n" in markdown.read_text()
    assert "README.md" not in html + markdown.read_text()
    assert "curves" not in html


@pytest.mark.parametrize(
    ("names", "told"), [(["wiki", "prose"], "prose and wiki"), (None, "its name was not recorded")]
)
def test_a_studys_page_names_the_text_that_was_given_and_no_other(names, told, folders, tmp_path, monkeypatch):
    """A recipe brings a text of its own, which --data has replaced. Earlier versions' cells have no names of theirs."""
    builtin = replace(SIZE.data, train=["builtin:python/train"], validation=["builtin:python/validation"])
    scale = replace(SCALE, masked=replace(SIZE, data=builtin))
    monkeypatch.setattr(sections, "SCALES", {"toy": scale})
    folder = shutil.copytree(folders["study"], tmp_path / "study")
    for file in (folder / "cells").glob("*.json"):
        named = {} if names is None else {"text_names": names}
        file.write_text(json.dumps(json.loads(file.read_text()) | named))
    for page in write_report([folder], tmp_path / "report.html", [STUDY]):
        assert f"Text, as given with --data: {told}; by content: train 0123456789abcdef, validation" in page.read_text()
        assert "tokenizer: train:wordpiece:300" in page.read_text()
        assert "builtin" not in page.read_text()


def test_a_page_is_the_same_each_time(folders, known_study, tmp_path):
    one, other = (write_report([folders["study"]], tmp_path / f"{n}.html")[0].read_bytes() for n in "ab")
    assert one == other


def test_a_page_says_that_an_evaluation_is_of_its_last_call(folders, text, tmp_path):
    scores, small = shutil.copytree(folders["evaluation"], tmp_path / "scores"), folders["run"] / "members" / "small"
    evaluate([str(small)], ["mlm"], scores, text=[str(text)], protocol=QUICK)
    said = [
        [cell for cell in Outside(page.read_text()).cells if cell.startswith("Of the last call")]
        for page, _ in (write_report([place], tmp_path / "page.html") for place in (folders["evaluation"], scores))
    ]
    assert said == [[], ["Of the last call; 1 more cells of earlier calls are kept there."]]


def test_a_study_of_ones_own_is_read_where_its_file_is_given(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(sections, "SCALES", {"toy": SCALE})
    page, _ = write_report([folders["study"]], tmp_path / "report.html", [STUDY])
    assert {"taught − alone", "-0.275", "Study toy"} <= set(Outside(page.read_text()).cells)
    fewer = replace(STUDY, arms=lambda scale, seed: STUDY.arms(scale, seed)[:3])
    with pytest.raises(UserError, match=r"other arms than the study 'toy' has now \(8 are no multiple of 3\)"):
        write_report([folders["study"]], tmp_path / "report.html", [fewer])
    with pytest.raises(UserError, match="two of the files hold a study of one name, 'toy'; give one"):
        write_report([folders["study"]], tmp_path / "report.html", [STUDY, fewer])


def test_what_is_no_result_is_one_line(folders, tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"no results\.json that can be read; give folders of finished runs, studies or"
    ):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(UserError, match="a study at 'toy', a scale that this version does not have"):
        write_report([folders["study"]], tmp_path / "report.html")
    monkeypatch.setattr(sections, "SCALES", {"toy": SCALE})
    with pytest.raises(UserError, match=r"no study of this version is called 'toy'; if it is your own, give its --st"):
        write_report([folders["study"]], tmp_path / "report.html")
    for number, wrong in enumerate(("[]", '{"study": "ctcd"}', '{"members": {}}', "{}", '{"comparisons": null}')):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "results.json").write_text(wrong)
        with pytest.raises(UserError, match=r"results\.json"):
            write_report([tmp_path / str(number)], tmp_path / "report.html")
    with pytest.raises(UserError, match=r"the page is HTML; give a name that ends in \.html"):
        write_report([folders["run"]], tmp_path / "report.pdf")


def test_markup_in_names_is_only_text():
    page = to_html([Heading("a<b"), Table(["<i>"], [["&"]]), Listing("x", "<script>")], "t<t")
    assert "<script>" not in page
    assert all(part in page for part in ("a&lt;b", "&lt;i&gt;", "&amp;", "&lt;script&gt;", "<title>t&lt;t</title>"))
