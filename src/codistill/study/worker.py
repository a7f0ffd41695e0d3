"""What a process of its own does for a study: train one cohort, then score its members. Its last line of standard error
says why it failed.

    python -m codistill.study.worker REQUEST.json
"""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from codistill.config import Run
from codistill.errors import STOPPED, MachineError, UserError, one_line
from codistill.evaluate.run import evaluate
from codistill.files import locked, to_json, write_file
from codistill.loading import load, read_run
from codistill.machine import is_out_of_memory
from codistill.run_folder import check_losses
from codistill.study.harvest import AGREEMENT
from codistill.study.scoring import BLIMP
from codistill.study.statuses import AS_ASKED, NO_MEMORY, NOT_FINITE
from codistill.train import Stopped, train
from codistill.watch import NonFiniteError

_SECONDS_BETWEEN_LOOKS = 1.0


def work(request: dict[str, Any]) -> None:
    """Trains the run of the file `run` in the folder `out`, going on where it was left, and scores its members there.

    `tasks`: of `codistill evaluate`, with examples in the folder `data`, of BLiMP `pairs` a paradigm; `members`: whom
    to score; `peers`: arm → its two trained members, whose judgements of BLiMP are compared. What is finished is not
    done again.
    """
    out = Path(request["out"])
    if not _has_all(out, request["members"]):
        _train(load(read_run(Path(request["run"]))), out, request["device"])
    check_losses(out, request["members"])
    scores = out / "scores"
    score = partial(evaluate, out=scores, data=request["data"], limit=request["pairs"], device=request["device"])
    if BLIMP in request["tasks"]:
        agreement = {}
        for arm, members in request["peers"].items():
            both = score([str(out / "members" / member) for member in members], [BLIMP])
            agreement[arm] = both["comparisons"]["agreement"][BLIMP][f"{out.name}/{members[1]}"]
        write_file(out / AGREEMENT, to_json(agreement))
    if request["tasks"]:  # last, for its results.json stays; what is known is not computed again
        score([str(out / "members" / member) for member in request["members"]], request["tasks"])


def _train(run: Run, out: Path, device: str) -> None:
    """Goes on with what is there, or starts anew where that is of another configuration, text or version."""
    if (out / "run.yaml").is_file() and not (out / "results.json").exists():
        try:
            train(run, out, resume=True, device=device)
            return
        except NonFiniteError:
            raise
        except UserError as error:
            print(f"starting anew: {error}", file=sys.stderr)
    train(run, out, fresh=(out / "run.yaml").is_file(), device=device)


def _has_all(out: Path, members: Sequence[str]) -> bool:
    """Whether a finished run with all these members is there."""
    try:
        return set(members) <= json.loads((out / "results.json").read_text(encoding="utf-8"))["members"].keys()
    except (OSError, ValueError):
        return False


def _stop_without(study: int) -> None:
    """Stops this process, which saves what is under way, once it is no child of the process `study` any more: one that
    was killed could not stop it."""
    while os.getppid() == study:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Entry point of the process."""
    file = Path(sys.argv[1])
    request = json.loads(file.read_text(encoding="utf-8"))
    Thread(target=_stop_without, args=[request["study"]], daemon=True).start()
    try:
        with locked(file.with_suffix(".lock")):  # an orphan of a study that was killed may still be saving
            work(request)
    except Stopped:
        sys.exit(STOPPED)
    except NonFiniteError as error:
        print(error, file=sys.stderr)
        sys.exit(NOT_FINITE)
    except (UserError, MachineError) as error:
        print(one_line(error), file=sys.stderr)
        sys.exit(1 if isinstance(error, MachineError) else AS_ASKED)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(one_line(error), file=sys.stderr)
        sys.exit(NO_MEMORY)


if __name__ == "__main__":
    main()
