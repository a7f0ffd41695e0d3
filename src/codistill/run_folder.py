"""A run's folder: whether a run may use it, what has changed since it was made, and what is written when it ends."""

import json
import sys
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from codistill.build import Built
from codistill.checkpoint import distinct, gathered
from codistill.claim import JOB, in_use
from codistill.config import Run
from codistill.costs import member_flops
from codistill.data.saved_tokenizer import tokenizer_to_save
from codistill.distributed import Ranks
from codistill.errors import UserError
from codistill.families import longest
from codistill.files import (
    atomic_folder,
    locked,
    machine_error,
    remove_folder,
    remove_left,
    to_json,
    without_nan,
    write_file,
)
from codistill.folders import LOCK, TOKENIZER
from codistill.history import DETERMINING, parts, tokens_by
from codistill.loading import load, read_run, to_yaml
from codistill.model_card import model_card
from codistill.scores import Score
from codistill.torchrun import job
from codistill.watch import NonFiniteError


def check_provenance(run: Run, out: Path, provenance: Mapping[str, Any], *, resume: bool, accept_changes: bool) -> None:
    """Raises UserError where text, tokenizer, pre-trained members or versions are not what the run was made with.

    Without it the numbers would silently be of something else. A configuration without provenance has no such past.
    """
    before = load(read_run(out / "run.yaml")).provenance if resume else run.provenance
    if resume:
        _check_tokenizer(out, (before or {}).get("tokenizer"), provenance["tokenizer"])
    for key in DETERMINING if resume else DETERMINING[:-1]:
        was, now = (before or {}).get(key), provenance[key]
        if was is not None and was != now and not accept_changes:
            raise UserError(
                f"provenance.{key}: the run was made with {_difference(was, now)}; bring the old one back, or accept "
                f"{'it with --accept-changes' if resume else 'what is there by removing `provenance` from the file'}"
            )


def _check_tokenizer(out: Path, was: str | None, now: str) -> None:
    """UserError where trained models would be shown the tokens of another vocabulary: nobody can want that."""
    if was in (None, now):
        return
    own = out / TOKENIZER
    place = own if own.is_dir() else "the one that it was made with"
    raise UserError(
        f"data.tokenizer: the models in {out} have learned the tokens of another tokenizer ({str(was)[:8]}, now "
        f"{now[:8]}), also where one is trained on other text; name theirs: --set data.tokenizer={place}"
    )


def open_folder(run: Run, out: Path, first: int, held: ExitStack, *, resume: bool, fresh: bool) -> None:
    """Makes the folder of a new run; in a resumed one whose configuration changed, keeps the old one beside.

    A run that goes on from step `first` is not finished any more. Until `held` is closed no other process trains there;
    UserError where one does.
    """
    try:
        if fresh and out.exists():
            with locked(out / LOCK, wait=False):
                remove_folder(out)
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(out / LOCK, wait=False))
        remove_left(out)
        if resume and first < run.steps:
            (out / "results.json").unlink(missing_ok=True)
            remove_folder(out / "members")
        file, text = out / "run.yaml", to_yaml(run)
        if resume and (before := file.read_text(encoding="utf-8")) != text:
            places = (out / f"run.before-{number}.yaml" for number in count())
            write_file(next(place for place in places if not place.exists()), before)
        # First of all, so that whatever is killed from here on leaves a folder that can be resumed.
        write_file(file, text)
        (out / "checkpoints").mkdir(exist_ok=True)
        (out / JOB).write_text(job(), encoding="utf-8")
    except BlockingIOError:
        raise in_use(out) from None
    except OSError as error:
        raise machine_error(error, out) from error


