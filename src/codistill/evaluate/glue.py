"""GLUE cells: a model, or a cohort of models with edges, fine-tuned on a task and scored on its dev set."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codistill.errors import UserError
from codistill.evaluate.encode import Encoded, encode, encoder_for
from codistill.evaluate.finetune import (
    Best,
    Labelled,
    Teaching,
    fine_tune,
    learning_rate,
    num_steps,
    predict,
    predictions,
)
from codistill.evaluate.jobs import Content, Job, Progress
from codistill.evaluate.protocol import OF_TEXT, Protocol
from codistill.evaluate.results import Cell, Store, key_of
from codistill.evaluate.sequences import SequencePredictor
from codistill.evaluate.subjects import Subject
from codistill.evaluate.tasks import GLUE, OFFICIAL_ROWS, Examples, read_split
from codistill.seeds import seed_of


@dataclass(frozen=True)
class TaskData:
    """A task's splits: `train`, and by name those that are predicted, the scored one first."""

    name: str
    train: Examples
    predicted: Mapping[str, Examples]

    @property
    def content(self) -> str:
        digest = hashlib.sha256(self.name.encode())
        for split, examples in {"train": self.train, **self.predicted}.items():
            labels = None if examples.label_N is None else examples.label_N.tolist()
            digest.update(repr((split, examples.texts, labels)).encode())
        return digest.hexdigest()

    @property
    def partial(self) -> dict[str, str]:
        """Which splits are not as long as the official ones: scores are not comparable with published ones then."""
        official = OFFICIAL_ROWS[self.name]
        lengths = {"train": len(self.train), **{split: len(part) for split, part in self.predicted.items()}}
        return {s: f"{n} of {official[s]}" for s, n in lengths.items() if s in official and n != official[s]}


@dataclass(frozen=True)
class Group:
    """Models that are fine-tuned together, by the names they are shown under; a single one without edges is alone."""

    subjects: Mapping[str, Subject]
    edges: Sequence[Teaching] = ()

    @property
    def reported(self) -> dict[str, str]:
        """Which members are reported, as what: all that are taught, or the single one."""
        if not self.edges:
            return {name: name for name in self.subjects}
        teachers = {s: sorted(e.teacher for e in self.edges if e.student == s) for s in self.subjects}
        return {s: f"{s} taught by {' and '.join(found)}" for s, found in teachers.items() if found}


def read_task(data: Path | None, name: str) -> TaskData:
    """All splits of a task that there are; raises UserError when it cannot be trained or scored."""
    task = GLUE[name]
    train = read_split(data, name, "train")
    tests = [split.replace("dev", "test") for split in task.splits]
    found = {split: read_split(data, name, split) for split in (*task.splits, *tests)}
    for split, examples in (("train", train), (task.splits[0], found[task.splits[0]])):
        if examples is None or not len(examples):
            raise UserError(
                f"glue/{name}: no {split} split in {data or 'nyu-mll/glue'}; it needs train and {task.splits[0]}"
            )
    assert train is not None
    return TaskData(name, train, {split: examples for split, examples in found.items() if examples is not None})


def glue_jobs(
    group: Group, data: TaskData, protocol: Protocol, seeds: int, precision: torch.dtype, store: Store
) -> list[Job]:
    """A job a seed: one fine-tuning, with the cells of every reported member of `group`."""
    _check_tokenizers(group)
    contents = {name: subject.content for name, subject in group.subjects.items()}
    about = {
        "task": data.name,
        "data": data.content,
        "edges": sorted((contents[e.teacher], contents[e.student]) for e in group.edges),
        "protocol": {k: v for k, v in asdict(protocol).items() if k not in OF_TEXT},
        "precision": str(precision),
        "device": next(iter(group.subjects.values())).model.device.type,
    }
    choice = key_of(**about, models=sorted(contents.values()), chosen="learning rate")
    work = _Work(group, data, protocol, precision)
    jobs = []
    for seed in range(seeds):
        cells = [Cell(shown, f"glue/{data.name}", seed) for shown in group.reported.values()]
        keys = [key_of(**about, model=contents[name], seed=seed) for name in group.reported]
        cost = num_steps(len(data.train), protocol) * protocol.batch * len(group.subjects)
        jobs.append(Job(cells, keys, cost, partial(work.cells, store, choice, seed)))
    return jobs


