"""Arms: what a study compares. An arm is a small run of its own; arms that can share their batches are trained in one
cohort, which changes no bit of a member, since members do not depend on their company. Where they would, an arm is
trained by itself.

A frozen member of an arm may be another arm's result: its path is then "arm:NAME/ROLE".
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from codistill.config import Data, DistillationConfig, MemberConfig, Run
from codistill.errors import UserError
from codistill.loading import to_dict

FORMAT = 1  # of a cell: raise it when what is computed changes, and old cells are computed anew
_OF_ARM = "arm:"
# Settings that came after the first cells were made: at their usual values they are no part of a key.
_LATER = (
    ("objective", "whole_word", False),
    ("data", "column", "text"),
    ("data", "unit", "document"),
    ("data", "keep_every", 1),
    ("data", "packing", "contiguous"),
)


@dataclass(frozen=True)
class Arm:
    """One run of a study. `name`: unique in its `regime`; the members of `run` are named by their role (large, small,
    student); `run.seed` is the study's seed, except in teachers, which see other batches than their students."""

    name: str
    regime: str
    seed: int
    run: Run

    @property
    def place(self) -> tuple[str, str, int]:
        """What tells the arms of a study apart."""
        return self.regime, self.name, self.seed

    @property
    def taught_by(self) -> dict[str, tuple[str, str]]:
        """Frozen member → (arm, role) whose model it is."""
        paths = {role: member.path or "" for role, member in self.run.members.items()}
        return {role: _parsed(path) for role, path in paths.items() if path.startswith(_OF_ARM)}

    @property
    def begun_from(self) -> dict[str, tuple[str, str]]:
        """Member → (arm, role) whose parameters it starts from."""
        sources = {role: m.init.from_ if m.init else "" for role, m in self.run.members.items()}
        return {role: _parsed(path) for role, path in sources.items() if path.startswith(_OF_ARM)}

    @property
    def sources(self) -> list[tuple[str, str]]:
        """(arm, role) of the models that it learns from or starts from."""
        return [*self.taught_by.values(), *self.begun_from.values()]

    @property
    def needs(self) -> set[str]:
        """Arms of the same regime and seed that have to be finished first."""
        return {arm for arm, _ in self.sources}


def of_arm(name: str, role: str) -> str:
    """The path of a member that is the model `role` of the arm `name`."""
    return f"{_OF_ARM}{name}/{role}"


def _parsed(path: str) -> tuple[str, str]:
    arm, _, role = path.removeprefix(_OF_ARM).rpartition("/")
    return arm, role


def keys_of(arms: Sequence[Arm]) -> dict[tuple[str, str, int], str]:
    """A name for each arm's content: its configuration without the names of text files, and what it needs.

    Neither where the text lies nor how often something is logged or saved is part of it.
    """
    by_place = {arm.place: arm for arm in arms}
    found: dict[tuple[str, str, int], str] = {}

    def key(arm: Arm) -> str:
        if arm.place not in found:
            needed = {name: key(_needed(by_place, arm, name)) for name in sorted(arm.needs)}
            # By content and not by name, so that another study's name for the same teacher is the same teacher.
            tree = _with_keys(_bare(arm.run), needed)
            text = json.dumps({"format": FORMAT, "run": tree}, sort_keys=True)
            found[arm.place] = hashlib.sha256(text.encode()).hexdigest()[:24]
        return found[arm.place]

    return {arm.place: key(arm) for arm in arms}


def _needed(by_place: Mapping[tuple[str, str, int], Arm], arm: Arm, name: str) -> Arm:
    found = by_place.get((arm.regime, name, arm.seed))
    if found is None:
        raise UserError(f"arm {arm.name} ({arm.regime}): its teacher {name!r} is no arm of the study")
    return found


def _bare(run: Run) -> dict[str, Any]:
    data = replace(run.data, train=["text"], validation=["text"])
    tree = to_dict(replace(run, recipe=None, data=data, provenance=None, track=[]))
    for section, name, usual in _LATER:
        if tree[section][name] == usual:
            del tree[section][name]
    return {key: value for key, value in tree.items() if key not in ("checkpoint", "log")}


def _with_keys(tree: Any, keys: Mapping[str, str]) -> Any:
    if isinstance(tree, Mapping):
        return {name: _with_keys(value, keys) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_with_keys(value, keys) for value in tree]
    if isinstance(tree, str) and tree.startswith(_OF_ARM):
        arm, role = _parsed(tree)
        return f"{keys[arm]}/{role}"
    return tree


# ---- one cohort for several arms ---------------------------------------------------------------


