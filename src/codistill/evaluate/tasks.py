"""The nine GLUE tasks: where their text stands, what their labels are, and how they are scored.

Shape suffix: N examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from codistill.errors import UserError, first_line
from codistill.evaluate.metrics import METRICS


@dataclass(frozen=True)
class Task:
    """A GLUE task. `metrics` are the official ones; the score is the mean of those in `scored`.

    `classes` are the labels' names by id, empty for a regression; `file` is the GLUE server's name for predictions,
    which spells classes out where `spelled`. `splits`: what is predicted, the scored one first.
    """

    columns: tuple[str, ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    scored: tuple[str, ...]
    file: str
    spelled: bool = False
    splits: tuple[str, ...] = ("dev",)

    @property
    def outputs(self) -> int:
        """How wide the head is."""
        return len(self.classes) or 1

    def scores(self, predicted_N: np.ndarray, label_N: np.ndarray) -> dict[str, float]:
        """Each official metric, and `score`; from −1 or 0 to 1."""
        found = {name: METRICS[name](predicted_N, label_N) for name in self.metrics}
        return {**found, "score": float(np.mean([found[name] for name in self.scored]))}


_PAIR = ("sentence1", "sentence2")
_ENTAILS = ("entailment", "not_entailment")
_EQUAL = ("accuracy",)
_BOTH = ("accuracy", "f1")
_CORRELATED = ("pearson", "spearman")

GLUE: Mapping[str, Task] = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy"), ("matthews",), "CoLA"),
    "sst2": Task(("sentence",), ("negative", "positive"), _EQUAL, _EQUAL, "SST-2"),
    "mrpc": Task(_PAIR, ("not_equivalent", "equivalent"), _BOTH, _BOTH, "MRPC"),
    "stsb": Task(_PAIR, (), _CORRELATED, _CORRELATED, "STS-B"),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), _BOTH, _BOTH, "QQP"),
    "mnli": Task(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        _EQUAL,
        _EQUAL,
        "MNLI",
        spelled=True,
        splits=("dev_matched", "dev_mismatched"),
    ),
    "qnli": Task(("question", "sentence"), _ENTAILS, _EQUAL, _EQUAL, "QNLI", spelled=True),
    "rte": Task(_PAIR, _ENTAILS, _EQUAL, _EQUAL, "RTE", spelled=True),
    "wnli": Task(_PAIR, ("not_entailment", "entailment"), _EQUAL, _EQUAL, "WNLI"),
}

OFFICIAL_ROWS: Mapping[str, Mapping[str, int]] = {
    "cola": {"train": 8551, "dev": 1043},
    "sst2": {"train": 67349, "dev": 872},
    "mrpc": {"train": 3668, "dev": 408},
    "stsb": {"train": 5749, "dev": 1500},
    "qqp": {"train": 363846, "dev": 40430},
    "mnli": {"train": 392702, "dev_matched": 9815, "dev_mismatched": 9832},
    "qnli": {"train": 104743, "dev": 5463},
    "rte": {"train": 2490, "dev": 277},
    "wnli": {"train": 635, "dev": 71},
}


@dataclass(frozen=True)
class Examples:
    """`texts`: one column of sentences, or two; `label_N`: int64 classes or float32 scores, None where there are none
    (the GLUE test sets); `source` names them in errors."""

    texts: tuple[Sequence[str], ...]
    label_N: np.ndarray | None
    source: str

    def __len__(self) -> int:
        return len(self.texts[0])


def read_split(data: Path | None, name: str, split: str) -> Examples | None:
    """The examples of a split (train, dev, dev_matched, dev_mismatched, test…), or None where there are none.

    `data`: a folder with glue/NAME/SPLIT.parquet or NAME/SPLIT.parquet (dev may be called validation); None: the
    package `datasets` fetches nyu-mll/glue. Raises UserError for a missing column or a label outside the set.
    """
    table = _from_hub(name, split) if data is None else _from_folder(data, name, split)
    if table is None:
        return None
    columns, source = table
    task = GLUE[name]
    for column in (*task.columns, "label") if not split.startswith("test") else task.columns:
        if column not in columns:
            raise UserError(f"{source}: no column {column!r}, only {', '.join(columns)}; glue/{name} needs it")
    texts = tuple(_texts(columns[column], column, source) for column in task.columns)
    labels = None if split.startswith("test") else _labels(columns["label"], task, source)
    return Examples(texts, labels, source)


def _texts(column: Sequence, name: str, source: str) -> Sequence[str]:
    bad = next((row for row, text in enumerate(column) if not isinstance(text, str)), None)
    if bad is not None:
        raise UserError(f"{source}: {name!r} of row {bad} is {column[bad]!r}; wanted text")
    return column


def _labels(column: Sequence, task: Task, source: str) -> np.ndarray:
    wanted = f"a class from 0 to {len(task.classes) - 1}" if task.classes else "a number from 0 to 5"
    for row, label in enumerate(column):
        is_number = isinstance(label, int | float) and not isinstance(label, bool)
        if not is_number or not (label in range(len(task.classes)) if task.classes else 0 <= label <= 5):
            raise UserError(f"{source}: the label of row {row} is {label!r}; wanted {wanted}")
    return np.array(column, dtype=np.int64 if task.classes else np.float32)


def _from_folder(data: Path, name: str, split: str) -> tuple[dict[str, list], str] | None:
    from pyarrow import ArrowException, parquet

    found = _files(data, name, split)
    if not found:
        return None
    try:
        columns: dict[str, list] = {}
        for file in found:
            for column, values in parquet.read_table(file).to_pydict().items():
                columns.setdefault(column, []).extend(values)
    except (OSError, ArrowException) as error:
        raise UserError(f"{found[0]}: cannot be read as Parquet ({first_line(error)})") from None
    return columns, str(found[0])


def _files(data: Path, name: str, split: str) -> list[Path]:
    """One file, or the numbered parts of one."""
    for folder in (data / "glue" / name, data / name):
        for stem in (split, split.replace("dev", "validation")):
            files = [folder / f"{stem}.parquet"] if (folder / f"{stem}.parquet").is_file() else []
            if files := files or sorted(folder.glob(f"{stem}-[0-9]*-of-[0-9]*.parquet")):
                return files
    return []


def _from_hub(name: str, split: str) -> tuple[dict[str, list], str] | None:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            "--data: no folder is named, and the package `datasets`, which would fetch GLUE, is not installed; "
            "give a folder with glue/TASK/train.parquet, or install codistill's extra `data` (docs/install.md)"
        ) from None
    try:
        loaded = load_dataset("nyu-mll/glue", name)
    except Exception as error:  # of the hub client, the network, or Arrow: no common type
        raise UserError(f"nyu-mll/glue {name}: cannot be fetched ({first_line(error)})") from None
    stem = split.replace("dev", "validation")
    return (loaded[stem].to_dict(), f"nyu-mll/glue {name} {stem}") if stem in loaded else None
