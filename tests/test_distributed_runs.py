"""Whole runs on two ranks: exact resumption, other world sizes and engines, signals, deaths, bad input."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from codistill.build import build
from codistill.config import Run
from codistill.distributed import start
from codistill.errors import FailedElsewhere, UserError
from codistill.loading import load, read_run, to_yaml
from codistill.train import Stopped, score_members, train
from ranks import on_ranks
from runs import assert_same_run, small_run, with_teachers

ENGINES = ["ddp", "fsdp2"]


def parts(run: Run, out: Path, engine: str, stops: list[int | None], resume: bool = False) -> dict[str, str]:
    """Trains on this rank, with a stop and a resumption for each of `stops`; what it said, and what went wrong."""
    said = io.StringIO()
    for number, stop in enumerate(stops):
        try:
            with redirect_stderr(said):
                settled = replace(run, distributed=engine)
                train(settled, out, resume=resume or number > 0, device="cpu", stop_at=stop)
        except Stopped:
            continue
        except (UserError, FailedElsewhere) as error:
            return {"error": f"{type(error).__name__}: {error}", "said": said.getvalue()}
    return {"error": "", "said": said.getvalue()}


def both_ranks(run: Run, out: Path, engine: str, stops: list[int | None], resume: bool = False) -> str:
    """What rank 0 said, but for the warning that these runs are scored on what they are trained on."""
    main, other = on_ranks(parts, run, out, engine, stops, resume)
    assert (main["error"], other["error"], other["said"]) == ("", "", "")
    return "".join(line for line in main["said"].splitlines(True) if not line.startswith("data.validation: "))


@pytest.mark.parametrize(
    ("recipe", "stop"),
    [("ctcd", 7), ("ctcd-clm", 7)]
    + [
        pytest.param(recipe, stop, marks=pytest.mark.slow)
        for recipe in ("standalone", "dwt", "ctcd", "community")
        for stop in (7, 16, 17)  # an epoch is 129 rows, 16.1 steps: in its middle, at its end, just after
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_is_the_straight_run_bit_for_bit(engine, recipe, stop, text, teacher, tmp_path):
    run = with_teachers(recipe, text, teacher)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert both_ranks(run, straight, engine, [None]) == f"{straight}: 2 processes, {engine}\n"
    begun = f"{resumed}: 2 processes, {engine}\n"
    assert both_ranks(run, resumed, engine, [stop, None]) == 2 * begun + f"{resumed}: resuming from step {stop}\n"
    assert_same_run(straight, resumed)
    distribution = load(read_run(resumed / "run.yaml")).provenance["distribution"]
    assert distribution == [{"from_step": 0, "engine": engine, "ranks": 2}]


def losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "/hard" in k or "/from" in k} for line in lines]


def test_a_run_goes_on_with_other_engines_and_world_sizes(text, tmp_path, capfd):
    still = [f"members.{name}.model.dropout=0" for name in ("large", "small")]
    run = small_run("ctcd", text, *still, "log.every=1", "precision=float32")
    straight = train(run, tmp_path / "straight", device="cpu")
    out = tmp_path / "moved"
    with pytest.raises(Stopped):
        train(run, out, device="cpu", stop_at=4)
    assert "was computed as" not in capfd.readouterr().err
    said = both_ranks(run, out, "ddp", [8], resume=True)
    assert (
        f"{out}: was computed as 1 x single, and is as 2 x ddp from step 4 on: samples, masks and their order" in said
    )
    assert "as 2 x ddp, and is as 2 x fsdp2 from step 8 on" in both_ranks(run, out, "fsdp2", [12], resume=True)
    assert "as 2 x fsdp2, and is as 2 x ddp from step 12 on" in both_ranks(run, out, "ddp", [16], resume=True)
    train(run, out, resume=True, device="cpu")
    assert "as 2 x ddp, and is as 1 x single from step 16 on" in capfd.readouterr().err
    for line, expected in zip(losses(out), losses(straight), strict=True):
        assert line == pytest.approx(expected, rel=1e-5)
    distribution = load(read_run(out / "run.yaml")).provenance["distribution"]
    assert [(p["from_step"], p["engine"], p["ranks"]) for p in distribution] == [
        (0, "single", 1),
        (4, "ddp", 2),
        (8, "fsdp2", 2),
        (12, "ddp", 2),
        (16, "single", 1),
    ]


def scores(run: Run, engine: str, seed: int) -> dict:
    """Of freshly built members, and the rows of the first steps' batches."""
    ranks = start(engine, "cpu")
    built = build(replace(run, seed=seed), ranks.device, ranks)
    shares = [built.batches.at(step, rank=ranks.rank, world=ranks.world) for step in range(20)]
    rows = [[list(batch.sample_ids) for batch in share] for share in shares]
    inputs = [[batch.inputs["input_ids"] for batch in share] for share in shares]
    return {"scores": {name: list(s) for name, s in score_members(built, run).items()}, "rows": rows, "inputs": inputs}


def test_scores_samples_and_masks_do_not_depend_on_the_ranks(text, tmp_path):
    """150 held-out sequences are three batches: two for the one rank, one for the other."""
    run = small_run("ctcd", text, "evaluate.sequences=150", "precision=float32")
    alone = scores(run, "single", 0)
    assert len(build(run, torch.device("cpu")).held_out) == 3
    for engine in ENGINES:
        one, other = on_ranks(scores, run, engine, 0)
        assert alone["scores"] == one["scores"] == other["scores"]
        for step in range(20):
            every = zip(alone["rows"][step], one["rows"][step], other["rows"][step], strict=True)
            assert all(whole == first + second for whole, first, second in every)
            every = zip(alone["inputs"][step], one["inputs"][step], other["inputs"][step], strict=True)
            assert all(torch.equal(whole, torch.cat([first, second])) for whole, first, second in every)