def keep_tokenizer(out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Puts the run's tokenizer into its folder: one that was trained on its text cannot be had from other text."""
    with atomic_folder(out / TOKENIZER) as fresh:
        tokenizer.save_pretrained(fresh)


def is_of_this_job(out: Path) -> bool:
    """Whether the run in `out` was begun or resumed by the very job that this process is part of."""
    return (out / JOB).is_file() and (out / "run.yaml").is_file() and (out / JOB).read_text(encoding="utf-8") == job()


def distribution(out: Path | None, ranks: Ranks, first: int) -> list[dict[str, Any]]:
    """From which step on a run was computed on how many ranks by which engine: in `out` so far, and from `first` on.

    Where that changes, rank 0 says so: the samples and masks stay the same, but not the last bits and dropout noise.
    """
    past = [] if out is None else (load(read_run(out / "run.yaml")).provenance or {}).get("distribution", [])
    now = {"engine": ranks.engine, "ranks": ranks.world}
    before = {key: past[-1][key] for key in now} if past else now
    if before != now and ranks.is_main:
        was, is_now = (f"{part['ranks']} x {part['engine']}" for part in (before, now))
        print(
            f"{out}: was computed as {was}, and is as {is_now} from step {first} on: samples, masks and their order "
            "stay; rounding and the noise of dropout differ",
            file=sys.stderr,
        )
    return past if past and before == now else [*past, {"from_step": first, **now}]


class Ending(NamedTuple):
    """How a run ended: after which step, with which held-out scores, where each member's loss was lowest, and how many
    of the steps were skipped."""

    step: int
    scores: Mapping[str, Score]
    best: Mapping[str, Mapping[str, float]]
    skipped: int


def finish(run: Run, built: Built, out: Path, ending: Ending, seconds: float) -> None:
    """Writes the final members, and `results.json` last of all: it marks a run as finished. All ranks take part."""
    ranks = built.cohort.ranks
    parameters = {name: gathered(distinct(model), ranks) for name, model in built.models.items()}
    ranks.on_main(lambda: _write_final(run, built, out, parameters, ending, seconds))


def _write_final(
    run: Run,
    built: Built,
    out: Path,
    parameters: Mapping[str, dict[str, Tensor]],
    ending: Ending,
    seconds: float,
) -> None:
    results = without_nan(_results(run, built, ending, seconds))
    with atomic_folder(out / "members") as fresh:
        for name, model in built.models.items():
            model.save_pretrained(fresh / name, state_dict=parameters[name])
            tokenizer = tokenizer_to_save(
                built.tokenizer, is_causal=run.objective.name == "clm", positions=longest(model)
            )
            tokenizer.save_pretrained(fresh / name)
            write_file(fresh / name / "README.md", model_card(run, results, name))
    write_file(out / "results.json", to_json(results, indent=1))


def check_losses(out: Path, members: Collection[str] | None = None) -> None:
    """NonFiniteError where the finished run in `out` left some of its `members` (by default all) with a held-out loss
    that is no number."""
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    found = results["members"]
    broken = [name for name in found if found[name]["loss"] is None and (members is None or name in members)]
    if broken:
        raise NonFiniteError(
            f"{out}: the held-out loss of {' and '.join(broken)} is no number after {results['steps']:,} steps; lower "
            "`lr` or an edge's weight, or use precision: float32; the folder stays as it is"
        )


def _results(run: Run, built: Built, ending: Ending, seconds: float) -> dict[str, Any]:
    flops = _flops(run, built, ending.step)
    return {
        "members": {name: _result(run, built, name, ending) | _cost(flops, name, seconds) for name in ending.scores},
        "held_out": {"unigram_loss": built.unigram, "rows": next(iter(ending.scores.values())).rows},
        "objective": run.objective.name,
        "steps": ending.step,
        "stopped_early": ending.step < run.steps,
        "skipped": ending.skipped,
        "tokens": tokens_by(run, ending.step),
        "passes": round(tokens_by(run, ending.step) / (built.batches.num_rows * run.data.length), 4),
        "seconds": round(seconds, 1),
        "seed": run.seed,
        "precision": run.precision,
    }


def _flops(run: Run, built: Built, steps: int) -> dict[str, dict[str, int]]:
    """As `member_flops`, of all parts of the run; a teacher that a resumption left out has no model to count."""
    rows = sum(len(batch.labels_N) for batch in built.batches.at(steps)) / run.rows_per_step
    total = {name: {"own": 0, "teachers": 0} for name in built.models}
    for first, last, then in parts(run, steps):
        found = member_flops(then, built.models, rows=round(rows * then.rows_per_step), steps=range(first, last))
        for name, of in found.items():
            total[name] = {key: total[name][key] + count for key, count in of.items()}
    return total


def _cost(flops: Mapping[str, Mapping[str, int]], name: str, seconds: float) -> dict[str, Any]:
    """What a member cost: its FLOPs with its frozen teachers', and the share of the run's time that goes with them."""
    total = sum(of["own"] for of in flops.values())
    share = sum(flops[name].values()) / total if total else 0.0
    return {"flops": dict(flops[name]), "seconds": round(seconds * share, 1)}


def _result(run: Run, built: Built, name: str, ending: Ending) -> dict[str, Any]:
    score = ending.scores[name]
    return {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "accuracy": score.accuracy,
        "parameters": built.cohort.members[name].predictor.num_parameters,
        "taught_by": list(dict.fromkeys(edge.teacher for edge in run.distillation if edge.student == name)),
        "twin_of": run.members[name].twin_of,
        "frozen": run.members[name].frozen,
        "best": None if run.members[name].frozen else ending.best.get(name),
    }


def _difference(was: Any, now: Any) -> str:
    """`was …, but now there is …`, cut to what differs."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
        return f"{keys[0]} {was.get(keys[0])!r}, but now it is {now.get(keys[0])!r}"
    return f"{was!r}, but now it is {now!r}"
