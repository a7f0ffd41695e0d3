"""The loop: when to step, log, evaluate, save and stop. What a step does is `codistill.cohort`'s business."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codistill import checkpoint, distributed
from codistill.build import Built, build, resolved_compile, resolved_precision
from codistill.checkpoint import Retention, Saver, Trained
from codistill.claim import check_folder, check_free
from codistill.config import Run
from codistill.data.prefetch import prefetched
from codistill.distributed import Ranks
from codistill.errors import UserError
from codistill.files import machine_error
from codistill.history import DETERMINING, changed, scored_from, sequences_by, tokens_by
from codistill.loading import load, read_run
from codistill.machine import be_deterministic, keep_freed_memory
from codistill.metrics import MetricsLog
from codistill.objectives import Batch
from codistill.progress import Advance, silent
from codistill.run_folder import (
    Ending,
    check_provenance,
    distribution,
    finish,
    is_of_this_job,
    keep_tokenizer,
    open_folder,
)
from codistill.scores import Score, held_out
from codistill.torchrun import restarted
from codistill.tracking import Tracker, check_installed
from codistill.watch import NonFiniteError


class Stopped(Exception):
    """The run was asked to stop; it was saved and can be resumed from the folder `args[0]`."""


def train(
    run: Run,
    out: str | Path,
    *,
    resume: bool = False,
    fresh: bool = False,
    accept_changes: bool = False,
    device: str | None = None,
    advance: Advance = silent,
    stop_at: int | None = None,
) -> Path:
    """Trains the cohort of `run` and returns its folder `out` (docs/run-folder.md).

    `resume` continues an unfinished run bit for bit; `fresh` replaces one; with neither, `out` must hold none.
    `accept_changes` resumes although the configuration, text, tokenizer or versions are not what they were. `stop_at`
    saves before that step and raises `Stopped`, as SIGTERM and SIGINT do after the step under way.

    For the rest of the process: PyTorch's global generators are seeded, its deterministic algorithms are on if `run`
    asks for them, and the C library keeps what a step frees. Raises UserError for what is wrong in `run`, MachineError
    for the disk.
    """
    out = Path(out)
    check_installed(run.track)
    if run.deterministic:
        be_deterministic()
    ranks = distributed.start(run.distributed, device)
    if ranks.broadcast_int(int(restarted() and is_of_this_job(out))):
        resume, fresh = True, False  # whatever the command was: what this job has done so far is there
        if ranks.is_main:
            print(f"torchrun started the processes anew; going on with what is in {out}", file=sys.stderr)
    if ranks.world > 1 and ranks.is_main:
        print(f"{out}: {ranks.world} processes, {ranks.engine}", file=sys.stderr)
    keep_freed_memory()
    run = replace(run, precision=resolved_precision(run, ranks.device), compile=resolved_compile(run, ranks.device))
    ranks.together(partial(check_folder, run, out, resume=resume, fresh=fresh, accept_changes=accept_changes))
    ranks.on_main(partial(check_free, out))  # and again, for good, once all is ready
    built = build(run, ranks.device, ranks)
    accept = partial(check_provenance, run, out, built.provenance, resume=resume, accept_changes=accept_changes)
    ranks.together(accept)
    first = _restored(run, built, out) if resume else 0
    if not resume and (run.provenance or {}).get("changed") and ranks.is_main:
        print(
            "the run that this configuration is of changed its settings on the way; "
            "this run has the last ones throughout",
            file=sys.stderr,
        )
    before = out if resume else None
    run = _recorded(run, built, distribution(before, ranks, first), ranks)
    if resume:
        run = _continued(run, built, out, first)
    with ExitStack() as held, _signals() as asked_to_stop:
        ranks.on_main(partial(open_folder, run, out, first, held, resume=resume, fresh=fresh))
        ranks.on_main(lambda: keep_tokenizer(out, built.tokenizer))
        try:
            _run(run, built, out, first, advance, lambda step: ranks.any_late(asked_to_stop()) or step == stop_at)
        except OSError as error:
            raise machine_error(error, out) from error
    return out


def _restored(run: Run, built: Built, out: Path) -> int:
    """The step to go on with, after the state of the newest good checkpoint has been put in place."""
    ranks = built.cohort.ranks
    saved = _newest(out, ranks)
    first = ranks.together(lambda: checkpoint.load(saved, _trained(built))) if saved else 0

    def check() -> None:
        if first > run.steps:
            raise UserError(f"steps: {run.steps} came in, but {out} is at step {first}; --fresh starts it over")
        if saved is None and list((out / "checkpoints").glob("*.damaged")):
            raise UserError(f"{out}: none of its checkpoints verifies; --fresh starts the run over")

    ranks.together(check)
    if ranks.is_main:
        print(f"{out}: resuming from step {first}" + ("" if saved else " (no checkpoint was saved)"), file=sys.stderr)
    return first


def _trained(built: Built) -> dict[str, Trained]:
    return {m.name: Trained(built.models[m.name], m.optimizers[0], m.projections) for m in built.cohort.trained}


def _newest(out: Path, ranks: Ranks) -> Path | None:
    """The checkpoint that rank 0 finds to be the newest good one."""
    found = ranks.together(lambda: checkpoint.newest(out / "checkpoints") if ranks.is_main else None)
    step = ranks.broadcast_int(-1 if found is None else checkpoint.step_of(found))
    return None if step < 0 else checkpoint.place_of(out / "checkpoints", step)


def _continued(run: Run, built: Built, out: Path, first: int) -> Run:
    """`run` with a record of all that is not as it was, which is told; its batches go on with the next sequence."""
    was = load(read_run(out / "run.yaml"))
    parts = changed(was, run, first)
    if built.cohort.ranks.is_main and len(parts) > len((was.provenance or {}).get("changed", [])):
        new = [f"{key} (was {value})" for key, value in {**parts[-1]["was"], **parts[-1].get("inputs", {})}.items()]
        print(f"{out}: changed from step {first + 1} on: {', '.join(new)}", file=sys.stderr)
    run = replace(run, provenance=(run.provenance or {}) | ({"changed": parts} if parts else {}))
    built.batches.begun = (first, sequences_by(run, first))
    return run


def _recorded(run: Run, built: Built, parts: list[dict[str, Any]], ranks: Ranks) -> Run:
    """`run` with all that determined its numbers, which must be the same on all ranks."""
    for name, fact in {**{key: built.provenance[key] for key in DETERMINING}, "precision": run.precision}.items():
        ranks.check_same(json.dumps(fact), name)
    return replace(run, provenance=built.provenance | {"distribution": parts})


def _run(run: Run, built: Built, out: Path, first: int, advance: Advance, asked_to_stop: Callable[[int], bool]) -> None:
    ranks, trained = built.cohort.ranks, _trained(built)
    file = out / "metrics.jsonl" if ranks.is_main else Path(os.devnull)
    keep, scored = run.checkpoint, scored_from(run)
    retention = Retention(keep.keep, keep.keep_every, keep.keep_best, scored)
    with (
        closing(Tracker(run if ranks.is_main else replace(run, track=[]), out, first)) as tracker,
        closing(Saver(out / "checkpoints", retention, ranks)) as saver,
    ):
        a_step = run.batch.sequences * run.data.length
        log = ranks.together(lambda: MetricsLog(file, first, a_step, tracker.log, tokens_by(run, first), scored))
        save = partial(saver.save, members=trained)
        pinned = built.cohort.device.type == "cuda"
        ahead = prefetched(built.batches, first, run.steps, rank=ranks.rank, world=ranks.world, pinned=pinned)
        with closing(ahead) as batches:
            ending = _loop(run, built, first, batches, log, advance, asked_to_stop, save)
        saver.finish()
    if ending is None:
        raise Stopped(out)
    finish(run, built, out, ending, log.seconds)


def _loop(
    run: Run,
    built: Built,
    first: int,
    batches: Iterator[list[Batch]],
    log: MetricsLog,
    advance: Advance,
    asked_to_stop: Callable[[int], bool],
    save: Callable[..., None],
) -> Ending | None:
    """How the run ended, or None if it was asked to stop."""
    ranks, done = built.cohort.ranks, first
    if _is_stale(run, ranks, log):
        return Ending(done, score_members(built, run), log.best(), log.skipped_written)
    scores: dict[str, Score] = {}
    for done, micro_batches in enumerate(batches, start=first + 1):
        metrics = built.cohort.step(done - 1, [batch.to(built.cohort.device) for batch in micro_batches])
        ends, losses = done == run.steps, None
        if ends or done % run.log.every == 0:
            metrics |= built.cohort.weight_norms()
            ranks.together(partial(_report, built, done, metrics, log, advance))
        if ends or done % run.evaluate.every == 0:
            scores = score_members(built, run, scores)
            ranks.together(partial(log.write_held_out, done, scores))
            advance(done, numbers={f"{name}/held_out_loss": score.loss for name, score in scores.items()})
            losses = {member.name: scores[member.name].loss for member in built.cohort.trained}
            ends = ends or _is_stale(run, ranks, log)
        stops = not ends and asked_to_stop(done)
        if ends or stops or done % run.checkpoint.every == 0:
            ranks.together(partial(check_finite, built))
            ranks.together(partial(log.write_skipped, done, built.cohort.num_skipped()))
            save(done, scores=losses)
        if stops:
            return None
        if ends:
            break
    return Ending(done, scores or score_members(built, run), log.best(), log.skipped_written)


def _is_stale(run: Run, ranks: Ranks, log: MetricsLog) -> bool:
    """Whether `stop_early` ends the run here; rank 0 decides, whose log goes back to before a resumption."""
    if run.stop_early is None:
        return False
    return bool(ranks.broadcast_int(int(log.is_stale(run.trained, run.stop_early.patience, run.stop_early.least))))


def _report(built: Built, done: int, metrics: Mapping[str, Tensor], log: MetricsLog, advance: Advance) -> None:
    check_finite(built)
    logged = log.write(done, metrics, built.cohort.num_skipped())
    advance(done, logged.note, numbers=logged.numbers)


def check_finite(built: Built) -> None:
    """Raises NonFiniteError, with the rows of text in that step's batch, if an update was suppressed for good."""
    failure = built.cohort.failure()
    if failure is not None:
        rows = [row for batch in built.batches.at(failure.step) for row in batch.sample_ids]
        shown = ", ".join(map(str, rows[:64])) + (", …" if len(rows) > 64 else "")
        raise NonFiniteError(f"{failure}; the batch held the rows {shown} of data.train")


def score_members(built: Built, run: Run, before: Mapping[str, Score] | None = None) -> dict[str, Score]:
    """Held-out score of every member; of a frozen one that was scored `before`, that score."""
    precision = getattr(torch, run.precision)
    ranks = built.cohort.ranks
    with torch.compiler.set_stance("force_eager"):  # scores do not depend on `compile`
        return {
            name: before[name]
            if before and not member.is_trained
            else held_out(member.predictor, built.held_out, precision, ranks)
            for name, member in built.cohort.members.items()
        }


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM and SIGINT are remembered; after the first of either a SIGINT acts at once.

    A second SIGTERM does not: schedulers and launchers send one to the process and one to its parent, who passes it on.
    """
    received = False

    def remember(number: int, _: Any) -> None:
        nonlocal received
        received = True
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    try:
        before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: signals are somebody else's
        yield lambda: False
        return
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
