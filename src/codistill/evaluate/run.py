"""The evaluation of models: what is asked for, what of it is known already, and the rest computed cell by cell."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from codistill.distributed import start
from codistill.errors import UserError, one_line
from codistill.evaluate.blimp import read_pairs
from codistill.evaluate.compare import comparisons
from codistill.evaluate.finetune import Teaching
from codistill.evaluate.glue import Group, glue_jobs, read_task
from codistill.evaluate.jobs import Job
from codistill.evaluate.protocol import Protocol
from codistill.evaluate.requests import parse_edges, parse_tasks
from codistill.evaluate.results import Cell, Store, check_out, json_with_nan
from codistill.evaluate.server import write_predictions
from codistill.evaluate.subjects import Subject, find_models, load_subject
from codistill.evaluate.zero_shot import blimp_job, find_text, mlm_job
from codistill.files import write_file
from codistill.machine import best_precision, versions
from codistill.progress import Advance, silent


def evaluate(
    models: Sequence[str],
    tasks: Sequence[str],
    out: str | Path,
    *,
    data: str | Path | None = None,
    seeds: int = 1,
    distill: Sequence[str] = (),
    text: Sequence[str] = (),
    limit: int | None = None,
    protocol: Protocol | None = None,
    device: str | None = None,
    advance: Advance = silent,
) -> dict[str, Any]:
    """The contents of `out`/results.json: every model's score at every task, and how the models compare.

    `models`: model folders, hub names or run folders. `tasks`: mlm, glue (all nine), glue/cola…, blimp. `data`: a
    folder as the documentation describes; without, GLUE is fetched by the package `datasets`. `seeds`: fine-tunings of
    each model and task, from seed 0 on. `distill`: "TEACHER:STUDENT" edges between models, beside which every model is
    fine-tuned alone. `text`: of `mlm`. `limit`: BLiMP pairs a paradigm. Cells known to `out` are reused, and those of
    earlier calls that this one does not ask for are `kept`, and counted only; what cannot be had becomes a failed cell
    with its reason. Raises UserError if nothing at all can be done as asked.
    """
    known, unknown = parse_tasks(tasks)
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: at least one is needed")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: at least one pair is needed")
    if data is not None and not Path(data).is_dir():
        raise UserError(f"--data {data}: there is no such folder")
    paths = find_models(models)
    edges = parse_edges(distill, list(paths))
    out, data = Path(out), Path(data) if data is not None else None
    check_out(out)
    place = start("single", device).device
    plan = _Plan(paths, data, protocol or Protocol(), place, Store(out))
    jobs = [job for task in known for job in plan.jobs(task, seeds, edges, text, limit)]
    failed = plan.failed + [Cell(name, task, None, failed=why) for task, why in unknown.items() for name in paths]
    for cell in failed:  # at once, for a mistyped task is better mended now than after the others
        print(f"failed: {cell.task} of {cell.model}: {cell.failed}", file=sys.stderr)
    _compute(jobs, plan.store, advance)
    cells = [_restored(cell, plan.store, key) for job in jobs for cell, key in zip(job.cells, job.keys, strict=True)]
    found = _results([*cells, *failed], plan, known, seeds, edges)
    found["kept"] = plan.store.num_others([key for job in jobs for key in job.keys])
    write_file(out / "results.json", json_with_nan(found, indent=1) + "\n")
    write_predictions(out / "predictions", jobs, plan.store)
    return found


class _Plan:
    """Turns tasks into jobs; what cannot be read or loaded is noted in `failed` and does not keep the rest from it."""

    def __init__(self, paths: Mapping[str, str], data: Path | None, protocol: Protocol, device, store: Store):
        self.paths, self.data, self.protocol, self.device, self.store = paths, data, protocol, device, store
        self.precision: torch.dtype = getattr(torch, best_precision(device))
        self.failed: list[Cell] = []
        self._loaded: dict[tuple[str, bool], Subject | UserError] = {}

    def jobs(
        self, task: str, seeds: int, edges: Sequence[Teaching], text: Sequence[str], limit: int | None
    ) -> list[Job]:
        """The jobs of one task, for all models."""
        try:
            if task == "mlm":
                named = find_text(text, self.data)
                return self._each(task, lambda s: mlm_job(s, named, self.protocol, self.precision))
            if task == "blimp":
                pairs = read_pairs(self.data, limit)
                return self._each(task, lambda s: blimp_job(s, pairs, limit, self.protocol, self.precision))
            return self._glue(task, seeds, edges)
        except UserError as error:
            self.failed += [Cell(name, task, None, failed=str(error)) for name in self.paths]
            return []

    def _each(self, task: str, job_of: Callable[[Subject], Job]) -> list[Job]:
        jobs = []
        for name in self.paths:
            try:
                jobs.append(job_of(self._subject(name)))
            except UserError as error:
                self.failed.append(Cell(name, task, None, failed=str(error)))
        return jobs

    def _glue(self, task: str, seeds: int, edges: Sequence[Teaching]) -> list[Job]:
        data = read_task(self.data, task.removeprefix("glue/"))
        jobs = []
        for names, among in [*(([name], []) for name in self.paths), *_components(edges)]:
            try:
                group = Group({name: self._subject(name, needs_head=False) for name in names}, among)
                jobs += glue_jobs(group, data, self.protocol, seeds, self.precision, self.store)
            except UserError as error:
                self.failed.append(Cell(" and ".join(names), task, None, failed=str(error)))
        return jobs

    def _subject(self, name: str, needs_head: bool = True) -> Subject:
        """The model, loaded once; one that lacks its head is loaded without it for a task that needs none."""
        found = self._load(name, True)
        if isinstance(found, UserError) and not needs_head:
            found = self._load(name, False)
        if isinstance(found, UserError):
            raise found
        return found

    def _load(self, name: str, needs_head: bool) -> Subject | UserError:
        if (name, needs_head) not in self._loaded:
            try:
                found = load_subject(name, self.paths[name], self.device, needs_head=needs_head)
            except UserError as error:
                self._loaded[name, needs_head] = error
            else:
                self._loaded[name, needs_head] = found
        return self._loaded[name, needs_head]

    @property
    def subjects(self) -> list[Subject]:
        """All that were loaded."""
        return [found for found in self._loaded.values() if isinstance(found, Subject)]


def _components(edges: Sequence[Teaching]) -> list[tuple[list[str], list[Teaching]]]:
    """The models that edges connect, and those edges."""
    found: list[tuple[list[str], list[Teaching]]] = []
    for edge in edges:
        touched = [part for part in found if edge.teacher in part[0] or edge.student in part[0]]
        found = [part for part in found if part not in touched]
        names = [name for part in touched for name in part[0]]
        names += [name for name in (edge.teacher, edge.student) if name not in names]
        found.append((names, [e for part in touched for e in part[1]] + [edge]))
    return found


def _compute(jobs: Sequence[Job], store: Store, advance: Advance) -> None:
    """Computes what `store` does not know. A cell is kept as soon as it is there, so an interruption loses one job."""
    waiting = [job for job in jobs if any(store.get(key) is None for key in job.keys)]
    total, done = sum(job.cost for job in waiting), 0
    for number, job in enumerate(waiting, start=1):
        told = 0
        note = f"{job.cells[0].task} · {job.cells[0].model} · {number} of {len(waiting)}"

        def progress(examples: int, done: int = done, cost: int = job.cost, note: str = note) -> None:
            nonlocal told
            told = min(told + examples, cost)
            advance(done + told, note, total)

        try:
            for key, content in zip(job.keys, job.compute(progress), strict=True):
                store.put(key, content)
        except (UserError, RuntimeError) as error:  # of the input, or of PyTorch: no memory, say
            why = one_line(error)
            for cell in job.cells:
                cell.failed = why[:500]
        done += job.cost
        advance(done, note, total)


def _restored(cell: Cell, store: Store, key: str) -> Cell:
    content = store.get(key)
    if cell.failed or content is None:
        return cell
    known = {name: content[name] for name in ("score", "scores", "predictions", "labels", "counted") if name in content}
    return Cell(cell.model, cell.task, cell.seed, **known)


def _results(
    cells: Sequence[Cell], plan: _Plan, tasks: Sequence[str], seeds: int, edges: Sequence[Teaching]
) -> dict[str, Any]:
    shown = ("model", "task", "seed", "score", "scores", "counted", "failed")
    return {
        "protocol": asdict(plan.protocol),
        "tasks": list(tasks),
        "seeds": seeds,
        "distill": [f"{edge.teacher}:{edge.student}" for edge in edges],
        "precision": str(plan.precision).removeprefix("torch."),
        "device": plan.device.type,
        "threads": torch.get_num_threads(),
        "versions": versions(("codistill", "torch", "transformers", "tokenizers")),
        "models": {
            one.name: {"parameters": one.model.num_parameters(), "content": one.content} for one in plan.subjects
        },
        "cells": [{name: getattr(cell, name) for name in shown} for cell in cells],
        "comparisons": comparisons(cells),
    }
