"""From cells to a study's numbers: means over seeds, paired differences with intervals, and what cannot be said.

Everything here is a function of the cells alone, so that a table can be made again from what is committed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from codistill.evaluate.compare import holm, t_interval, t_probability
from codistill.study.cells import Cell
from codistill.study.design import Contrast, Study
from codistill.study.scoring import BLIMP, GLUE, score_of

BELOW_UNIGRAM = 1.5  # nats that a stand-alone model must be below the unigram loss: above, it has learned no language
_SAME_TIME = 0.02  # of a run: looks at curves that are further apart are not compared
OVERFITS = 0.02  # nats that a model ends above its best
METRICS = ("loss", "blimp", "glue")
SHOWN = ("lower", "higher")  # verdicts of a difference whose interval excludes 0


def analysis(study: Study, scale: str, arms: int, cells: Sequence[Cell]) -> dict[str, Any]:
    """The contents of OUT/results.json: by regime the rows of the table, the contrasts, and warnings. `arms`: how many
    the study has, of all seeds; those without a cell are not trained yet."""
    regimes = list(dict.fromkeys(cell["regime"] for cell in cells))
    done = [cell for cell in cells if not cell["failed"]]
    return _rounded(
        {
            "study": study.name,
            "question": study.question,
            "scale": scale,
            "arms": arms,
            "missing": arms - len(cells),
            "regimes": _corrected({of: _regime(study, [c for c in cells if c["regime"] == of]) for of in regimes}),
            "failed": _failures(cells),
            "text": done[0]["text"] if done else None,
            "partial": _partial(done),
            "machines": _distinct({**c["machine"], "precision": c["precision"]} for c in done),
            "versions": _distinct(cell["versions"] for cell in done),
            "dates": sorted({cell["date"] for cell in done}),
        }
    )


def _regime(study: Study, cells: Sequence[Cell]) -> dict[str, Any]:
    by = _by_member(cells)
    done = [cell for cell in cells if not cell["failed"]]
    return {
        "steps": _range(cell["steps"] for cell in done),
        "tokens": _range(cell["tokens"] for cell in done),
        "passes": _range(cell["passes"] for cell in done),
        "unigram_loss": float(np.mean([cell["unigram_loss"] for cell in done])) if done else None,
        "rows": {name: _row(of) for name, of in by.items()},
        "contrasts": [contrast(c, by) for c in study.contrasts if _is_asked(c, cells)],
        "along": _along(study, by) if study.along else [],
        "at_best": _at_best(study, by),
        "on_the_plateau": _on_the_plateau(by),
    }


def _corrected(regimes: dict[str, Any]) -> dict[str, Any]:
    """With `holm` at each contrast: whether its difference of the loss is still shown when all of the study's count."""
    tested = [c for of in regimes.values() for c in of["contrasts"] if c["p"] is not None]
    for c, is_shown in zip(tested, holm([c["p"] for c in tested]), strict=True):
        c["holm"] = is_shown
    return regimes


def _by_member(cells: Sequence[Cell]) -> dict[str, dict[int, dict[str, Any]]]:
    """ "ARM/ROLE" → seed → what is known of that model; arms that failed are not there."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in cells:
        for role, member in cell["members"].items():
            more = {"unigram_loss": cell["unigram_loss"]}
            more |= {"agreement": cell["agreement"]} if len(cell["members"]) == 2 else {}
            found.setdefault(f"{cell['arm']}/{role}", {})[cell["seed"]] = member | more
    return found


def _row(of: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    members = list(of.values())
    agreement = [m["agreement"] for m in members if m.get("agreement") is not None]
    return {
        "seeds": sorted(of),
        "parameters": members[0]["parameters"],
        "flops": int(np.mean([sum(m["flops"].values()) for m in members])),
        "teacher_flops": int(np.mean([m["flops"]["teachers"] for m in members])),
        "seconds": float(np.mean([m["seconds"] for m in members])),
        **{metric: spread_of([_score(m, metric) for m in members]) for metric in METRICS},
        "tasks": {task: spread_of([_percent(score_of(m, task)) for m in members]) for task in _tasks_of(members)},
        "agreement": float(np.mean(agreement)) if agreement else None,
    }


def _score(member: Mapping[str, Any], metric: str) -> float | None:
    """Loss in nats; in percent BLiMP, and the mean over the tasks of GLUE; None where it is not known."""
    if metric == "loss":
        return member["loss"]
    if metric == "blimp":
        return _percent(score_of(member, BLIMP))
    found = [_percent(score_of(member, task)) for task in GLUE]
    known = [score for score in found if score is not None]
    return float(np.mean(known)) if len(known) == len(found) else None


def _percent(found: Mapping[str, Any] | None) -> float | None:
    return None if found is None or "failed" in found else 100 * found["score"]


def _tasks_of(members: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tasks of GLUE that any was scored on."""
    return [task for task in GLUE if any(score_of(member, task) for member in members)]


