"""`kill -9` at any moment, inside a save too: the run resumes and ends with the bits of an undisturbed one. A study
that is killed takes its workers with it."""

import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from codistill.files import is_locked
from codistill.loading import to_yaml
from runs import assert_same_run, small_run
from studies import data_folder

EVERY, STEPS = 3, 11


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def children(configuration: Path, folder: Path, *kill_at: int) -> list[list[str]]:
    """(event, status, events seen, first step, last step) of every child, as `killed_run.py` prints them."""
    script = Path(__file__).with_name("killed_run.py")
    command = [sys.executable, str(script), str(configuration), str(folder), *map(str, kill_at)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True, timeout=280)
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(kills, text, tmp_path):
    run = small_run("ctcd", text, f"steps={STEPS}", f"checkpoint.every={EVERY}", "log.every=1", "evaluate.every=4")
    configuration = tmp_path / "killed.yaml"
    configuration.write_text(to_yaml(run))
    [[_, status, events, first, last]] = children(configuration, tmp_path / "straight", 0)
    assert (status, first, last) == ("0", "0", str(STEPS - 1))
    draw = random.Random(kills)
    for number in range(0, kills, 5):
        # Every child but the first resumes what the one before it left, so late events are reached too.
        moments = [draw.randint(1, int(events)) for _ in range(min(5, kills - number))]
        folder = tmp_path / f"killed-{number}"
        reached = -1
        born = children(configuration, folder, *moments, 0)
        for _, _, _, first, last in born:
            if first != "-":
                # At most the steps since the last checkpoint are done again: one may still have been on its way.
                assert int(first) > reached - 2 * EVERY
                reached = int(last)
        assert born[-1][1] == "0"
        assert_same_run(tmp_path / "straight", folder)


LONG_STUDY = textwrap.dedent("""
    import sys
    from dataclasses import replace
    from pathlib import Path

    from codistill.config import Checkpointing, Evaluation, Logging
    from codistill.study.run import run_study
    from studies import SIZE, STUDY, arms, request

    often, never = Logging(every=1), 10**9
    size = replace(SIZE, steps=2000, log=often, checkpoint=Checkpointing(every=never), evaluate=Evaluation(every=never))
    study = replace(STUDY, arms=lambda scale, seed: arms(replace(scale, masked=size), seed)[:1])
    run_study(request(Path(sys.argv[2]), study), data=Path(sys.argv[1]), jobs=1)
""")


def test_a_study_that_is_killed_leaves_no_worker_at_work_and_what_it_did_is_saved(text, tmp_path):
    """No checkpoint is due before the end, so the one that is there was saved because the study was gone."""
    data, out = data_folder(tmp_path / "data", text), tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", LONG_STUDY, str(data), str(out)], env=environment()) as study:
        while not any(file.stat().st_size for file in out.glob("work/*/metrics.jsonl")):
            assert study.poll() is None
            time.sleep(0.1)
        study.kill()
    (work,) = [file.parent for file in out.glob("work/*/run.yaml")]
    while is_locked(work.with_suffix(".lock")):
        time.sleep(0.1)
    (saved,) = (work / "checkpoints").glob("step-*")
    assert 0 < int(saved.name.removeprefix("step-")) < 2000
    assert not (work / "results.json").exists()
