"""What the finished models of a study are scored on, beside their held-out loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLIMP = "blimp"
# Without WNLI, whose development set is built against its training set, as both papers report it.
GLUE = tuple(f"glue/{name}" for name in ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"))


@dataclass(frozen=True)
class Scoring:
    """`tasks`: of `codistill evaluate`; `pairs`: of each paradigm of BLiMP, None for all; `data`: the folder with
    blimp/ and glue/, None where nothing is scored."""

    tasks: tuple[str, ...] = ()
    pairs: int | None = None
    data: Path | None = None


def found_in(data: Path | None, tasks: tuple[str, ...], pairs: int | None) -> Scoring:
    """Those of `tasks` whose examples are in the folder `data`."""
    there = tuple(task for task in tasks if data is not None and list((data / task).glob("*.parquet")))
    return Scoring(there, pairs, data if there else None)


def score_of(member: Mapping[str, Any], task: str) -> Mapping[str, Any] | None:
    """What a cell says of a member at a task: `score` from 0 to 1 (a correlation from −1), or `failed`; None if it was
    not asked."""
    if task == BLIMP:
        return member["blimp"]
    return member.get("glue", {}).get(task.removeprefix("glue/"))


def is_scored(member: Mapping[str, Any], tasks: tuple[str, ...]) -> bool:
    """Whether a member of a cell was asked every one of `tasks`. That one failed is an answer, and comes again."""
    return all(score_of(member, task) is not None for task in tasks)


def with_scores(cell: dict[str, Any], known: Mapping[str, Any] | None) -> dict[str, Any]:
    """`cell`, the scores it lacks taken from `known`, a cell of the same arm, text and models."""
    if known is None or known["failed"] or known["text"] != cell["text"]:
        return cell
    if known.get("outside", {}) != cell.get("outside", {}):
        return cell
    members = {
        role: member | {"blimp": member["blimp"] or old["blimp"], "glue": old.get("glue", {}) | member["glue"]}
        for role, member in cell["members"].items()
        for old in [known["members"][role]]
    }
    agreement = known["agreement"] if cell["agreement"] is None else cell["agreement"]
    return cell | {"members": members, "agreement": agreement}
