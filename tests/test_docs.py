"""The documentation is true as far as a machine can tell: links lead somewhere, commands and settings exist."""

import re
import shlex
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from codistill.cli import app
from codistill.errors import UserError
from codistill.loading import load, override, to_dict
from codistill.recipes import find

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    for path in re.findall(r"`((?:tests|benchmarks|docs|src)/[\w/.-]+\.\w+)`", page.read_text()):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for file, test in re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", page.read_text()):
        assert (ROOT / "tests" / file).exists(), f"{page.name} names {file}"
        assert not test or f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{page.name} names {test}"


def commands(page: Path) -> list[list[str]]:
    """What stands after `codistill` in the page's shell blocks and indented commands, line continuations joined.

    Commands that torchrun starts are among them.
    """
    text = page.read_text().replace("\\\n", " ")
    fenced = "\n".join(re.findall(r"^```(?:sh|bash|shell)\n(.*?)^```", text, flags=re.M | re.S))
    typed = r"^(?:\w+=\S+ )*(?:torchrun .*)?codistill +([a-z].+)$"
    lines = re.findall(typed, fenced, flags=re.M) + re.findall(r"^ {4}codistill +(.+)$", text, flags=re.M)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_settings_exist(page):
    for name, *arguments in commands(page):
        if name.startswith(("-", "COMMAND")):
            continue
        assert name in app, f"{page.name}: codistill {name}"
        try:  # as the command line reads it: unknown options, missing ones, values of the wrong kind
            app.parse_args([name, *arguments], exit_on_error=False, print_error=False)
        except CycloptsError as error:
            pytest.fail(f"{page.name}: codistill {name} {' '.join(arguments)}: {error}")
        if name in ("train", "show", "lr") and arguments and arguments[0].split(":")[0].isidentifier():
            settings = [arguments[i + 1] for i, argument in enumerate(arguments) if argument == "--set"]
            try:
                load(override(to_dict(find(arguments[0])), settings))
            except UserError as error:
                pytest.fail(f"{page.name}: codistill {name} {' '.join(arguments)}: {error}")
