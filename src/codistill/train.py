"""The loop: when to step, log, evaluate, save and stop. What a step does is `codistill.cohort`'s business."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from codistill import checkpoint
from codistill.build import Built, build, resolved_precision, to_device
from codistill.config import Run
from codistill.errors import UserError
from codistill.loading import load, read_run, to_dict, to_yaml
from codistill.progress import Advance, silent
from codistill.scores import Score, held_out


class Stopped(Exception):
    """The run was asked to stop; it was saved and can be resumed from the folder `args[0]`."""


def train(
    run: Run,
    out: Path,
    *,
    resume: bool = False,
    fresh: bool = False,
    device: str | None = None,
    advance: Advance = silent,
    stop_at: int | None = None,
) -> Path:
    """Trains the cohort of `run` and returns its folder `out` (docs/run-folder.md).

    `resume` continues an unfinished run bit for bit; `fresh` replaces one; with neither, `out` must hold none.
    `stop_at` saves before that step and raises `Stopped`, as SIGTERM and SIGINT do after the step under way. Seeds
    PyTorch's global generators. Raises UserError for what is wrong in `run`, MachineError for the disk.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    run = replace(run, precision=resolved_precision(run, place))
    check_folder(run, out, resume=resume, fresh=fresh)
    torch.use_deterministic_algorithms(run.deterministic)
    built = build(run, place)
    _check_provenance(load(read_run(out / "run.yaml")) if resume else run, built)
    run = replace(run, provenance=built.provenance)
    _open_folder(run, out, resume=resume, fresh=fresh)
    with _signals() as asked_to_stop:
        try:
            _loop(run, built, out, advance, lambda step: asked_to_stop() or step == stop_at)
        except OSError as error:
            raise checkpoint.machine_error(error, out) from error
    return out


def _loop(run: Run, built: Built, out: Path, advance: Advance, asked_to_stop: Callable[[int], bool]) -> None:
    members = built.cohort.trained
    trained = {m.name: checkpoint.Trained(built.models[m.name], m.optimizer) for m in members if m.optimizer}
    saved = checkpoint.newest(out / "checkpoints")
    first = checkpoint.load(saved, trained) if saved else 0
    log = _Log(run, out / "metrics.jsonl", first)
    for step in range(first, run.steps):
        micro_batches = [to_device(batch, built.cohort.device) for batch in built.batches.at(step)]
        metrics = built.cohort.step(step, micro_batches)
        done = step + 1
        if done % run.log.every == 0 or done == run.steps:
            built.cohort.raise_failure()
            advance(done, log.write(done, metrics))
        if done % run.evaluate.every == 0 or done == run.steps:
            log.write_held_out(done, score_members(built, run))
        stop = asked_to_stop(done) and done < run.steps
        if done % run.checkpoint.every == 0 or done == run.steps or stop:
            built.cohort.raise_failure()
            checkpoint.save(out / "checkpoints", done, trained, keep=run.checkpoint.keep)
        if stop:
            raise Stopped(out)
    _finish(run, built, out, log)


def score_members(built: Built, run: Run) -> dict[str, Score]:
    """Held-out score of every member, frozen ones too."""
    precision = getattr(torch, run.precision)
    return {m.name: held_out(m.predictor, built.held_out, precision) for m in built.cohort.members.values()}


# ---- the log -----------------------------------------------------------------------------------


class _Log:
    """`metrics.jsonl`: one object a logged step. Lines from `first` on are dropped: they are about to be redone."""

    def __init__(self, run: Run, file: Path, first: int):
        self.tokens_per_step = run.batch.sequences * run.data.length
        kept = [line for line in _lines(file) if line["step"] <= first]
        self.seconds_before = max((line.get("seconds", 0.0) for line in kept), default=0.0)
        file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.file, self.first, self.started = file, first, time.monotonic()
        self.last: dict[str, Score] = {}

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def write(self, step: int, metrics: Mapping[str, torch.Tensor]) -> str:
        """Logs device scalars, waiting for them once; returns a note for the progress bar."""
        values = torch.stack([value.float() for value in metrics.values()]).tolist()
        named = dict(zip(metrics, values, strict=True))
        rate = (step - self.first) * self.tokens_per_step / (time.monotonic() - self.started)
        self._append({"step": step, "tokens": step * self.tokens_per_step, "seconds": round(self.seconds, 3)} | named)
        losses = " ".join(f"{key.split('/')[0]} {value:.3f}" for key, value in named.items() if key.endswith("/hard"))
        return f"{losses} | {rate:,.0f} tokens/s"

    def write_held_out(self, step: int, scores: dict[str, Score]) -> None:
        self.last = scores
        table = {name: {"loss": score.loss, "accuracy": score.accuracy} for name, score in scores.items()}
        self._append({"step": step, "seconds": round(self.seconds, 3), "held_out": table})

    def _append(self, line: dict) -> None:
        with self.file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def _lines(file: Path) -> list[dict]:
    """The whole lines of a metrics file; a line that a crash cut short is none."""
    if not file.exists():
        return []
    lines = []
    for text in file.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


