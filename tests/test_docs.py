"""The documentation is true as far as a machine can tell: links lead somewhere, commands and settings exist."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
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


# ---- the page of settings, by what the loader says and takes ------------------------------------

SETTINGS = dict(
    re.findall(r"^\| `([\w.]+)` \|.*\| (\S.*|) \|$", (ROOT / "docs" / "settings.md").read_text(), flags=re.M)
)
PARTS = (
    *("", "objective", "data", "members.NAME", "members.NAME.model", "members.NAME.init", "distillation.N"),
    *("distillation.N.layers", "batch", "checkpoint", "evaluate", "stop_early", "log"),
)


def named_by_the_loader(part: str) -> list[str]:
    """The settings that the refusal of an unknown one lists."""
    path = f"{part}.unknown".lstrip(".").replace("NAME", "large").replace("N.", "0.")
    with pytest.raises(UserError, match="there is no such setting") as refusal:
        load(override(to_dict(find("ctcd")), [f"{path}=1"]))
    return str(refusal.value).rpartition("there are ")[2].split(", ")


@pytest.mark.parametrize("part", PARTS)
def test_every_setting_of_a_part_is_on_the_page(part):
    listed = [name for name in SETTINGS if name.rpartition(".")[0] == part]
    assert [name.rpartition(".")[2] for name in listed] == named_by_the_loader(part)
    assert {name.rpartition(".")[0] for name in SETTINGS} == set(PARTS)


def test_the_defaults_on_the_page_are_those_of_a_run_that_does_not_say():
    tree = {"members": {"a": {"model": {}}, "b": {"path": "p", "frozen": True}}, "stop_early": {}}
    tree["members"]["a"]["init"] = {"from": "source"}
    tree["distillation"] = [{"teacher": "b", "student": "a"}]
    run = load(tree)
    parts = {"": run, "members.NAME": run.members["b"], "members.NAME.model": run.members["a"].model}
    parts |= {"members.NAME.init": run.members["a"].init, "distillation.N": run.distillation[0]}
    given = {"members", "members.NAME.path", "members.NAME.frozen", "distillation", "stop_early"}
    compared = 0
    for name, default in SETTINGS.items():
        part, _, last = name.rpartition(".")
        if default and default != "required" and name not in given:
            owner = parts.get(part) or getattr(run, part)
            assert getattr(owner, last) == yaml.safe_load(default.strip("`")), name
            compared += 1
    assert compared > 50


def test_the_page_of_settings_tells_of_every_one():
    """A setting without settings of its own stands in the words above its table."""
    page = (ROOT / "docs" / "settings.md").read_text()
    for section in page.split("\n## ")[1:]:
        words, table = section.split("| setting |")
        for name, takes in re.findall(r"^\| `([\w.]+)` \| (.*?) \|", table, flags=re.M):
            assert takes.startswith("[`") or f"`{name.rpartition('.')[2]}`" in words, name
