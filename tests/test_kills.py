"""`kill -9` at any moment, inside a save too: the run resumes and ends with the bits of an undisturbed one."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from codistill.loading import to_yaml
from runs import assert_same_run, small_run

EVERY, STEPS = 3, 11


def children(configuration: Path, folder: Path, *kill_at: int) -> list[list[str]]:
    """(event, status, events seen, first step, last step) of every child, as `killed_run.py` prints them."""
    script = Path(__file__).with_name("killed_run.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(configuration), str(folder), *map(str, kill_at)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=280)
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
