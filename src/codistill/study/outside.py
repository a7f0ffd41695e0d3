"""The models from outside a study that its arms begin from, and divergences of one's own. A key has only the place of
such a thing, where another may lie tomorrow: what lay there is recorded in every cell that came of it, under a name for
the place that says nothing of somebody's disk but its last part.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codistill.errors import UserError, first_line
from codistill.own_code import file_of
from codistill.provenance import file_hash, model_hash, own_divergences, pre_trained, recorded_model
from codistill.study.arms import Arm
from codistill.study.cells import Cell


def outside_of(arms: Sequence[Arm]) -> dict[tuple[str, str, int], dict[str, str]]:
    """By place of an arm the models from outside that it, or what it needs, begins from: name → path."""
    by_place, found = {arm.place: arm for arm in arms}, dict[tuple[str, str, int], dict[str, str]]()

    def of(arm: Arm) -> dict[str, str]:
        if arm.place not in found:
            models = own_models(arm)
            for name in arm.needs:
                models |= of(by_place[arm.regime, name, arm.seed])
            found[arm.place] = models
        return found[arm.place]

    return {arm.place: of(arm) for arm in arms}


def own_models(arm: Arm) -> dict[str, str]:
    """Name → path of the models from outside that `arm` itself begins from, and of its edges' own Python files."""
    files = (str(file_of(spec)) for spec in own_divergences(arm.run))
    return {_name(path): path for path in (*_own(arm).values(), *files)}


def recorded(arm: Arm, names: Mapping[str, str], facts: Mapping[str, Any]) -> dict[str, str]:
    """Name → content of what `arm` itself began from, by the provenance `facts` of its run; `names`: role → member
    there."""
    models = {_name(path): recorded_model(facts, names[role]) for role, path in _own(arm).items()}
    return models | {_name(str(file_of(spec))): facts["divergences"][spec] for spec in own_divergences(arm.run)}


def content_now(paths: Mapping[str, str], needed: Sequence[str]) -> dict[str, str]:
    """Name → content of what lies at these `paths` now. UserError where one of the `needed` is not there; of
    the others those are left out."""
    found = {}
    for name, path in paths.items():
        try:
            found[name] = file_hash(Path(path)) if path.endswith(".py") else model_hash(os.path.expanduser(path))
        except (OSError, ValueError) as error:
            if name in needed:
                raise UserError(
                    f"nothing can be read at {path!r}, which an arm begins from: {first_line(error)}"
                ) from None
    return found


def check_same_models(cells: Sequence[Cell], now: Mapping[str, str] | None = None) -> None:
    """UserError when finished cells began from different models in one place, or from others than lie there `now`: they
    cannot stand in one table."""
    found: dict[str, dict[str | None, str]] = {}
    for cell in cells:
        for name, content in {} if cell["failed"] else cell.get("outside", {}).items():
            whose = f"{cell['arm']}, seed {cell['seed']}" + ("" if content else " (not recorded)")
            found.setdefault(name, {}).setdefault(content, whose)
    for name, content in (now or {}).items():
        found.setdefault(name, {}).setdefault(content, "what is trained now")
    for name, of in found.items():
        if len(of) > 1:
            first, second, *_ = of.values()
            raise UserError(
                f"{first} and {second} begin from different models or code in one place ({name.rpartition('-')[0]}); "
                "they cannot be compared: bring the first one back, or give another --out"
            )


def _own(arm: Arm) -> dict[str, str]:
    """Member → its model from outside."""
    inside = {**arm.taught_by, **arm.begun_from}
    return {role: path for role, path in pre_trained(arm.run).items() if role not in inside}


def _name(path: str) -> str:
    return f"{Path(path).name}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