class _Work:
    """The fine-tunings of a group on a task, from texts to scores; texts are encoded once, when they are needed."""

    def __init__(self, group: Group, data: TaskData, protocol: Protocol, precision: torch.dtype):
        self.group, self.data, self.protocol, self.precision = group, data, protocol, precision
        self.task = GLUE[data.name]

    def cells(self, store: Store, choice: str, seed: int, progress: Progress) -> list[Content]:
        """What each reported member scores with this seed."""
        rates = self._rates(store, choice, progress)
        rest, held = self._slices() if self.protocol.checkpoint == "best" else (self.train, None)
        best = Best(lambda predictor: self._score(predictor, held)) if held else None
        tuned = self._tune(rest, rates, seed, progress, best)
        if best:
            best.restore(tuned)
        found = {
            name: {split: predict(tuned[name], encoded, self.precision) for split, encoded in self.encoded.items()}
            for name in self.group.reported
        }
        steps = num_steps(len(rest.encoded), self.protocol)
        return [self._content(found[name], rates[name], steps) for name in found]

    @cached_property
    def train(self) -> Labelled:
        assert self.data.train.label_N is not None
        return Labelled(self._encode(self.data.train), self.data.train.label_N)

    @cached_property
    def encoded(self) -> dict[str, Encoded]:
        """Of each split that is predicted."""
        return {split: self._encode(examples) for split, examples in self.data.predicted.items()}

    def _rates(self, store: Store, choice: str, progress: Progress) -> dict[str, float]:
        """Each member's learning rate: the default, the given one, or the best on a slice of the training set."""
        given = self.protocol.learning_rates
        if len(given) <= 1:
            return {n: given[0] if given else learning_rate(s.model) for n, s in self.group.subjects.items()}
        known = store.get(choice) or {}
        if set(known) != set(self.group.subjects):
            known = self._chosen(given, progress)
            store.put(choice, known)
        return known

    def _chosen(self, given: Sequence[float], progress: Progress) -> dict[str, float]:
        rest, held = self._slices()
        scores: dict[str, list[float]] = {name: [] for name in self.group.subjects}
        for rate in given:
            tuned = self._tune(rest, dict.fromkeys(scores, rate), 0, progress)
            for name, predictor in tuned.items():
                scores[name].append(self._score(predictor, held))
        return {name: given[int(np.argmax(np.nan_to_num(found, nan=-np.inf)))] for name, found in scores.items()}

    def _tune(
        self, train: Labelled, rates: dict[str, float], seed: int, progress: Progress, after_epoch: Best | None = None
    ) -> dict[str, SequencePredictor]:
        return fine_tune(
            {name: subject.model for name, subject in self.group.subjects.items()},
            train,
            self.task.outputs,
            self.protocol,
            rates,
            seed=seed,
            precision=self.precision,
            edges=self.group.edges,
            advance=lambda examples: progress(examples * len(self.group.subjects)),
            after_epoch=after_epoch,
        )

    def _content(self, outputs: Mapping[str, np.ndarray], rate: float, steps: int) -> Content:
        first = self.task.splits[0]
        predicted = {split: predictions(output_NC) for split, output_NC in outputs.items()}
        labels = {s: part.label_N for s, part in self.data.predicted.items() if part.label_N is not None}
        scores = self.task.scores(predicted[first], labels[first])
        for split in self.task.splits[1:]:
            if split in predicted:
                beside = self.task.scores(predicted[split], labels[split])
                scores |= {f"{metric}_{split.removeprefix('dev_')}": beside[metric] for metric in self.task.metrics}
        return {
            "score": scores.pop("score"),
            "scores": scores,
            "predictions": predicted[first].tolist(),
            "labels": labels[first].tolist(),
            "others": {split: found.tolist() for split, found in predicted.items() if split != first},
            "counted": {
                "learning_rate": rate,
                "steps": steps,
                "examples": {"train": len(self.data.train), **{s: len(p) for s, p in predicted.items()}},
                "truncated": {s: one.num_truncated for s, one in {"train": self.train.encoded, **self.encoded}.items()},
                "partial": self.data.partial,
            },
        }

    def _encode(self, examples: Examples) -> Encoded:
        subjects = list(self.group.subjects.values())
        longest = min(self.protocol.max_length, *(subject.positions for subject in subjects))
        types = any(subject.has_types for subject in subjects)
        try:
            return encode(examples.texts, subjects[0].tokenizer, max_length=longest, with_types=types)
        except UserError as error:
            raise UserError(f"{examples.source}: {error}") from None

    def _slices(self) -> tuple[Labelled, Labelled]:
        """The training set without, and only, the share that choices are made by; the same for all models and seeds."""
        order = np.random.default_rng(seed_of(0, "selection", self.data.name)).permutation(len(self.train.encoded))
        held = max(1, round(self.protocol.selection_share * len(order)))
        return self.train.part(np.sort(order[held:])), self.train.part(np.sort(order[:held]))

    def _score(self, predictor: Any, held: Labelled) -> float:
        found = predictions(predict(predictor, held.encoded, self.precision))
        return self.task.scores(found, held.label_N)["score"]


def _check_tokenizers(group: Group) -> None:
    names = {encoder_for(subject.tokenizer).to_str(): name for name, subject in group.subjects.items()}
    if len(names) > 1:
        one, other = list(names.values())[:2]
        raise UserError(
            f"--distill: {one} and {other} have different tokenizers; models can teach one another only on the same "
            "tokens"
        )
