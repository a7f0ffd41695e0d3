"""The command line: what it prints, its exit status, and that it answers without importing torch."""

import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

import codistill
from codistill.cli import main
from codistill.cli.run import again
from codistill.files import locked
from codistill.loading import load, parse_yaml, to_yaml
from codistill.recipes import RECIPES, find

ROOT = Path(__file__).parents[1]


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code


def test_show_prints_what_train_accepts(capsys):
    main(["show", "ctcd:small", "--set", "seed=3"])
    assert load(parse_yaml(capsys.readouterr().out, "test")).seed == 3


def test_a_locale_without_the_characters_of_a_table_ends_no_command(monkeypatch):
    written = BytesIO()
    monkeypatch.setattr("sys.stdout", TextIOWrapper(written, encoding="latin-1"))
    main(["recipes"])
    main(["show", "ctcd", "--set", "data.train=[/tmp/é.txt]"])
    sys.stdout.flush()
    assert "[/tmp/é.txt]" in written.getvalue().decode("utf-8")


def test_recipes_are_listed_with_a_line_each(capsys):
    main(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(RECIPES)]] == list(RECIPES)
    assert all(len(line) < 140 and line.rstrip()[-1] in ".?):" for line in lines[: len(RECIPES)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "cctd"], "there is no recipe or file 'cctd' (did you mean ctcd?)"),
        (["train", "ctcd", "--set", "step=3"], "step: there is no such setting (did you mean steps?)"),
        (["train", "ctcd", "--set", "steps"], "--set steps: write KEY=VALUE without a space, as in --set steps=100"),
        (["train", "ctcd", "--set", "steps", "4"], "--set steps: write KEY=VALUE without a space, as in"),
        (["train", "--set", "steps", "4"], "--set steps: write KEY=VALUE without a space, as in"),
        (["evaluate", ".", "--tasks", "mlm", "--out", "x", "--set", "epochs", "5"], "--set epochs: write KEY=VALUE"),
        (["train", "ctcd", "--resume", "--fresh"], "--resume and --fresh exclude each other"),
        (["train", "dwt"], "make it with `codistill train standalone:tiny --set"),
        (["train", "none.yaml"], "none.yaml cannot be read as a configuration"),
        (["train", "ctcd", "--sett", "a=1"], "Unknown option: --sett"),
        (["remap", ".", "--to", ".", "--out", "x", "--depth", "0,a"], "--depth 0,a: give a method"),
        (["bench", "step", "--device", "gpu"], "device: 'gpu' is not here"),
        (["bench", "latency", "."], "no model and no finished run"),
        (["generate", ".", "b", "--member", "a", "--tokens", "0"], "--tokens 0: at least one is needed"),
        (["study", "ctcd", "--out", "x", "--plan", "--data", "nowhere"], "--data nowhere: there is no such folder"),
        (["evaluate", ".", "--tasks", "blimp", "--out", "x", "--limit", "0"], "--limit 0: at least one pair is needed"),
        (
            ["prepare", "builtin:python", "--tokenizer", "train:wordpiece:300", "--out", "x", "--processes", "0"],
            "es 0:",
        ),
        (["trian", "ctcd"], 'Unknown command "trian"'),
        (["train"], "requires an argument"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(arguments, message, capsys):
    assert status(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize("message", ["[enforce fail] ... can't allocate memory: you tried to allocate 9 bytes", ""])
def test_want_of_memory_is_one_line_and_status_1(message, monkeypatch, capsys):
    error = RuntimeError(message) if message else MemoryError()

    def fail(*_):
        raise error

    monkeypatch.setattr("codistill.cli.run.resolve", fail)
    assert status("show", "ctcd") == 1
    assert "out of memory" in (shown := capsys.readouterr().err)
    assert "batch.accumulate" in shown
    error = RuntimeError("of another kind")
    with pytest.raises(RuntimeError, match="of another kind"):
        main(["show", "ctcd"])


def test_a_failure_of_the_compiler_is_one_line_and_status_1(monkeypatch, capsys):
    from torch._dynamo.exc import TorchDynamoException

    def fail(*_):
        raise TorchDynamoException("KeyError: 'buf10'\n\nSet TORCHDYNAMO_VERBOSE=1 for more")

    monkeypatch.setattr("codistill.cli.run.resolve", fail)
    assert status("show", "ctcd") == 1
    assert capsys.readouterr().err == "codistill: PyTorch's compiler failed: KeyError: 'buf10'; set compile: false\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["recipes"], ["show", "ctcd"], ["train", "--help"], ["train", "ctcd", "--set", "x=1"]]
)
def test_answers_that_need_no_torch_import_none(arguments):
    program = (
        "import sys; from codistill.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, env={"PYTHONPATH": str(ROOT / "src")}
    )


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "codistill", "train", "ctcd", "--set", "nosuch=1"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT / "src")})
    assert done.returncode == 2
    assert done.stderr.startswith("codistill: ")
    assert "nosuch" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "data.train=[nothere.txt]"], "source nothere.txt: no such file, folder or glob"),
        (["--set", "data.validation=[nothere.txt]"], "source nothere.txt: no such file, folder or glob"),
        (["--set", "data.train=[]"], "data.train: no text is named"),
        (["--set", "data.validation=[]"], "data.validation: no text is named"),
        (["--out", "a-file"], "a-file exists and is no run folder"),
        (["--out", "foreign"], "foreign exists and is no run folder"),
        (["--out", "foreign", "--resume"], "foreign exists and is no run folder"),
        (["--out", "begun"], "begun holds an unfinished run"),
        (["--out", "begun", "--resume"], "begun: another process trains there"),
    ],
)
def test_what_can_be_refused_without_torch_is(arguments, message, tmp_path):
    (tmp_path / "a-file").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.yaml").write_text(to_yaml(find("quickstart")))
    program = (
        "import sys; from codistill.cli import main\n"
        f"try: main(['train', 'quickstart', *{arguments!r}])\nexcept SystemExit as end: assert end.code == 2\n"
        "assert not {'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules), sorted(sys.modules)"
    )
    with locked(tmp_path / "begun" / ".lock"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            check=True, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT / "src")},
        )  # fmt: skip
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_help_of_bench_names_every_provider():
    """It has a list of its own, because the benchmarks' import torch."""
    from codistill.bench import providers, step
    from codistill.cli.bench import LOSS_PROVIDERS, STEP_PROVIDERS

    assert tuple(providers.PROVIDERS) == LOSS_PROVIDERS
    assert tuple(step.PROVIDERS) == STEP_PROVIDERS
    for command, name in (("loss", '"quack, hard only"'), ("step", '"ours, one by one"')):
        page = (ROOT / "docs" / "cli.md").read_text().split(f"## codistill bench {command}")[1].split("## ")[0]
        assert name in " ".join(page.replace("│", " ").split())


