"""What a page says of several runs: means over seeds, paired differences with intervals, and differing settings."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from codistill.blocks import Block, Heading, Listing, Table, Text
from codistill.report.groups import Finished, Group, comparable, differences
from codistill.report.run import groups_figure, skipped_steps, taught_by
from codistill.report.sections import picture
from codistill.study.analysis import difference_of, spread_of
from codistill.study.page import difference, span, spread

_HASH = 12  # digits of a content's hash that tell it from others


def comparison(groups: Sequence[Group]) -> list[Block]:
    """Tables over all groups: each member's loss over seeds, what teaching and settings changed, and the settings."""
    found = comparable(groups)
    count = sum(len(group.runs) + len(group.again) for group in groups)
    several = f"{len(groups)} groups; those of a group are" if len(groups) > 1 else "one group, which are"
    blocks: list[Block] = [
        Heading("Runs together"),
        Text(
            f"{count} runs in {several} equal but for the seed. Losses are those of held-out text, mean ± standard "
            "deviation over seeds; differences are paired, seed by seed, with Student's 95 % interval over seeds. "
            "Lower or higher is what the interval shows, each by itself; not shown: it holds 0."
        ),
        *_not_compared(found),
    ]
    for number, together in enumerate(found, start=1):
        if len(found) > 1:
            blocks.append(Heading(" and ".join(group.name for group in together), 3))
        blocks += [_losses(together), *_between(together)]
        if sum(len(group.runs) for group in together) > 1:  # a single run's own section has its curves
            blocks += picture(f"groups-{number}.svg", _figure(together), "Held-out loss along training.")
    return [*blocks, *_settings(groups), *_made(groups)]


def group_section(group: Group) -> list[Block]:
    """The runs of a group with more than one: a row for each member of each, and the configuration of all."""
    runs = sorted([*group.runs, *group.again], key=lambda run: run.run.seed)
    rows = [[run.name, str(run.run.seed), *cells] for run in runs for cells in run.table.rows]
    seeds = ", ".join(str(run.run.seed) for run in group.runs)
    facts = (
        f"{len(runs)} runs of {_range(runs, 'steps', ',')} steps, {_range(runs, 'tokens', ',')} tokens, "
        f"{_range(runs, 'seconds', '.0f')} s in {group.first.run.precision}, seeds {seeds}. Unigram cross-entropy of "
        f"the {_range(runs, 'rows', ',')} held-out tokens: {_range(runs, 'unigram_loss', '.3f')} nats."
    )
    told = [f"{run.name}: {words}" for run in runs if (words := skipped_steps(run.results))]
    stopped = [run.name for run in runs if run.results.get("stopped_early")]
    return [
        Heading(f"Runs {group.name}"),
        Text(facts),
        *([Text(f"Stopped early: {', '.join(stopped)}.")] if stopped else []),
        *(Text(words, important=True) for words in [*told, *_again(group)]),
        Table(["run", "seed", *group.first.table.head], rows, words=(2, 3)),
        Listing(
            f"the resolved configuration, of seed {group.first.run.seed}; all but the seed is that of seeds {seeds}",
            (group.first.folder / "run.yaml").read_text(encoding="utf-8"),
        ),
    ]


# ---- tables over groups ------------------------------------------------------------------------


def _losses(groups: Sequence[Group]) -> Table:
    """Each member's loss over seeds; of taught ones the difference to the same model trained alone."""
    has_twins = any(group.first.alone for group in groups)
    head = ["group / member", "taught by", "seeds", "loss, nats"]
    head += ["loss vs. alone", "95 % interval", "shown"] if has_twins else []
    return Table(head, [_row(group, name, has_twins) for group in groups for name in group.first.losses], (1, 2, 5, 6))


def _row(group: Group, name: str, has_twins: bool) -> list[str]:
    losses = group.losses(name)
    row = [f"{group.name} / {name}", taught_by(group.first.results["members"][name]), _seeds(group, losses)]
    row.append(spread(spread_of(losses.values()), 3) or "no number")
    if not has_twins:
        return row
    twin = group.first.alone.get(name)
    return [*row, *(_paired(losses, group.losses(twin), len(losses)) if twin else ["", "", ""])]