def spread_of(values: Iterable[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation of the values that are known."""
    known = [value for value in values if value is not None]
    return {
        "mean": float(np.mean(known)) if known else None,
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
    }


def _is_asked(wanted: Contrast, cells: Sequence[Cell]) -> bool:
    """Whether all that it compares has cells in this regime, if only failed ones."""
    arms = {cell["arm"] for cell in cells}
    return {name.rpartition("/")[0] for name in wanted.names} <= arms


def contrast(wanted: Contrast, by: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Treated − control over the seeds that both have: mean, 95 % Student-t interval over seeds, what that shows; of
    the loss the paired t-test's `p` too."""
    found: dict[str, Any] = {"label": wanted.label, "treated": wanted.treated, "control": wanted.control}
    if wanted.than is not None:
        found["than"] = {"treated": wanted.than.treated, "control": wanted.than.control}
    for metric in METRICS:
        found[metric] = difference_of(_differences(wanted, by, partial(_score, metric=metric)))
    losses = _differences(wanted, by, partial(_score, metric="loss"))
    return found | {"p": t_probability(losses) if len(losses) > 1 else None, "holm": False}


def _differences(
    wanted: Contrast,
    by: Mapping[str, Mapping[int, Mapping[str, Any]]],
    value: Callable[[Mapping[str, Any]], float | None],
) -> list[float]:
    """What is asked of `value`, for each seed for which it is known of all models."""
    found = []
    for seed in _seeds_of(wanted, by):
        values = [(value(by[name][seed]), sign) for name, sign in wanted.terms]
        known = [sign * one for one, sign in values if one is not None]
        found += [sum(known)] if len(known) == len(values) else []
    return found


def _seeds_of(wanted: Contrast, by: Mapping[str, Mapping[int, Any]]) -> list[int]:
    """The seeds that all models of a contrast have."""
    return sorted(set.intersection(*(set(by.get(name, ())) for name in wanted.names)))


def _along(study: Study, by: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The contrasts of the loss at every point of the learning curves."""
    found = []
    for wanted in study.contrasts:
        curves = {s: [(by[name][s]["curve"], sign) for name, sign in wanted.terms] for s in _seeds_of(wanted, by)}
        if not wanted.names <= by.keys():
            continue
        all_curves = [curve for of in curves.values() for curve, _ in of]
        points = []
        for at in range(min(map(len, all_curves), default=0)):
            shares = [curve[at][0] / curve[-1][0] for curve in all_curves]
            if max(shares) - min(shares) > _SAME_TIME:
                break  # looks at other times cannot be compared
            losses = [sum(sign * curve[at][1] for curve, sign in of) for of in curves.values()]
            points.append({"share": shares[0], "loss": difference_of(losses)})
        # The last look before the end may be the end, but for a few steps.
        told = [point for point in points if point["share"] in (points[-1]["share"], min(point["share"], 0.99))]
        found.append({"label": wanted.label, "points": told})
    return found


def _at_best(study: Study, by: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The contrasts of the loss with each model at the best point of its learning curve, as if training had stopped
    there, if any of their models overfits."""
    asked = [c for c in study.contrasts if _seeds_of(c, by)]
    names = {name for c in asked for name in c.names}
    if not any(np.mean([m["loss"] - _best(m) for m in by[name].values()]) >= OVERFITS for name in names):
        return []
    return [{"label": c.label, "loss": difference_of(_differences(c, by, _best))} for c in asked]


def _best(member: Mapping[str, Any]) -> float:
    return min([member["loss"], *(loss for _, loss in member["curve"])])


def difference_of(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % Student-t interval of paired differences, one for each seed, and what they show."""
    interval = t_interval(values) if len(values) > 1 else None
    return {
        "seeds": len(values),
        "mean": float(np.mean(values)) if values else None,
        "interval": interval,
        "verdict": _verdict(values, interval),
    }


def _verdict(values: Sequence[float], interval: tuple[float, float] | None) -> str:
    if not values:
        return "not known"
    if interval is None:
        return "a single run"
    low, high = interval
    return "lower" if high < 0 else "higher" if low > 0 else "not shown"


def _on_the_plateau(by: Mapping[str, Mapping[int, Any]]) -> list[dict[str, Any]]:
    """Stand-alone models, teachers' own runs among them, that ended less than `BELOW_UNIGRAM` below the unigram loss of
    what they were scored on, with how far they had come at their `best`: what was further and came back overfits."""
    with_edges = {name.rpartition("/")[0] for name, of in by.items() if any(m["teachers"] for m in of.values())}
    found = []
    for name, of in by.items():
        for seed, member in sorted(of.items()) if name.rpartition("/")[0] not in with_edges else ():
            below = member["unigram_loss"] - member["loss"]
            if below < BELOW_UNIGRAM:
                best = member["unigram_loss"] - _best(member)
                found.append({"member": name, "seed": seed, "below": below, "best": best})
    return found


def _failures(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Arms that failed, and members that could not be scored, with the reasons."""
    found = []
    for cell in cells:
        place = {name: cell[name] for name in ("arm", "regime", "seed")}
        if cell["failed"]:
            found.append(place | {"failed": cell["failed"]})
        for role, member in cell["members"].items():
            scores = {task: score_of(member, task) or {} for task in (BLIMP, *GLUE)}
            reasons = {task: of["failed"] for task, of in scores.items() if "failed" in of}
            found += [place | {"failed": f"{task} of {role}: {why}"} for task, why in reasons.items()]
    return found


def _partial(cells: Sequence[Cell]) -> dict[str, dict[str, str]]:
    """Tasks of GLUE whose splits were not as long as the official ones: split → how much of it there was."""
    scores = ((task, score_of(m, task) or {}) for cell in cells for m in cell["members"].values() for task in GLUE)
    return {task: of["partial"] for task, of in scores if of.get("partial")}


def _range(values: Iterable[float]) -> list[float]:
    known = sorted(set(values))
    return [known[0], known[-1]] if known else []


def _distinct(values: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _rounded(value: Any) -> Any:
    """To ten decimals: mathematical libraries differ in the last digits, and a table should not."""
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return round(value, 10) if isinstance(value, float) else value