def test_the_generated_help_is_current():
    subprocess.run([sys.executable, str(ROOT / "docs" / "generate_cli.py"), "--check"], check=True)


def test_the_readmes_python_runs(capsys):
    block = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(block, {})
    assert capsys.readouterr().out.count("large/from_small") == 3


def test_the_public_names_are_what_they_say():
    assert set(codistill.__all__) == set(codistill._HOME)
    for name in codistill.__all__:
        assert getattr(codistill, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        codistill.Trainer  # noqa: B018


def test_every_recipe_in_the_concepts_exists():
    text = (ROOT / "docs" / "concepts.md").read_text()
    named = {cell for line in text.splitlines() if line.startswith("|") for cell in line.split("`")[1::2]}
    assert set(RECIPES) - {"quickstart"} <= named
    assert find("quickstart").recipe == "quickstart:tiny"


@pytest.mark.parametrize(
    ("here", "everywhere", "said"),
    [
        (None, None, "codistill train runs/a/run.yaml --resume"),
        (None, "1", "codistill train runs/a/run.yaml --resume"),
        ("2", "2", "torchrun --nproc-per-node=2 --no-python codistill train runs/a/run.yaml --resume"),
        ("8", "32", "on every node, as it was started by torchrun: codistill train runs/a/run.yaml --resume"),
    ],
)
def test_the_command_to_go_on_with_is_for_as_many_processes(here, everywhere, said, monkeypatch):
    for name, value in (("LOCAL_WORLD_SIZE", here), ("WORLD_SIZE", everywhere)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert again(Path("runs/a"), None) == said