def _seeds(group: Group, losses: Mapping[int, float]) -> str:
    """How many seeds a mean is of, and those whose loss is no number."""
    missing = [str(run.run.seed) for run in group.runs if run.run.seed not in losses]
    if missing:
        return f"{len(losses)} of {len(group.runs)}; no number: seed{'s' * (len(missing) > 1)} {', '.join(missing)}"
    return str(len(losses)) if len(losses) > 1 else "a single run"


def _paired(one: Mapping[int, float], other: Mapping[int, float], expected: int | None = None) -> list[str]:
    """one − other over the seeds that both have, as cells, which say where these are not the `expected` number."""
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return ["", "", "no seed in common" if one and other else "no number"]
    return difference(difference_of([one[seed] - other[seed] for seed in seeds]), 3, expected)


def _between(groups: Sequence[Group]) -> list[Block]:
    """The differences of the other groups to the first, of members of one name that either trained."""
    if len(groups) == 1:
        return []
    first = groups[0]
    rows = [
        _difference(group, first, name)
        for group in groups[1:]
        for name in group.first.losses
        if name in first.first.losses and name in {*group.first.run.trained, *first.first.run.trained}
    ]
    if not rows:
        return [Text("No two of these groups have a member of one name, so there is no difference between them.")]
    head = ["groups", "member", "seeds of both", "Δ loss, nats", "95 % interval", "shown"]
    return [Text(f"Members of one name, against {first.name}:"), Table(head, rows, words=(1, 4, 5))]


def _difference(group: Group, first: Group, name: str) -> list[str]:
    one, other = group.losses(name), first.losses(name)
    return [f"{group.name} − {first.name}", name, str(len(one.keys() & other.keys())), *_paired(one, other)]


def _figure(groups: Sequence[Group]) -> Callable[[], Any]:
    return lambda: groups_figure({group.name: [run.folder for run in group.runs] for group in groups})


# ---- what differs ------------------------------------------------------------------------------


def _not_compared(found: Sequence[Sequence[Group]]) -> list[Block]:
    """Which groups are scored on other tokens than the first, and by which settings."""
    first = found[0][0]
    blocks: list[Block] = []
    for groups in found[1:]:
        names = " and ".join(group.name for group in groups)
        settings = ", ".join(differences([first.first.scored_on, groups[0].first.scored_on]))
        told = f"Not compared with {first.name}: {names}, whose losses are of other held-out tokens: {settings} differ"
        blocks.append(Text(f"{told}{'' if ', ' in settings else 's'}.", important=True))
    return blocks


def _settings(groups: Sequence[Group]) -> list[Block]:
    if len(groups) == 1:
        return []
    found = differences([group.first.settings for group in groups])
    rows = [
        [key, *(_value(key, value, group.first) for value, group in zip(values, groups, strict=True))]
        for key, values in found.items()
    ]
    words = tuple(range(1, len(groups) + 1))
    return [
        Text("The settings in which the groups differ:"),
        Table(["setting", *(g.name for g in groups)], rows, words),
    ]


def _value(key: str, value: Any, run: Finished) -> str:
    """A setting's value as it is written in YAML; of text its content and where it lies."""
    if value is None:
        return "none"
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    *_, kind, name = key.split(".")
    if kind == "data" and key.startswith("provenance."):
        return f"{value[:_HASH]} ({', '.join(getattr(run.run.data, name))})"
    return value[:_HASH] if key.startswith("provenance.") else value


def _made(groups: Sequence[Group]) -> list[Block]:
    """The machines and versions, where they are not the same for all runs: those change the last digits, and training
    amplifies them."""
    facts = [run.run.provenance or {} for group in groups for run in group.runs]
    found: dict[str, list[str]] = {}
    for kind in ("machine", "versions"):
        for key in dict.fromkeys(key for of in facts for key in of.get(kind, {})):
            values = list(dict.fromkeys(str(of.get(kind, {}).get(key, "unknown")) for of in facts))
            if len(values) > 1:
                found[key] = values
    told = "; ".join(f"{key} {' and '.join(values)}" for key, values in found.items())
    return [Text(f"The runs were not all made alike: {told}.", important=True)] if found else []


def _again(group: Group) -> list[str]:
    of = {run.run.seed: run.name for run in group.runs}
    return [
        f"{run.name} repeats {of[run.run.seed]}, with the same settings and seed: it is in no mean."
        for run in group.again
    ]


def _range(runs: Sequence[Finished], key: str, style: str) -> str:
    return span(sorted({run.facts[key] for run in runs}), style)
