"""Every example runs, is short, and stands word for word in docs/python.md."""

import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"inside_lightning": "lightning", "inside_accelerate": "accelerate"}


@pytest.mark.filterwarnings("ignore")  # Lightning has advice about workers and loggers
@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_it_runs(file, tmp_path, monkeypatch):
    package = NEEDS.get(file.stem)
    if package is not None and find_spec(package) is None:
        pytest.skip(f"{package} is not installed, and no dependency of ours")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(file.parent))
    try:
        runpy.run_path(str(file), run_name="__main__")
    finally:
        sys.modules.pop("material", None)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_it_is_short(file):
    assert file.read_text().count("\n") < 30


def test_the_pages_show_the_examples_as_they_are():
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("python.md", "studies.md"))
    shown = re.findall(r"^```python\n(.*?)^```", pages, flags=re.M | re.S)
    sources = {file.read_text() for file in EXAMPLES}
    assert set(shown) == sources
