"""The loop: when to step, log, evaluate, save and stop. What a step does is `codistill.cohort`'s business."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from codistill import checkpoint
from codistill.build import Built, build, resolved_precision, to_device
from codistill.checkpoint import Retention, Saver, Trained
from codistill.config import Run
from codistill.files import machine_error
from codistill.metrics import MetricsLog
from codistill.progress import Advance, silent
from codistill.run_folder import check_folder, check_provenance, finish, open_folder
from codistill.scores import Score, held_out
from codistill.watch import NonFiniteError


class Stopped(Exception):
    """The run was asked to stop; it was saved and can be resumed from the folder `args[0]`."""


def train(
    run: Run,
    out: Path,
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
    saves before that step and raises `Stopped`, as SIGTERM and SIGINT do after the step under way. Seeds PyTorch's
    global generators. Raises UserError for what is wrong in `run`, MachineError for the disk.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    run = replace(run, precision=resolved_precision(run, place))
    check_folder(run, out, resume=resume, fresh=fresh, accept_changes=accept_changes)
    torch.use_deterministic_algorithms(run.deterministic)
    built = build(run, place)
    check_provenance(run, out, built.provenance, resume=resume, accept_changes=accept_changes)
    open_folder(replace(run, provenance=built.provenance), out, resume=resume, fresh=fresh)
    with _signals() as asked_to_stop:
        try:
            _run(run, built, out, advance, lambda step: asked_to_stop() or step == stop_at)
        except OSError as error:
            raise machine_error(error, out) from error
    return out


def _run(run: Run, built: Built, out: Path, advance: Advance, asked_to_stop: Callable[[int], bool]) -> None:
    trained = {m.name: Trained(built.models[m.name], m.optimizer) for m in built.cohort.trained if m.optimizer}
    saved = checkpoint.newest(out / "checkpoints")
    first = checkpoint.load(saved, trained) if saved else 0
    log = MetricsLog(out / "metrics.jsonl", first, run.batch.sequences * run.data.length)
    keep = run.checkpoint
    saver = Saver(out / "checkpoints", Retention(keep.keep, keep.keep_every, keep.keep_best))
    try:
        save = partial(saver.save, members=trained)
        scores = _loop(run, built, first, log, advance, asked_to_stop, save)
    finally:
        saver.finish()
    if scores is None:
        raise Stopped(out)
    finish(run, built, out, scores, log.seconds)


def _loop(
    run: Run,
    built: Built,
    first: int,
    log: MetricsLog,
    advance: Advance,
    asked_to_stop: Callable[[int], bool],
    save: Callable[..., None],
) -> dict[str, Score] | None:
    """The final scores, or None if it was asked to stop."""
    scores: dict[str, Score] = {}
    for done in range(first + 1, run.steps + 1):
        micro_batches = [to_device(batch, built.cohort.device) for batch in built.batches.at(done - 1)]
        metrics = built.cohort.step(done - 1, micro_batches)
        ends, score = done == run.steps, None
        if ends or done % run.log.every == 0:
            check_finite(built)
            advance(done, log.write(done, metrics, built.cohort.num_skipped()))
        if ends or done % run.evaluate.every == 0:
            scores = score_members(built, run)
            log.write_held_out(done, scores)
            score = sum(scores[member.name].loss for member in built.cohort.trained)
        stops = not ends and asked_to_stop(done)
        if ends or stops or done % run.checkpoint.every == 0:
            check_finite(built)
            save(done, score=score)
        if stops:
            return None
    return scores or score_members(built, run)


def check_finite(built: Built) -> None:
    """Raises NonFiniteError, with the rows of text in that step's batch, if an update was suppressed for good."""
    failure = built.cohort.failure()
    if failure is not None:
        rows = [row for batch in built.batches.at(failure.step) for row in batch.sample_ids]
        shown = ", ".join(map(str, rows[:64])) + (", …" if len(rows) > 64 else "")
        raise NonFiniteError(f"{failure}; the batch held the rows {shown} of data.train")


def score_members(built: Built, run: Run) -> dict[str, Score]:
    """Held-out score of every member, frozen ones too."""
    precision = getattr(torch, run.precision)
    return {m.name: held_out(m.predictor, built.held_out, precision) for m in built.cohort.members.values()}


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Inside, the first SIGTERM or SIGINT is remembered and a second one acts at once."""
    received = False

    def remember(number: int, _: Any) -> None:
        nonlocal received
        received = True
        for each, handler in before.items():
            signal.signal(each, handler)

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
