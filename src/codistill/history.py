"""What a resumption changed in a run's settings and inputs, and the run as it was before: all its parts count."""

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


# What of the provenance must be as it was for a run to go on with the same bits. Another machine is not refused.
DETERMINING = ("data", "tokenizer", "special_tokens", "members", "configurations", "divergences", "versions")
# What decides beside the text which held-out tokens are scored; a loss on others is another quantity.
SCORED = ("data.length", "data.packing", "data.within_documents", "objective", "evaluate.sequences", "seed")
_SCORED_INPUTS = ("data.validation", "tokenizer", "special_tokens")


def changed(old: Run, new: Run, first: int) -> list[dict[str, Any]]:
    """`provenance.changed` of `new`, which goes on at step `first` with what was `old`: from which step on which
    settings (`was`) and which facts of the provenance (`inputs`) were others before."""
    # A run that goes on from before a change computes what came after it anew, with the settings of now.
    past = [part | {"from_step": min(part["from_step"], first)} for part in (old.provenance or {}).get("changed", [])]
    part: dict[str, Any] = {"from_step": first, "was": {key: was for key, (was, _) in differing(old, new).items()}}
    if inputs := _differing_inputs(old.provenance or {}, new.provenance or {}):
        part["inputs"] = inputs
    return [*past, part] if first and (part["was"] or inputs) else past


def scored_from(run: Run) -> int:
    """The step after which all held-out losses of `run` are of the same tokens."""
    parts = reversed((run.provenance or {}).get("changed", []))
    return next((part["from_step"] for part in parts if _scores_otherwise(part)), 0)


def _scores_otherwise(part: Mapping[str, Any]) -> bool:
    kinds = ((part["was"], SCORED), (part.get("inputs", {}), _SCORED_INPUTS))
    return any(f"{key}.".startswith(f"{name}.") for found, names in kinds for key in found for name in names)


def _differing_inputs(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What was known of the inputs and is not so any more, by dotted name."""
    known = [key for key in DETERMINING if old.get(key) is not None]
    was, now = (_flat({key: facts.get(key) for key in known}) for facts in (old, new))
    return {key: was.get(key) for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)}


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


def sequences_by(run: Run, step: int) -> int:
    """Sequences in the first `step` steps."""
    return sum((last - first) * then.batch.sequences for first, last, then in parts(run, step))


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
    if isinstance(edges := tree.get("distillation"), dict):
        tree["distillation"] = [edges[key] for key in sorted(edges, key=int)]
    return _with_steps(tree)


def _with_steps(tree: Any) -> Any:
    """With the steps of schedules as numbers again; a member may be called `step` too."""
    if isinstance(tree, list):
        return [_with_steps(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    found = {key: _with_steps(value) for key, value in tree.items()}
    marks = found.get("step")
    if isinstance(marks, dict) and all(key.isdecimal() for key in marks):
        found["step"] = {int(key): value for key, value in marks.items()}
    return found
