"""The built site: it builds strictly, leads nowhere dead, shows every command's help; and its commands run."""

import html
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

import codistill
from codistill.cli import app
from test_docs import PAGES, ROOT, commands

MISSING = [name for name in ("mkdocs", "material", "mkdocstrings_handlers") if find_spec(name) is None]
needs_mkdocs = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING}: pip install 'codistill[docs]' brings them")


class Page(HTMLParser):
    """Where a page leads, and the names that can be led to in it."""

    def __init__(self, text: str):
        super().__init__()
        self.targets: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.targets += [values[key] for key in ("href", "src") if values.get(key)]
        self.names |= {values[key] for key in ("id", "name") if values.get(key)}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert not done.returncode, done.stderr
    return out


@needs_mkdocs
def test_the_built_site_has_no_dead_link(site):
    pages = {file: Page(file.read_text()) for file in site.rglob("*.html")}
    assert len(pages) > 18
    for file, page in pages.items():
        if file.name == "404.html":
            continue  # its links begin at the root of whatever host serves it
        for target in page.targets:
            link = urlparse(target)
            if link.scheme in ("http", "https", "mailto", "data"):
                continue
            place = (file.parent / unquote(link.path)).resolve() if link.path else file
            assert place.exists(), f"{file.relative_to(site)} leads to {target}"
            if link.fragment and place in pages and not link.fragment.startswith("__"):
                assert unquote(link.fragment) in pages[place].names, f"{file.relative_to(site)} leads to {target}"


@needs_mkdocs
def test_nothing_is_fetched_from_elsewhere_to_show_a_page(site):
    for file in site.rglob("*.html"):
        fetched = re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=\"?(https?://[^\">\s]+)", file.read_text())
        assert not fetched, f"{file.relative_to(site)} fetches {fetched}"


@needs_mkdocs
def test_every_page_is_in_the_site(site):
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").exists()
    assert not list(site.rglob("*.py"))


def every_command(group=app, *above: str) -> list[tuple[str, ...]]:
    names = [name for name in group if not name.startswith("-")]
    return [c for name in names for c in ((*above, name), *every_command(group[name], *above, name))]


@needs_mkdocs
def test_every_commands_help_is_in_the_built_site(site):
    text = html.unescape(re.sub(r"<[^>]+>", "", (site / "cli.html").read_text()))
    assert len(every_command()) >= 9
    for words in ((), *every_command()):
        assert re.search(rf"Usage: {' '.join(('codistill', *words))}\s", text), words
    for line in (ROOT / "docs" / "cli.md").read_text().splitlines():
        if line.startswith("│"):
            assert line in text


@needs_mkdocs
def test_every_public_name_is_in_the_built_site_with_its_docstring(site):
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", (site / "reference.html").read_text())).split())
    for name in codistill.__all__:
        module, attribute = codistill._HOME[name]
        found = getattr(import_module(f"codistill.{module}"), attribute)
        first = " ".join(found.__doc__.split("\n\n")[0].replace("`", "").split())
        assert first[:60] in text, name


def test_one_table_of_promises_names_a_test_in_every_row():
    text = (ROOT / "docs" / "promises.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 40
    for row in rows:
        tests = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", row.rsplit("|", 2)[1])
        assert tests, row
        for file, test in tests:
            assert (ROOT / "tests" / file).exists(), row
            assert not test or f"def {test}(" in (ROOT / "tests" / file).read_text(), row


# ---- every command runs, as a new user would type it -------------------------------------------

# What stands in the pages, and a smaller thing of the same kind to run in its place.
SMALLER = {
    "layers: 12, width: 768": "layers: 2, width: 32",
    "layers: 6, width: 768": "layers: 1, width: 32, heads: 2",
    "members.large.model.layers=6": "members.large.model.layers=2",
    "members.small.model.layers=2": "members.small.model.layers=1",
    "20000": "3",
}
TINY_RUN = "steps=4 batch={sequences: 4} evaluate={every: 2, sequences: 8} log.every=2 data.length=16 precision=float32"
USER_PAGES = [page for page in PAGES if page.parent.name == "howto" or page.name in ("first-run.md", "export.md")]


@pytest.fixture
def desk(tmp_path, text, monkeypatch) -> Path:
    """The folder of somebody who has text, an old small BERT, and a bigger one."""
    from codistill.loading import load
    from codistill.train import train

    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(text.read_text())
    (tmp_path / "held-out.txt").write_text(text.read_text()[:3000])
    monkeypatch.chdir(tmp_path)
    for name, layers in (("old-small", 1), ("big", 2)):
        run = {
            "members": {name: {"model": {"family": "bert", "layers": layers, "width": 32, "heads": 2}}},
            "data": {"train": ["corpus"], "validation": ["corpus"], "tokenizer": "train:wordpiece:200", "length": 16},
            "steps": 2,
            "batch": {"sequences": 4},
            "evaluate": {"sequences": 4},
        }
        (train(load(run), tmp_path / "made" / name) / "members" / name).rename(tmp_path / name)
    bigger = (tmp_path / "big" / "config.json").read_text()
    (tmp_path / "bigger").mkdir()
    (tmp_path / "bigger" / "config.json").write_text(bigger)
    return tmp_path


def shortened(words: list[str]) -> list[str]:
    """A command of the pages on a small scale: its own settings last, unless they set the scale."""
    for large, small in SMALLER.items():
        words = [word.replace(large, small) for word in words]
    if "--against" in words:  # the training itself is the other studies' tests' to run
        return ["study", words[1], "--plan", "--out", "mine", "--against", str(ROOT / words[-1])]
    if words[0] == "lr":
        return [*words[:-1], "3", *(part for setting in scale() for part in ("--set", setting))]
    if words[0] == "train" and not words[1].endswith("run.yaml"):
        kept = [at for at, word in enumerate(words) if not word.startswith("steps=")]
        words = [words[at] for at in kept if not (words[at] == "--set" and words[at + 1].startswith("steps="))]
        return [*words[:2], *(part for setting in scale() for part in ("--set", setting)), *words[2:]]
    return words


def scale() -> list[str]:
    return re.findall(r"\S+=(?:\{[^}]*\}|\S+)", TINY_RUN)


@pytest.mark.slow
@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: page.stem)
def test_a_pages_commands_run(page, desk, monkeypatch):
    """In the order in which they stand there, those of the first run before them where a page starts from that."""
    first = [["train", "quickstart", "--out", "runs/first"]] if page.stem in ("export", "rerun") else []
    if page.stem == "export" and find_spec("onnxruntime") is None:
        pytest.skip("onnxruntime is not installed; pip install 'codistill[onnx]' brings it")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    for words in [*first, *commands(page)]:
        program = "from codistill.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", program, *shortened(words)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert not done.returncode, f"codistill {shlex.join(words)}: {done.stderr}"
