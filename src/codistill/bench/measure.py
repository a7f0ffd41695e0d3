"""How things are measured: in turns, in one process, with the machine written down."""

import ctypes
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from codistill.errors import UserError, did_you_mean
from codistill.files import to_json
from codistill.machine import device_name, versions

_SECONDS_BETWEEN_LINES = 15.0


def chosen_providers(asked: Sequence[str] | None, known: Collection[str]) -> list[str]:
    """The names that are `asked` for, by default all that are `known`; UserError for one that is not."""
    for name in asked or ():
        if name not in known:
            names = ", ".join(map(repr, known))  # in quotes, because commas stand in names too
            raise UserError(f"providers: {name!r} is unknown{did_you_mean(name, known)}; known are {names}")
    return list(known if asked is None else asked)


def announced(names: Collection[str], what: str) -> Iterator[str]:
    """The names one by one, each once a line on standard error says that `what` comes now. No bar, whose thread would
    take time from what is measured."""
    for at, name in enumerate(names, 1):
        tell(f"{what}, {at} of {len(names)}: {name}")
        yield name


def tell(line: str) -> None:
    """A line on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True, emoji=False, markup=False).print(line)


def interleaved(steps: Mapping[str, Callable[[], None]], runs: int, device: str) -> dict[str, list[float]]:
    """Seconds of every run of every step. All take a turn before any takes its next, so that a machine that slows
    down slows all of them; the order moves on by one each time, and one turn before the first is not counted. Says on
    standard error how far it has come, at first and now and then."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names, told = list(steps), -math.inf
    for turn in range(runs + 1 if names else 0):
        now = time.monotonic()
        if now - told > _SECONDS_BETWEEN_LINES:
            tell(f"timing, turn {turn + 1} of {runs + 1}")
            told = now
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            spent = _seconds(steps[name], device)
            if turn:
                seconds[name].append(spent)
    return seconds


def peak_bytes(step: Callable[[], None], device: str) -> int | None:
    """The most memory that one run needed beyond what was in use before it; None where the system does not tell.

    On a CPU it is the resident memory of the process, so that what a library takes for itself counts too.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        before = _start_of_resident_peak()
        step()
        return _status("VmHWM") - before
    except OSError:
        return None


def live_bytes(step: Callable[[], object]) -> int:
    """The most that tensors on the CPU took at once in one run, beyond what they took before it, by the profiler's
    count of every allocation: without what a library or the allocator keeps for itself."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        step()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def summary(seconds: list[float]) -> dict:
    """Median, extremes and every run, in seconds."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "runs": seconds}


def check_counts(**counts: int) -> None:
    """UserError naming the first of `counts` that is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name} {count}: at least one is needed")


def place_of(device: str) -> torch.device:
    """The device to measure on; UserError where there is none of that name."""
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"device: {device!r} is not here; wanted 'cpu' or, where there is one, 'cuda'")
    return torch.device(device)


def machine(device: str, packages: tuple[str, ...] = ()) -> dict:
    """What the numbers were measured on: processor or GPU, threads, versions of `packages` that are installed."""
    found = {
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": versions(filter(_installed, ("torch", *packages))),
    }
    if device == "cuda":
        found["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return found


def write_result(out: Path | None, result: object) -> None:
    """Writes a measurement as JSON to `out`, if it is to be written."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(to_json(result, indent=1) + "\n", encoding="utf-8")


def _seconds(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _start_of_resident_peak() -> int:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: no {field}")


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