# ---- the folder --------------------------------------------------------------------------------


def check_folder(run: Run, out: Path, *, resume: bool, fresh: bool) -> None:
    """Raises UserError unless `run` may go to `out`: an empty place, its own unfinished run, or one to replace."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        if resume:
            raise UserError(f"{out} holds no run to resume; leave out --resume to start one")
        return
    if not (out / "run.yaml").is_file():
        raise UserError(f"{out} exists and is no run folder (it has no run.yaml); give another --out")
    if fresh:
        return
    if not resume:
        state = "a finished" if (out / "results.json").exists() else "an unfinished"
        raise UserError(f"{out} holds {state} run; --resume continues it, --fresh replaces it, --out goes elsewhere")
    _check_same(load(read_run(out / "run.yaml")), run, out)


def _check_same(old: Run, new: Run, out: Path) -> None:
    was, now = (_flat(to_dict(replace(r, provenance=None, precision="auto"))) for r in (old, new))
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            raise UserError(
                f"{out} holds another run: {key} was {was.get(key)!r} and is now {now.get(key)!r}; resume it with "
                f"`codistill train {out / 'run.yaml'} --resume`, or give another --out"
            )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        return _flat(dict(enumerate(tree)), prefix)
    return {prefix[:-1]: tree}


def _check_provenance(run: Run, built: Built) -> None:
    """What a run.yaml recorded of its data must still be so, or the numbers would silently be of other text."""
    for key in ("data", "tokenizer", "members"):
        was, now = (run.provenance or {}).get(key), built.provenance[key]
        if was is not None and was != now:
            raise UserError(
                f"provenance.{key}: the run was made with {was}, but what is there now is {now}; bring the old files "
                "back, or remove `provenance` from the configuration to train on what is there"
            )


def _open_folder(run: Run, out: Path, *, resume: bool, fresh: bool) -> None:
    if resume:
        return
    try:
        if fresh and out.exists():
            shutil.rmtree(out)
        (out / "checkpoints").mkdir(parents=True)
        (out / "run.yaml").write_text(to_yaml(run))
    except OSError as error:
        raise checkpoint.machine_error(error, out) from error


def _finish(run: Run, built: Built, out: Path, log: _Log) -> None:
    """Writes the final members, and `results.json` last of all: it marks a run as finished."""
    with checkpoint.atomic_folder(out / "members") as fresh:
        for name, model in built.models.items():
            model.save_pretrained(fresh / name)
            built.tokenizer.save_pretrained(fresh / name)
    scores = log.last or score_members(built, run)
    members = {
        name: {
            "loss": score.loss,
            "perplexity": score.perplexity,
            "accuracy": score.accuracy,
            "parameters": built.cohort.members[name].predictor.num_parameters,
            "taught_by": [e.teacher for e in run.distillation if e.student == name],
            "twin_of": run.members[name].twin_of,
            "frozen": run.members[name].frozen,
        }
        for name, score in scores.items()
    }
    results = {
        "members": members,
        "held_out": {"unigram_loss": built.unigram, "rows": next(iter(scores.values())).rows},
        "steps": run.steps,
        "tokens": run.steps * log.tokens_per_step,
        "seconds": round(log.seconds, 1),
        "seed": run.seed,
        "precision": run.precision,
    }
    partial = out / ".results.json"
    partial.write_text(json.dumps(results, indent=1))
    os.replace(partial, out / "results.json")


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
