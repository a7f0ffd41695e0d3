"""What a study would train, and about how long it takes, before it starts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from codistill.config import MemberConfig
from codistill.plan import duration, plan
from codistill.study.arms import Arm, grouped, keys_of, member_names, trained_names
from codistill.study.cells import Cells
from codistill.study.run import Request, missing_cells, places, scoring
from codistill.study.scoring import BLIMP, GLUE

Place = tuple[str, str, int]
_TO_START = 15.0  # seconds that a process needs before its first step


def plan_lines(request: Request, data: Path | None, jobs: int | None, devices: Sequence[str]) -> list[str]:
    """A few lines for people: arms, those that are known, cohorts that are left, their FLOPs, and about how long."""
    arms, cells = request.arms, Cells(request.out)
    left = missing_cells(arms, cells, scoring(request, data).tasks)
    lines = [
        f"study {request.study.name} at {request.scale.name}, {request.seeds} seeds: {request.study.question}",
        f"{len(arms)} arms, {len(arms) - len(left)} known",
    ]
    keys = keys_of(arms)
    if beside := cells.beside(keys[arm.place] for arm in left):
        lines.append(
            f"studies beside --out hold {len(beside)} of the others: those of the same text are taken over (and are in "
            "the estimate, since the text is not read yet)"
        )
    return [*lines, _left(request, left, jobs, devices)] if left else lines


def _not_counted(tasks: Sequence[str]) -> str:
    names = ["BLiMP"] * (BLIMP in tasks) + ["GLUE"] * any(task in GLUE for task in tasks)
    return f", {' and '.join(names)} not counted" if names else ""


def _left(request: Request, left: Sequence[Arm], jobs: int | None, devices: Sequence[str]) -> str:
    wanted = {arm.place for arm in left}
    every = grouped(request.arms, request.scale.most_members)
    groups = [group for group in ([arm for arm in group if arm.place in wanted] for group in every) if group]
    models = sum(len(trained_names(group)) for group in groups)
    by_place = {arm.place: arm for arm in request.arms}
    flops, seconds, why = _cost([_passes(group, by_place) for group in groups], devices[0])
    jobs = jobs or places(devices)
    when = why or f"about {duration((seconds + _TO_START * len(groups)) / jobs)}{_not_counted(request.scale.tasks)}"
    return f"left: {models} models in {len(groups)} cohorts, {flops:.2g} FLOPs; with {jobs} at once {when}"


def _passes(group: Sequence[Arm], by_place: Mapping[Place, Arm]) -> list[tuple[Arm, MemberConfig, float]]:
    """The models that a cohort of `group` runs, each once: an arm with it, the model, and the share of what training
    it costs. A frozen teacher takes one pass of the three."""
    names, found = member_names(group), dict[str, tuple[Arm, MemberConfig, float]]()
    for arm in group:
        for role in arm.run.trained:
            found.setdefault(names[arm.name, role], (arm, arm.run.members[role], 1.0))
        for role, (source, its_role) in arm.taught_by.items():
            taught_by = by_place[arm.regime, source, arm.seed].run.members[its_role]
            found.setdefault(names[arm.name, role], (arm, taught_by, 1 / 3))
    return list(found.values())


def _cost(cohorts: Sequence[Sequence[tuple[Arm, MemberConfig, float]]], device: str) -> tuple[float, float, str]:
    """(FLOPs, seconds one after the other, why there are no seconds), from a few steps of each kind of model alone."""
    tried: dict[str, tuple[float, float, str]] = {}
    total, seconds, why = 0.0, 0.0, ""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else threads)
    for arm, member, share in (one for cohort in cohorts for one in cohort):
        flops, spent, why_not = _alone(arm, member, device, tried)
        total, seconds, why = total + share * flops, seconds + share * spent, why or why_not
    torch.set_num_threads(threads)
    return total, seconds, why


def _alone(arm: Arm, member: MemberConfig, device: str, tried: dict) -> tuple[float, float, str]:
    run = replace(arm.run, members={"one": replace(member, init=None)}, distillation=[])
    key = f"{member.model} {run.steps} {run.batch} {run.data.length}"
    if key not in tried:
        found = plan(run, torch.device(device))
        tried[key] = (sum(found.flops["one"].values()), found.seconds or 0.0, found.why_not)
    return tried[key]
