"""What a process of its own does for a study: train one cohort, then score its members. Its last line of standard error
says why it failed; statuses are those of the command line.

    python -m codistill.study.worker REQUEST.json
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from codistill.errors import MachineError, UserError
from codistill.evaluate.run import evaluate
from codistill.files import write_file
from codistill.loading import load, read_run
from codistill.study.harvest import AGREEMENT
from codistill.train import Stopped, train

STOPPED = 75


def work(request: dict[str, Any]) -> None:
    """Trains the run of the file `run` in the folder `out`, going on where it was left, and scores BLiMP there.

    `data`: a folder with blimp/, or None; `pairs`: of each paradigm; `members`: whom to score; `peers`: arm → its two
    trained members, whose judgements are compared. What is finished is not done again.
    """
    out = Path(request["out"])
    if not (out / "results.json").exists():
        begun = (out / "run.yaml").is_file()
        train(load(read_run(Path(request["run"]))), out, resume=begun, device=request["device"])
    if request["data"] is not None:
        scores = out / "scores"
        score = partial(evaluate, out=scores, data=request["data"], limit=request["pairs"], device=request["device"])
        agreement = {}
        for arm, members in request["peers"].items():
            both = score([str(out / "members" / member) for member in members], ["blimp"])
            agreement[arm] = both["comparisons"]["agreement"]["blimp"][f"{out.name}/{members[1]}"]
        write_file(out / AGREEMENT, json.dumps(agreement))
        # Last, for its results.json stays; what is known is not computed again.
        score([str(out / "members" / member) for member in request["members"]], ["blimp"])


def main() -> None:
    """Entry point of the process."""
    try:
        work(json.loads(Path(sys.argv[1]).read_text()))
    except Stopped:
        sys.exit(STOPPED)
    except (UserError, MachineError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(1 if isinstance(error, MachineError) else 2)


if __name__ == "__main__":
    main()