def grouped(arms: Sequence[Arm], most_members: int) -> list[list[Arm]]:
    """Arms that share regime, seed, text, batches and all other settings, in cohorts of at most about `most_members`
    trained members, equal ones counted once; those whose runs can end early or skip steps, each by itself. What a study
    names first comes first, of all seeds, so that a study that is stopped has its main arms."""
    groups: list[list[Arm]] = []
    for level in _levels(arms):
        frames: dict[str, list[Arm]] = {}
        for arm in level:
            frames.setdefault(json.dumps([arm.regime, _frame(arm)], sort_keys=True), []).append(arm)
        for alike in frames.values():
            groups += _cut(alike, most_members)
    rank: dict[tuple[str, str, int], int] = {}
    counts: dict[tuple[str, int], int] = {}
    for arm in arms:
        counts[arm.regime, arm.seed] = rank[arm.place] = counts.get((arm.regime, arm.seed), -1) + 1
    return sorted(groups, key=lambda group: (rank[group[0].place], group[0].seed))


def _levels(arms: Sequence[Arm]) -> Iterator[list[Arm]]:
    left, done = list(arms), set[tuple[str, str, int]]()
    while left:
        ready = [arm for arm in left if all((arm.regime, name, arm.seed) in done for name in arm.needs)]
        if not ready:
            raise UserError(f"arm {left[0].name}: what it needs is not there, or needs it in turn")
        yield ready
        done |= {arm.place for arm in ready}
        left = [arm for arm in left if arm.place not in done]


def _frame(arm: Arm) -> list[Any]:
    """What the arms of one cohort have alike."""
    # A run ends early, or skips a step, for all of its members at once and by the losses of all.
    heeds_company = arm.run.stop_early is not None or arm.run.non_finite == "skip"
    return [to_dict(replace(arm.run, members={}, distillation=[])), arm.place if heeds_company else None]


def _cut(arms: Sequence[Arm], most: int) -> Iterator[list[Arm]]:
    group: list[Arm] = []
    for arm in arms:
        if group and len(trained_names([*group, arm])) > most:
            yield group
            group = []
        group.append(arm)
    yield group


def merged(
    arms: Sequence[Arm],
    data: Data,
    folder_of: Mapping[tuple[str, str], str],
    names: Mapping[tuple[str, str], str] | None = None,
) -> Run:
    """One run of all `arms`, whose frames are alike, with the text of `data`. Members are seeded by their role.
    `folder_of`: (arm, role) → model folder. `names`: their `member_names`, if they are of a larger group.
    """
    names = names or member_names(arms)
    members: dict[str, MemberConfig] = {}
    edges: dict[str, DistillationConfig] = {}
    for arm in arms:
        for role, member in arm.run.members.items():
            members[names[arm.name, role]] = _placed(arm, role, member, folder_of)
        for edge in arm.run.distillation:
            teacher, student = names[arm.name, edge.teacher], names[arm.name, edge.student]
            placed = replace(edge, teacher=teacher, student=student)
            edges[repr(placed)] = placed
    run = arms[0].run
    text = replace(run.data, train=data.train, validation=data.validation)
    return replace(run, recipe=None, data=text, members=members, distillation=list(edges.values()))


def member_names(arms: Sequence[Arm]) -> dict[tuple[str, str], str]:
    """(arm, role) → its name in a cohort of all `arms`: ARM--ROLE. What several arms have alike comes once: a
    model frozen in one role, and one that is trained without a teacher, which is the same whoever learns from it."""
    found: dict[tuple[str, str], str] = {}
    untaught: dict[str, str] = {}
    for arm in arms:
        students = {edge.student for edge in arm.run.distillation}
        for role, member in arm.run.members.items():
            name = f"{arm.name}--{role}"
            if role in arm.taught_by:
                # By role too: members are seeded by it.
                of = arm.taught_by[role]
                name = "--".join(of if of[1] == role else (*of, role))
            elif role not in students:
                name = untaught.setdefault(f"{role} {member}", name)
            found[arm.name, role] = name
    return found


def trained_names(arms: Sequence[Arm], names: Mapping[tuple[str, str], str] | None = None) -> list[str]:
    """The members that a cohort of all `arms` trains; `names` as of `merged`."""
    names = names or member_names(arms)
    return list(dict.fromkeys(names[arm.name, role] for arm in arms for role in arm.run.trained))


def _placed(arm: Arm, role: str, member: MemberConfig, folder_of: Mapping[tuple[str, str], str]) -> MemberConfig:
    if role in arm.taught_by:
        member = replace(member, path=folder_of[arm.taught_by[role]])
    if role in arm.begun_from and member.init is not None:
        member = replace(member, init=replace(member.init, from_=folder_of[arm.begun_from[role]]))
    return replace(member, seeded_as=member.seeded_as or role)
