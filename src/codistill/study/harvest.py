"""From a finished run's folder to cells, and the models that others need."""

import datetime
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from codistill.files import atomic_folder
from codistill.loading import load, read_run
from codistill.metrics import read_metrics
from codistill.study.arms import Arm
from codistill.study.cells import Cell
from codistill.study.outside import recorded
from codistill.study.scoring import BLIMP, GLUE

AGREEMENT = "agreement.json"  # in a run's folder: arm → how often its two trained members agree


def harvest(
    arm: Arm,
    key: str,
    names: Mapping[str, str],
    folder: Path,
    models: Path,
    kept: Collection[str],
    inherited: Mapping[str, str],
) -> Cell:
    """The cell of `arm` from the run in `folder`, of which it may be a part; `names`: role → member there. The models
    of the roles `kept` are copied to `models`/ROLE. `inherited`: what the cells of the arms that it needs say of models
    from outside."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    run = load(read_run(folder / "run.yaml"))
    facts = run.provenance or {}
    for role in kept:
        with atomic_folder(models / role) as fresh:
            shutil.copytree(folder / "members" / names[role], fresh, dirs_exist_ok=True)
    return {
        **_named(arm, key, ""),
        "text": {split: of["identity"] for split, of in facts["data"].items()},
        "text_names": [Path(pattern).parent.name for pattern in run.data.train],  # --data/text/NAME/train*.parquet
        "outside": {**recorded(arm, names, facts), **inherited},
        "unigram_loss": results["held_out"]["unigram_loss"],
        **{name: results[name] for name in ("steps", "tokens", "passes", "precision")},
        "machine": facts["machine"],
        "versions": facts["versions"],
        "date": datetime.date.today().isoformat(),
        "members": {role: _member(arm, role, names[role], folder, results) for role in arm.run.trained},
        "agreement": _agreement(arm, folder),
    }


def failed_cell(arm: Arm, key: str, reason: str) -> Cell:
    """A cell without scores, and why."""
    return {**_named(arm, key, reason), "members": {}}


def _named(arm: Arm, key: str, failed: str) -> Cell:
    return {"key": key, "arm": arm.name, "regime": arm.regime, "seed": arm.seed, "failed": failed}


def _member(arm: Arm, role: str, name: str, folder: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    found = results["members"][name]
    shown = ("loss", "accuracy", "parameters", "flops", "seconds")
    return {
        **{key: found[key] for key in shown},
        "teachers": sorted({edge.teacher for edge in arm.run.distillation if edge.student == role}),
        "curve": _curve(folder, name, results["tokens"] / results["steps"]),
        "blimp": _blimp(folder, name),
        "glue": _glue(folder, name),
    }


def _curve(folder: Path, name: str, tokens_per_step: float) -> list[tuple[int, float]]:
    """(tokens, held-out loss) along training."""
    lines = (line for line in read_metrics(folder / "metrics.jsonl") if "held_out" in line)
    points = {round(line["step"] * tokens_per_step): line["held_out"][name]["loss"] for line in lines}
    return sorted((tokens, loss) for tokens, loss in points.items() if loss is not None)


def _blimp(folder: Path, name: str) -> dict[str, Any] | None:
    """The share of pairs judged right; None if it was not asked."""
    cell = next((cell for cell in _scores(folder, name) if cell["task"] == BLIMP), None)
    if cell is None or cell["failed"]:
        return cell and {"failed": cell["failed"]}
    return {"score": cell["score"], "pairs": cell["counted"]["pairs"]}


def _glue(folder: Path, name: str) -> dict[str, Any]:
    """Task → its score and which of its splits are not whole, or why there is none."""
    return {c["task"].removeprefix("glue/"): _graded(c) for c in _scores(folder, name) if c["task"] in GLUE}


def _graded(cell: Mapping[str, Any]) -> dict[str, Any]:
    if cell["failed"]:
        return {"failed": cell["failed"]}
    if isinstance(cell["score"], str):  # as a number that is none is written
        return {"failed": f"its score is {cell['score']}: the predictions are all alike"}
    return {"score": cell["score"], "partial": cell["counted"]["partial"]}


def _scores(folder: Path, name: str) -> list[dict[str, Any]]:
    """The cells of a member in what `codistill evaluate` found."""
    file = folder / "scores" / "results.json"
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"] if file.exists() else []
    return [cell for cell in cells if cell["model"] == f"{folder.name}/{name}"]


def _agreement(arm: Arm, folder: Path) -> float | None:
    """The share of BLiMP's pairs that the two trained members of an arm judge alike; None where there are not two."""
    file = folder / AGREEMENT
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found.get(arm.name)
