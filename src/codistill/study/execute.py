"""Runs what of a study is not known yet: cohort by cohort, in processes of their own, resumable at any moment."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codistill.config import Data
from codistill.errors import STOPPED, MachineError, UserError
from codistill.files import machine_error, remove_folder, write_file
from codistill.loading import to_yaml
from codistill.metrics import read_metrics
from codistill.progress import Advance, silent
from codistill.study.arms import Arm, grouped, keys_of, member_names, merged, trained_names
from codistill.study.cells import Cell, Cells
from codistill.study.harvest import failed_cell, harvest
from codistill.study.scoring import Scoring, is_scored, with_scores
from codistill.study.statuses import AS_ASKED, NO_MEMORY, NOT_FINITE

_SECONDS_BETWEEN_LOOKS = 1.0


class Stopped(Exception):
    """The study was asked to stop; what was under way is saved, and the same command goes on with it."""


@dataclass(frozen=True)
class Means:
    """What a study is run with. `data`: its text. `jobs`: processes at once. `devices`: their devices, in turn ("cpu",
    "cuda:0", …). `worker`: the command that does the work of a request."""

    data: Data
    scoring: Scoring
    jobs: int
    devices: Sequence[str]
    most_members: int
    worker: Sequence[str] = (sys.executable, "-m", "codistill.study.worker")


@dataclass
class _Work:
    """A cohort that waits or is under way: those `arms` of a `group` that are not known yet."""

    arms: list[Arm]
    group: list[Arm]
    process: subprocess.Popen | None = None
    device: str = ""
    folder: Path = field(default_factory=Path)

    @property
    def units(self) -> int:
        return len(trained_names(self.arms)) * self.arms[0].run.steps


def is_whole(cell: Cell | None, tasks: tuple[str, ...]) -> bool:
    """Whether a cell says all that is wanted of it; one that failed does."""
    return cell is not None and all(is_scored(member, tasks) for member in cell["members"].values())


def missing(arms: Sequence[Arm], cells: Cells, tasks: tuple[str, ...] = ()) -> list[Arm]:
    """The arms without a cell that has scores at `tasks`, and those whose models they need but nobody has kept."""
    keys, by_place = keys_of(arms), {arm.place: arm for arm in arms}
    wanted = {arm.place for arm in arms if not is_whole(cells.get(keys[arm.place]), tasks)}
    stack = list(wanted)
    while stack:
        arm = by_place[stack.pop()]
        for name, role in arm.sources:
            place = (arm.regime, name, arm.seed)
            cell = cells.get(keys[place])
            if place not in wanted and not (cell and cell["failed"]) and cells.model(keys[place], role) is None:
                wanted.add(place)
                stack.append(place)
    return [arm for arm in arms if arm.place in wanted]


def cores() -> int:
    """How many of the machine's cores are this process's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def execute(arms: Sequence[Arm], out: Path, means: Means, advance: Advance = silent) -> list[str]:
    """Brings the cells of `arms` in `out` to completion; returns those that there was no memory for, a line each.

    Raises Stopped, or MachineError when the machine failed.
    """
    execution = _Execution(arms, out, means, advance)
    execution.run()
    return list(execution.too_large.values())


