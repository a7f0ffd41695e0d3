"""Whether a run may go to a folder, which can be said before anything large is imported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codistill.config import Run
from codistill.errors import UserError
from codistill.files import is_locked
from codistill.folders import LOCK, TOKENIZER, is_run_folder
from codistill.history import differing
from codistill.loading import load, read_run

JOB = ".job"
_TOLD = 3
# What a run, its trackers, its report and a study's scores leave in its folder.
_OWN = (
    *("run.yaml", "run.before-*.yaml", JOB, LOCK, ".*.partial", ".*.removed"),
    *(TOKENIZER, "metrics.jsonl", "checkpoints", "members", "results.json", "curves.png"),
    *("tensorboard", "wandb", ".wandb", ".trackio", ".mlflow", "scores", "agreement.json"),
)


def check_folder(run: Run, out: Path, *, resume: bool, fresh: bool, accept_changes: bool = False) -> None:
    """Raises UserError unless `run` may go to `out`: an empty place, its own unfinished run, or one to replace."""
    if not out.exists() or _is_hardly_begun(out):
        if resume:
            raise UserError(f"{out} holds no run to resume; leave out --resume to start one")
        return
    if not (out / "run.yaml").is_file():
        raise UserError(f"{out} exists and is no run folder (it has no run.yaml); give another --out")
    if fresh:
        return _check_own(out)
    if not resume:
        state = "a finished" if (out / "results.json").exists() else "an unfinished"
        raise UserError(f"{out} holds {state} run; --resume continues it, --fresh replaces it, --out goes elsewhere")
    changes = differing(load(read_run(out / "run.yaml")), run)
    if changes and not accept_changes:
        raise UserError(
            f"{out} holds another run: {_listed(changes)}; resume it as it is with "
            f"`codistill train {out / 'run.yaml'} --resume`, go on with the change with "
            "--accept-changes, or give another --out"
        )


def _listed(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """All changes by name, the first of them with what they were."""
    said = [f"{key} was {was!r} and is now {now!r}" for key, (was, now) in list(changes.items())[:_TOLD]]
    more = list(changes)[_TOLD:]
    return "; ".join(said) + (f"; {len(more)} more: {', '.join(more)}" if more else "")


def _is_hardly_begun(out: Path) -> bool:
    """Whether `out` is empty, or holds what a process left that was killed while it made the folder."""
    left = (".run.yaml.*.partial", LOCK)
    return out.is_dir() and all(any(place.match(name) for name in left) for place in out.iterdir())


def _check_own(out: Path) -> None:
    """UserError unless a run was begun in `out` and nothing else lies there: all of it is about to be deleted."""
    if not is_run_folder(out):
        raise UserError(f"{out}: no run was begun there, so --fresh does not delete it; give another --out")
    strangers = sorted(place.name for place in out.iterdir() if not any(place.match(own) for own in _OWN))
    if strangers:
        raise UserError(
            f"{out} holds more than a run ({', '.join(strangers[:3])}), and --fresh would delete that too; "
            "move it away, or give another --out"
        )


def check_free(out: Path) -> None:
    """UserError where another process trains in `out` now."""
    if is_locked(out / LOCK):
        raise in_use(out)


def in_use(out: Path) -> UserError:
    """What to say of a folder in which another process trains."""
    return UserError(f"{out}: another process trains there; wait for it, or give another --out")
