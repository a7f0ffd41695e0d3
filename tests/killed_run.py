"""A run that kills itself, as `kill -9` would, at a chosen one of its steps, writes, flushes and renames.

    python killed_run.py RUN.yaml FOLDER KILL_AT…

For each KILL_AT a forked child runs or resumes the run in FOLDER and dies at that event (0: it does not die). Prints,
for each child, how many events it saw, the first step it did, and the last.
"""

import os
import pathlib
import shutil
import signal
import sys
from pathlib import Path

from codistill import checkpoint, files
from codistill.cohort import Cohort
from codistill.loading import load, read_run
from codistill.train import train

STEPS: list[int] = []


def main(configuration: str, folder: str, *kill_at: str) -> None:
    for event in map(int, kill_at):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            run_until(event, Path(configuration), Path(folder), write)
        os.close(write)
        status = os.waitpid(child, 0)[1]
        with os.fdopen(read) as pipe:
            report = pipe.read().splitlines()
        print(event, status, report[-1] if report else "0 - -", flush=True)


def run_until(event: int, configuration: Path, folder: Path, report: int) -> None:
    events = 0

    def counted(function):
        def call(*arguments, **keywords):
            nonlocal events
            events += 1
            steps = f"{STEPS[0]} {STEPS[-1]}" if STEPS else "- -"
            os.write(report, f"{events} {steps}\n".encode())
            if events == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return call

    one_step = Cohort.step

    def step(self, number, batches):
        STEPS.append(number)
        return one_step(self, number, batches)

    Cohort.step = counted(step)
    files._flush = counted(files._flush)
    checkpoint.save_file = counted(checkpoint.save_file)
    pathlib.Path.rename = counted(pathlib.Path.rename)
    pathlib.Path.replace = counted(pathlib.Path.replace)
    shutil.rmtree = counted(shutil.rmtree)
    try:
        run = load(read_run(configuration))
        train(run, folder, resume=(folder / "run.yaml").exists(), fresh=False)
    finally:
        os._exit(0 if (folder / "results.json").exists() else 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
