"""Sinks get what metrics.jsonl holds, and cannot cost a run. wandb and MLflow are stood in for by modules made here."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from codistill.loading import to_yaml
from codistill.metrics import read_metrics
from codistill.tracking import Tracker, numbers
from codistill.train import Stopped, train
from ranks import on_ranks
from runs import assert_same_run, refused, small_run

LINE = {"step": 3, "seconds": 0.5, "large/hard": 2.5, "spikes": ["large"], "held_out": {"large": {"loss": 2.0}}}


def stand_in(monkeypatch, name: str, **contents) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def fake_wandb(monkeypatch, fails_at: object = None) -> list:
    """A wandb that writes down what it is asked, and raises at a step, at "init" or at "finish"."""
    asked = []

    def note(what, *details):
        if fails_at == what:
            raise ConnectionError("the tracker\nis gone")
        asked.append((what, *details))

    def init(**settings):
        note("init", settings)
        return SimpleNamespace(
            log=lambda values, step: note(step, values), finish=lambda: note("finish"), id=settings["id"]
        )

    stand_in(monkeypatch, "wandb", init=init)
    return asked


def needs(module: str, extra: str) -> None:
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed; pip install 'codistill[{extra}]' brings it")


def test_the_numbers_of_a_line_and_nothing_else_are_sent():
    assert numbers(LINE) == {"seconds": 0.5, "large/hard": 2.5, "large/held_out_loss": 2.0}


def test_a_loss_that_is_no_number_is_not_sent():
    """It stands as null in `metrics.jsonl`, which no tracker takes for a number."""
    lines = [{"step": 3, "a/hard": None, "held_out": {"a": {"loss": None, "accuracy": 0.5}}}]
    assert [numbers(line) for line in lines] == [{"a/held_out_accuracy": 0.5}]


def scalars(out: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_holds_the_numbers_of_the_file(text, tmp_path):
    needs("tensorboard", "track")
    out = train(small_run("ctcd", text, "steps=10", "track=[tensorboard]"), tmp_path / "run")
    lines = [line for line in read_metrics(out / "metrics.jsonl") if "large/hard" in line]
    for name in ("large/hard", "small/from_large", "tokens"):
        assert scalars(out, name) == [(line["step"], pytest.approx(line[name])) for line in lines]
    assert [step for step, _ in scalars(out, "small/held_out_loss")] == [10]


def test_tensorboard_forgets_what_a_resumed_run_does_anew(text, tmp_path):
    needs("tensorboard", "track")
    run = small_run("standalone", text, "track=[tensorboard]")
    for first, steps in ((0, (5, 10, 15)), (10, (15, 20))):
        tracker = Tracker(run, tmp_path, first)
        for step in steps:
            tracker.log({"step": step, "large/hard": first + step})
        tracker.close()
    assert scalars(tmp_path, "large/hard") == [(5, 5), (10, 10), (15, 25), (20, 30)]


def test_trackio_holds_the_numbers_of_the_file(text, tmp_path):
    needs("trackio", "track")
    program = f"""
import json
from pathlib import Path
from codistill.loading import load, read_run
from codistill.train import train
train(load(read_run(Path({str(tmp_path / "run.yaml")!r}))), Path({str(tmp_path / "run")!r}))
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("codistill")
print("LOGS", json.dumps(SQLiteStorage.get_logs("codistill", name)))
"""
    (tmp_path / "run.yaml").write_text(to_yaml(small_run("standalone", text, "steps=10", "track=[trackio]")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    (logged,) = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("LOGS ")]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    without_times = [{key: value for key, value in line.items() if key != "timestamp"} for line in logged]
    assert without_times == [numbers(line) | {"step": line["step"]} for line in lines]


def tracked_on_a_rank(run, out) -> str:
    with redirect_stderr(io.StringIO()):
        train(run, out, device="cpu")
    return ""


def test_only_rank_0_tracks(text, tmp_path):
    needs("tensorboard", "track")
    on_ranks(tracked_on_a_rank, small_run("standalone", text, "steps=5", "track=[tensorboard]"), tmp_path / "run")
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


def test_wandb_goes_on_with_its_run(text, tmp_path, monkeypatch):
    asked = fake_wandb(monkeypatch)
    run = small_run("standalone", text, "track=[wandb]")
    with pytest.raises(Stopped):
        train(run, tmp_path / "run", stop_at=10)
    train(run, tmp_path / "run", resume=True)
    first, second = (settings for what, settings, *_ in (a for a in asked if a[0] == "init"))
    assert first["id"] == second["id"]
    assert first["config"]["steps"] == 20
    assert [what for what, *_ in asked] == ["init", 5, 10, 10, "finish", "init", 15, 20, 20, "finish"]
    assert asked[1][1]["large/hard"] == read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["large/hard"]


def test_mlflow_goes_on_with_its_run(text, tmp_path, monkeypatch):
    asked = []

    def start_run(run_name=None, run_id=None):
        asked.append(("start", run_name or run_id))
        return SimpleNamespace(info=SimpleNamespace(run_id="id-from-the-server"))

    stand_in(
        monkeypatch,
        "mlflow",
        start_run=start_run,
        log_dict=lambda tree, file: asked.append((file, tree["steps"])),
        log_metrics=lambda values, step: asked.append((step, values["seconds"])),
        end_run=lambda: asked.append(("end", None)),
    )
    for first in (0, 3):
        tracker = Tracker(small_run("standalone", text, "track=[mlflow]"), tmp_path, first)
        tracker.log(LINE)
        tracker.close()
    begun = [("start", tmp_path.name), ("run.json", 20), ("end", None)]
    assert asked == begun + 2 * [("start", "id-from-the-server"), (3, 0.5), ("end", None)]


@pytest.mark.parametrize("fails_at", ["init", 10, "finish"])
def test_a_sink_that_raises_costs_one_line_and_neither_the_run_nor_another_sink(
    fails_at, text, tmp_path, monkeypatch, capsys
):
    straight = train(small_run("standalone", text), tmp_path / "straight")
    asked = fake_wandb(monkeypatch, fails_at)
    sent = []
    stand_in(
        monkeypatch,
        "trackio",
        init=lambda **_: SimpleNamespace(log=lambda values, step: sent.append(step), finish=lambda: None),
    )
    out = train(small_run("standalone", text, "track=[wandb, trackio]"), tmp_path / "run")
    assert_same_run(straight, out)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("track: ")]
    assert len(warnings) == 1
    assert warnings[0].startswith("track: wandb failed a")
    assert "(ConnectionError: the tracker is gone); continuing without it" in warnings[0]
    assert [what for what, *_ in asked] == {"init": [], 10: ["init", 5]}.get(fails_at, ["init", 5, 10, 10, 15, 20, 20])
    assert sent == [5, 10, 10, 15, 20, 20]


def test_a_sink_that_is_not_installed_is_refused_before_training(text, tmp_path, monkeypatch):
    for name, extra in (("tensorboard", "track"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, name, None)
        run = small_run("standalone", text, f"track=[{name}]")
        message = rf"^track: {name} is not installed; codistill's extra `{extra}` brings it"
        refused(message, run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_may_be_tracked_from_its_resumption_on(text, tmp_path, monkeypatch):
    with pytest.raises(Stopped):
        train(small_run("standalone", text), tmp_path / "run", stop_at=10)
    asked = fake_wandb(monkeypatch)
    train(small_run("standalone", text, "track=[wandb]"), tmp_path / "run", resume=True)
    assert [what for what, *_ in asked] == ["init", 15, 20, 20, "finish"]