class _Execution:
    def __init__(self, arms: Sequence[Arm], out: Path, means: Means, advance: Advance):
        self.arms, self.out, self.means, self.advance = arms, out, means, advance
        self.cells, self.keys = Cells(out), keys_of(arms)
        todo = {arm.place for arm in missing(arms, self.cells, means.scoring.tasks)}
        groups = grouped(arms, means.most_members)
        left = [_Work([arm for arm in group if arm.place in todo], list(group)) for group in groups]
        self.waiting = [work for work in left if work.arms]
        self.running: list[_Work] = []
        self.too_large: dict[tuple[str, str, int], str] = {}
        self.finished = 0
        self.kept = {
            (place, role) for arm in arms for name, role in arm.sources for place in [(arm.regime, name, arm.seed)]
        }

    def run(self) -> None:
        with _signals() as asked_to_stop:
            try:
                while self.waiting or self.running:
                    if asked_to_stop():
                        raise Stopped
                    self._start()
                    if self.waiting and not self.running:
                        raise MachineError(f"{self.out}: a model that is needed has vanished; start the study again")
                    time.sleep(_SECONDS_BETWEEN_LOOKS)
                    for work in [work for work in self.running if work.process and work.process.poll() is not None]:
                        self.running.remove(work)
                        self._end(work)
                    self._show()
            except OSError as error:
                raise machine_error(error, self.out) from error
            finally:
                self._stop()

    def _start(self) -> None:
        """Fills the free places with work whose teachers are there. Work that falls away, for want of a teacher, may
        be what work before it waits for, which is then looked at again."""
        left = None
        while left != len(self.waiting):
            left = len(self.waiting)
            for work in list(self.waiting):
                if len(self.running) >= self.means.jobs:
                    return
                if self._readiness(work) == "ready":
                    self.waiting.remove(work)
                    self._launch(work)
                    self.running.append(work)

    def _readiness(self, work: _Work) -> str:
        """Whether all that the arms of `work` need is there; arms whose teacher failed fail here."""
        for arm in list(work.arms):
            for name, role in arm.sources:
                key = self.keys[arm.regime, name, arm.seed]
                cell = self.cells.get(key)
                if (arm.regime, name, arm.seed) in self.too_large:
                    self._set_aside(arm, f"it needs {name}")
                    work.arms.remove(arm)
                    break
                if cell is not None and cell["failed"]:
                    self._fail(work, arm, f"what it needs failed: {name}: {cell['failed']}")
                    break
                if self.cells.model(key, role) is None:
                    return "waits"
        if not work.arms:
            self.waiting.remove(work)
            return "empty"
        return "ready"

    def _launch(self, work: _Work) -> None:
        used = [other.device for other in self.running]
        work.device = min(self.means.devices, key=used.count)  # the first of those with the least to do
        folder_of = {
            of: str(self.cells.model(self.keys[arm.regime, of[0], arm.seed], of[1]))
            for arm in work.arms
            for of in arm.sources
        }
        name = _name(self.keys[arm.place] for arm in work.group)
        work.folder = self.out / "work" / name
        work.folder.parent.mkdir(parents=True, exist_ok=True)
        request_file, run_file = work.folder.with_suffix(".json"), work.folder.with_suffix(".yaml")
        names = member_names(work.group)
        request = {
            "study": os.getpid(),
            "run": str(run_file),
            "out": str(work.folder),
            "data": None if self.means.scoring.data is None else str(self.means.scoring.data),
            "tasks": self.means.scoring.tasks,
            "pairs": self.means.scoring.pairs,
            "device": work.device,
            "members": trained_names(work.arms, names),
            "peers": {a.name: [names[a.name, r] for r in a.run.trained] for a in work.arms if len(a.run.trained) == 2},
        }
        write_file(run_file, to_yaml(merged(work.arms, self.means.data, folder_of, names)))
        write_file(request_file, json.dumps(request))
        with work.folder.with_suffix(".log").open("ab") as log:
            command = [*self.means.worker, str(request_file)]
            work.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment(), process_group=0
            )

    def _environment(self) -> dict[str, str]:
        """One thread for each core that a process can have to itself: more would wait for one another."""
        threads = str(max(1, cores() // self.means.jobs))
        return os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads), "PYTHONUNBUFFERED": "1"}

    def _end(self, work: _Work) -> None:
        status = work.process.returncode if work.process else 0
        if status == 0:
            for arm in work.arms:
                key = self.keys[arm.place]
                kept = {role for place, role in self.kept if place == arm.place}
                names = {role: member_names(work.group)[arm.name, role] for role in arm.run.members}
                cell = harvest(arm, key, names, work.folder, self.out / "models" / key, kept, self._inherited(arm))
                self.cells.put(key, with_scores(cell, self.cells.get(key)))
            self._finish(work)
        elif status == STOPPED:
            raise Stopped
        elif status == AS_ASKED:
            raise UserError(_reason(work, status))
        elif status not in (NOT_FINITE, NO_MEMORY):
            raise MachineError(f"{', '.join(arm.name for arm in work.arms)}: {_reason(work, status)}")
        elif len(work.arms) > 1:  # each for itself, so that only the one at fault fails, or all have room
            self._clear(work)
            self.waiting += [_Work([arm], [arm]) for arm in work.arms]
        elif status == NO_MEMORY:
            self._set_aside(work.arms[0], _reason(work, status))
        else:
            self._fail(work, work.arms[0], _reason(work, status))
            self._finish(work)

    def _inherited(self, arm: Arm) -> dict[str, str]:
        """What the cells of the arms that it needs say of models from outside the study."""
        cells = (self.cells.get(self.keys[arm.regime, name, arm.seed]) or {} for name in arm.needs)
        return {name: content for cell in cells for name, content in cell.get("outside", {}).items()}

    def _finish(self, work: _Work) -> None:
        self.finished += work.units
        self._clear(work)

    def _set_aside(self, arm: Arm, why: str) -> None:
        """No result, and its folder stays: with more memory it goes on."""
        self.too_large[arm.place] = f"{arm.name}, {arm.regime}, seed {arm.seed}: {why}"

    def _fail(self, work: _Work, arm: Arm, reason: str) -> None:
        self.cells.put(self.keys[arm.place], failed_cell(arm, self.keys[arm.place], reason))
        if work.process is None:
            work.arms.remove(arm)

    def _clear(self, work: _Work) -> None:
        remove_folder(work.folder)
        for suffix in (".yaml", ".json", ".log", ".lock"):
            work.folder.with_suffix(suffix).unlink(missing_ok=True)

    def _show(self) -> None:
        done = self.finished
        for work in self.running:
            lines = read_metrics(work.folder / "metrics.jsonl")
            done += round(work.units * (lines[-1]["step"] / work.arms[0].run.steps if lines else 0))
        names = ", ".join(f"{work.arms[0].regime}, seed {work.arms[0].seed}" for work in self.running)
        left = len(self.waiting) + len(self.running)
        # Counted anew, for a cohort that is split has more to train, and what there is no memory for has none.
        total = self.finished + sum(work.units for work in [*self.waiting, *self.running])
        now = f"; now {names}" if names else ""
        self.advance(done, f"{left} cohort{'s' if left > 1 else ''} left{now}" if left else "done", total)

    def _stop(self) -> None:
        for work in self.running:
            if work.process and work.process.poll() is None:
                work.process.send_signal(signal.SIGTERM)
        for work in self.running:
            if work.process:
                with suppress(subprocess.TimeoutExpired):
                    work.process.wait(timeout=300)


def _reason(work: _Work, status: int) -> str:
    if status < 0:
        return f"its process was ended by signal {-status} ({signal.Signals(-status).name}); see {_log(work)}"
    lines = [line for line in _log(work).read_text(errors="replace", encoding="utf-8").splitlines() if line.strip()]
    return lines[-1][:500] if lines else f"it ended with status {status}"


def _log(work: _Work) -> Path:
    return work.folder.with_suffix(".log")


def _name(keys: Iterator[str]) -> str:
    """A name for a cohort of several arms."""
    return hashlib.sha256(" ".join(keys).encode()).hexdigest()[:16]


@contextmanager
def _signals() -> Iterator[Any]:
    """Inside, SIGTERM and SIGINT are remembered, and the running cohorts then save and end."""
    received = False

    def remember(number: int, _: Any) -> None:
        nonlocal received
        received = True

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
