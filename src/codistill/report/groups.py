"""Finished runs as groups, equal but for the seed: what groups differ in, and which of them can be compared."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from codistill.blocks import Table
from codistill.config import Checkpointing, Logging, Run
from codistill.errors import UserError
from codistill.history import SCORED, settings_of
from codistill.loading import load, read_run
from codistill.report.run import untaught_twins
from codistill.report.sections import members_table, results_of

_VALIDATION = "provenance.data.validation"
_OF_RUN, _OF_TEXT = ("steps", "tokens", "seconds"), ("rows", "unigram_loss")


@dataclass(frozen=True)
class Finished:
    """A finished run. `settings`: all that its numbers are made of but the seed, by dotted names. `facts`: steps,
    tokens, seconds, and of the held-out text the rows and the unigram loss. `losses`: held-out, in nats, None for what
    is no number; `alone`: taught member → its twin that nobody teaches. `table`: of its members."""

    folder: Path
    run: Run
    results: Mapping[str, Any]
    settings: Mapping[str, Any]
    facts: Mapping[str, float]
    losses: Mapping[str, float | None]
    alone: Mapping[str, str]
    table: Table

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.resolve().name

    @property
    def scored_on(self) -> dict[str, Any]:
        """The settings that the tokens it is scored on depend on."""
        return {k: v for k, v in self.settings.items() if k.startswith((*SCORED, _VALIDATION, "data.validation"))}


@dataclass(frozen=True)
class Group:
    """Runs with all settings in common but the seed: one of each seed, and `again` those of a seed that was there.
    `folders`: of all, as they were given."""

    name: str
    folders: list[Path]
    runs: list[Finished]
    again: list[Finished]

    @property
    def first(self) -> Finished:
        """The run that speaks for the group in what all have in common."""
        return self.runs[0]

    def losses(self, member: str) -> dict[int, float]:
        """Seed → held-out loss, where it is a number."""
        known = {one.run.seed: one.losses.get(member) for one in self.runs}
        return {seed: loss for seed, loss in known.items() if loss is not None}


def grouped(folders: Sequence[Path]) -> list[Group]:
    """The runs in `folders` as groups, in the order in which the first of each was given."""
    alike: list[list[Finished]] = []
    for run in map(_finished, folders):
        group = next((group for group in alike if group[0].settings == run.settings), None)
        if group is None:
            alike.append([run])
        else:
            group.append(run)
    groups = [_group(runs) for runs in alike]
    names = _names([[run.folder.resolve() for run in group.runs] for group in groups])
    return [replace(group, name=name) for group, name in zip(groups, names, strict=True)]


def comparable(groups: Sequence[Group]) -> list[list[Group]]:
    """The groups, those together that are scored on the same tokens."""
    found: list[list[Group]] = []
    for group in groups:
        same = next((of for of in found if of[0].first.scored_on == group.first.scored_on), None)
        if same is None:
            found.append([group])
        else:
            same.append(group)
    return found


def differences(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Every setting that is not the same in all, by its dotted name, with its value in each; None where there is none.

    A member or an edge that only some have is one line, and after it what those who have it differ in.
    """
    found: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for of in settings for key in of):
        part = re.match(r"(members|distillation)\.[^.]+", key)
        there = [part is None or any(k.startswith(f"{part[0]}.") for k in of) for of in settings]
        if part and not all(there):
            found[part[0]] = [_told(of, part[0]) if has else None for of, has in zip(settings, there, strict=True)]
        known = [of.get(key) for of, has in zip(settings, there, strict=True) if has]
        if any(value != known[0] for value in known):
            found[key] = [of.get(key) for of in settings]
    return found


def _told(settings: Mapping[str, Any], part: str) -> str:
    """A member or an edge in a word."""
    teacher, student = (settings.get(f"{part}.{end}") for end in ("teacher", "student"))
    return f"{teacher} → {student}" if teacher else "there"


def _finished(folder: Path) -> Finished:
    with results_of(folder) as results:
        members, held_out = results["members"], results["held_out"]
        # Each a number: + 0 is a TypeError where it is not.
        facts = {name: of[name] + 0 for of, names in ((results, _OF_RUN), (held_out, _OF_TEXT)) for name in names}
        losses = {name: member["loss"] for name, member in members.items()}
        table, alone = members_table(members), untaught_twins(members)
    try:
        run = load(read_run(folder / "run.yaml"))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    return Finished(folder, run, results, dict(_settings(run)), facts, losses, alone, table)


def _settings(run: Run) -> Iterator[tuple[str, Any]]:
    """What must be equal in runs of one group. Text counts by its content and not by where it lies; names of recipes,
    logs and checkpoints change no number."""
    facts = run.provenance or {}
    bare = replace(run, recipe=None, seed=0, checkpoint=Checkpointing(), log=Logging())
    if "data" in facts:
        bare = replace(bare, data=replace(bare.data, train=[], validation=[]))
    yield from settings_of(bare).items()
    for split, of in facts.get("data", {}).items():
        yield f"provenance.data.{split}", of["identity"]
    yield "provenance.tokenizer", facts.get("tokenizer")
    for name, weights in facts.get("members", {}).items():
        yield f"provenance.members.{name}", weights
    for name, configuration in facts.get("configurations", {}).items():
        yield f"provenance.configurations.{name}", configuration
    # Settings that were others before the run was resumed: its run.yaml has the last ones only.
    yield "provenance.changed", facts.get("changed")


def _group(runs: Sequence[Finished]) -> Group:
    by_seed: dict[int, Finished] = {}
    for run in runs:
        by_seed.setdefault(run.run.seed, run)
    again = [run for run in runs if by_seed[run.run.seed] is not run]
    return Group("", [run.folder for run in runs], [by_seed[seed] for seed in sorted(by_seed)], again)


# ---- names -------------------------------------------------------------------------------------


def _names(groups: Sequence[Sequence[Path]]) -> list[str]:
    """A name for each group of folders: what those of its runs have in common, before the seed, if that is its own."""
    stems = [_stem(folders) for folders in groups]
    names = [
        stem.name if stem.name and not _is_shared(stem, at, stems, groups) else _list(groups[at])
        for at, stem in enumerate(stems)
    ]
    return [name if names.count(name) == 1 else str(groups[at][0]) for at, name in enumerate(names)]


def _stem(folders: Sequence[Path]) -> Path:
    if len(folders) == 1:
        return folders[0]
    # By characters and not by folders: have A in common.
    common = os.path.commonprefix([folder.as_posix() for folder in folders])  # noqa: RUF071
    return Path(re.sub(r"([-_. /]+seed)?[-_. /]*\d*$", "", common))


def _is_shared(stem: Path, at: int, stems: Sequence[Path], groups: Sequence[Sequence[Path]]) -> bool:
    """Whether other groups have that name too, or runs in a folder of that name."""
    others = [folder for number, folders in enumerate(groups) if number != at for folder in folders]
    return [of.name for of in stems].count(stem.name) > 1 or any(stem in folder.parents for folder in others)


def _list(folders: Sequence[Path]) -> str:
    return folders[0].name + (f" and {len(folders) - 1} more" if len(folders) > 1 else "")
