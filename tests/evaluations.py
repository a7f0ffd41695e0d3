"""Small models and GLUE-shaped folders that tests share: 32 units, and sentences whose label one word gives away."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from codistill.config import ModelConfig
from codistill.data.tokenizers import train_tokenizer, vocabulary_size
from codistill.evaluate.protocol import Protocol
from codistill.evaluate.tasks import GLUE
from codistill.models import new_model

TEXT = "the cat sat on a mat and saw some dog run far into our old garden to eat more of her food good bad"
WORDS = TEXT.split()
QUICK = Protocol(learning_rates=[1e-2], epochs=3, batch=16, max_length=32, held_out_length=32)


def model_folder(place: Path, *, seed: int = 0, layers: int = 1, words: Sequence[str] = WORDS, family="modernbert"):
    """A random model of 32 units with its tokenizer, saved as the library saves members."""
    tokenizer = train_tokenizer("wordpiece", 100, [" ".join(words)] * 3)
    config = ModelConfig(family=family, layers=layers, width=32, heads=2, dropout=0.1)
    model = new_model(
        config, vocabulary=vocabulary_size(tokenizer), length=64, tokenizer=tokenizer, seed=seed, name="model"
    )
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def sentences(count: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS[:20], draw.integers(3, 9))) for _ in range(count)]


def labelled(name: str, count: int, seed: int) -> dict[str, list]:
    """Rows of a task: the last word of the last text gives the label away."""
    task = GLUE[name]
    draw = np.random.default_rng(seed + 1)
    label = draw.integers(task.outputs if task.classes else 6, size=count)
    columns = {column: sentences(count, seed + number) for number, column in enumerate(task.columns)}
    last = task.columns[-1]
    columns[last] = [f"{text} {WORDS[-1 - int(y)]}" for text, y in zip(columns[last], label, strict=True)]
    return {**columns, "label": label.tolist() if task.classes else [float(y) for y in label]}


def pairs(count: int, **change) -> dict[str, list]:
    """Columns of BLiMP: three paradigms in turn."""
    names = [f"paradigm {i % 3}" for i in range(count)]
    columns = {"UID": names, "field": ["syntax" if name != "paradigm 0" else "semantics" for name in names]}
    return columns | {"sentence_good": sentences(count, 1), "sentence_bad": sentences(count, 2)} | change


def write(file: Path, columns: Mapping[str, Sequence]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(dict(columns)), file)


def glue_folder(place: Path, *names: str, train: int = 320, dev: int = 80) -> Path:
    """A data folder with these tasks in the layout of the documentation."""
    for name in names:
        write(place / "glue" / name / "train.parquet", labelled(name, train, 0))
        for split in GLUE[name].splits:
            write(place / "glue" / name / f"{split}.parquet", labelled(name, dev, 100))
    return place