def test_what_the_ranks_cannot_do_is_refused_and_said_once(text, tmp_path):
    run = small_run("ctcd", text, "batch.sequences=6")
    main, other = on_ranks(parts, run, tmp_path / "run", "ddp", [None])
    shared = "cannot be shared out evenly to 2 micro-batches on 2 ranks; choose a multiple of 4"
    assert (main["error"], other["error"]) == (f"UserError: batch.sequences: 6 {shared}", "FailedElsewhere: 2")
    assert not (tmp_path / "run").exists()
    main, other = on_ranks(parts, small_run("ctcd", text), tmp_path / "run", "ddp", [None], True)
    assert "holds no run to resume" in main["error"]
    assert other["error"] == "FailedElsewhere: 2"


# ---- under torchrun ----------------------------------------------------------------------------


COMMAND = "from codistill.cli import main\nmain()\n"


def torchrun(folder: Path, arguments: list[str], *options: str, script: str = COMMAND) -> subprocess.Popen:
    """`codistill ARGUMENTS` on two ranks; its output goes to a file, so that nobody holds a pipe open."""
    file = folder / "command.py"
    file.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", *options]
    # Without the last one, processes that torchrun starts anew wait for ever for those it has ended (torch 2.13, gloo).
    settings = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(
            [*command, str(file), *arguments],
            env={**os.environ, **settings},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def workers(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(map(int, children))


def wait_for(what, process: subprocess.Popen, folder: Path) -> None:
    for _ in range(1200):
        if what():
            return
        assert process.poll() is None, (folder / "output.txt").read_text()
        time.sleep(0.1)
    raise AssertionError((folder / "output.txt").read_text())


def ended(process: subprocess.Popen, folder: Path) -> str:
    """What it printed."""
    try:
        process.wait(180)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return (folder / "output.txt").read_text()


THREADS = """
import atexit, os
from pathlib import Path

def threads():
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    print("left at the end:", [name for name in names if "gloo" in name])

atexit.register(threads)  # before codistill's own, so it runs after that
from codistill.cli import main
main()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the names of threads are read from /proc")
@pytest.mark.parametrize("engine", ENGINES)
def test_no_thread_of_gloo_outlives_the_run(engine, text, tmp_path):
    """One that lets go of a tensor while Python ends aborts a run that was done."""
    (tmp_path / "run.yaml").write_text(to_yaml(small_run("ctcd", text, "steps=2", f"distributed={engine}")))
    arguments = ["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    process = torchrun(tmp_path, arguments, script=THREADS)
    output = ended(process, tmp_path)
    assert process.returncode == 0, output
    if engine == "fsdp2" and torch.__version__ < "2.13":  # compares versions, not words
        pytest.skip("PyTorch before 2.13 holds FSDP2's group where Python cannot let go of it")
    assert output.count("left at the end: []") == 2, output


def test_a_loop_of_ones_own_may_end_the_connection(tmp_path):
    """As PyTorch asks for: nothing is said of it as Python ends."""
    script = "from codistill.distributed import start\nimport torch.distributed as dist\n"
    script += "start('ddp', 'cpu')\ndist.destroy_process_group()\n"
    process = torchrun(tmp_path, [], script=script)
    assert "Traceback" not in ended(process, tmp_path)
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_that_is_killed_costs_no_bit(engine, text, tmp_path):
    run = small_run("ctcd", text, "steps=300", "checkpoint.every=20", f"distributed={engine}")
    (tmp_path / "run.yaml").write_text(to_yaml(run))
    assert (
        both_ranks(run, tmp_path / "undisturbed", engine, [None])
        == f"{tmp_path / 'undisturbed'}: 2 processes, {engine}\n"
    )
    arguments = ["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "killed")]
    process = torchrun(tmp_path, arguments, "--max-restarts=1")
    wait_for(lambda: list(tmp_path.glob("killed/checkpoints/step-*")), process, tmp_path)
    os.kill(workers(process)[1], signal.SIGKILL)
    output = ended(process, tmp_path)
    assert process.returncode == 0, output
    assert "torchrun started the processes anew; going on" in output
    assert_same_run(tmp_path / "undisturbed", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_signal_stops_all_ranks_at_the_same_step(engine, text, tmp_path):
    run = small_run("ctcd", text, "steps=100000", "checkpoint.every=100000", f"distributed={engine}")
    (tmp_path / "run.yaml").write_text(to_yaml(run))
    process = torchrun(tmp_path, ["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")])
    wait_for((tmp_path / "run" / "metrics.jsonl").exists, process, tmp_path)
    os.kill(workers(process)[1], signal.SIGTERM)
    output = ended(process, tmp_path)
    assert output.count("to go on: ") == 1
    assert "75" in output
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    stop = int(saved.name[5:])
    # What was saved is what a run has that stops there on purpose: no rank was a step ahead.
    assert both_ranks(run, tmp_path / "again", engine, [stop]) == f"{tmp_path / 'again'}: 2 processes, {engine}\n"
    for file in (saved / "large" / "model.safetensors", saved / "small" / "optimizer.safetensors"):
        again = tmp_path / "again" / "checkpoints" / saved.name / file.relative_to(saved)
        assert file.read_bytes() == again.read_bytes()
