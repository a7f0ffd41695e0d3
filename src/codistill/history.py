"""What a resumption changed in a run's settings, and the run as it was before: what it took is what its parts took."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from codistill.config import Run
from codistill.loading import load, to_dict


def differing(old: Run, new: Run) -> dict[str, tuple[Any, Any]]:
    """Every setting that is not the same in both, as it was and as it is, by its dotted name; None where there is
    none."""
    was, now = settings_of(old), settings_of(new)
    keys = sorted(was.keys() | now.keys())
    return {key: (was.get(key), now.get(key)) for key in keys if was.get(key) != now.get(key)}


def settings_of(run: Run) -> dict[str, Any]:
    """What a run's numbers are made of, by dotted names."""
    return _flat(to_dict(replace(run, provenance=None, distributed="auto", track=[])))


class Part(NamedTuple):
    """The steps from `first` up to `last`, which is not one of them, and the run with the settings of then."""

    first: int
    last: int
    run: Run


def parts(run: Run, steps: int) -> list[Part]:
    """The first `steps` steps of `run`, cut where its `provenance.changed` says that a resumption changed a setting."""
    found: list[Part] = []
    for change in reversed((run.provenance or {}).get("changed", [])):
        begun = min(change["from_step"], steps)
        found.insert(0, Part(begun, steps, run))
        run, steps = _before(run, change["was"]), begun
    return [part for part in (Part(0, steps, run), *found) if part.first < part.last]


def tokens_by(run: Run, step: int) -> int:
    """Tokens of text in the first `step` steps."""
    return sum((last - first) * then.batch.sequences * then.data.length for first, last, then in parts(run, step))


def _before(run: Run, was: dict[str, Any]) -> Run:
    """`run` with the settings that it had: `was` is the first of each pair of `differing`."""
    now = settings_of(run)
    nulls = {key for key, value in now.items() if value is None and key not in was}  # what a twin has not
    return load(_tree({key: value for key, value in (now | was).items() if value is not None or key in nulls}))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        return _flat(dict(enumerate(tree)), prefix)
    return {prefix[:-1]: tree}


def _tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The tree that `_flat` was made of."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *above, last = name.split(".")
        place = tree
        for key in above:
            place = place.setdefault(key, {})
        place[last] = value
    return _with_numbers(tree)


def _with_numbers(tree: Any) -> Any:
    """With the edges as a list again, and the steps of a schedule as numbers."""
    if not isinstance(tree, dict):
        return tree
    found = {key: _with_numbers(value) for key, value in tree.items()}
    if isinstance(edges := found.get("distillation"), dict):
        found["distillation"] = [edges[key] for key in sorted(edges, key=int)]
    if isinstance(marks := found.get("step"), dict):
        found["step"] = {int(key): value for key, value in marks.items()}
    return found
