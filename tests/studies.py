"""A toy study that tests share: a teacher of one layer and a student of two, on a little made-up prose."""

from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet

from codistill.config import BatchSize, Checkpointing, Data, Evaluation, Logging, ModelConfig
from codistill.recipes.sizes import CAUSAL_TINY, TINY
from codistill.study.design import Contrast, Study, edge, frozen, settings
from codistill.study.run import Request
from codistill.study.scales import Scale

SIZE = replace(
    TINY,
    models={role: ModelConfig(layers=n, width=32, heads=1, dropout=0.1) for role, n in (("large", 2), ("small", 1))},
    data=Data(tokenizer="train:wordpiece:300", length=32),
    batch=BatchSize(sequences=8),
    steps=8,
    checkpoint=Checkpointing(every=4),
    evaluate=Evaluation(every=4, sequences=16),
    log=Logging(every=2),
)
SCALE = Scale(name="toy", masked=SIZE, causal=CAUSAL_TINY, pairs=None, most_members=3)


def arms(scale: Scale, seed: int):
    (at,) = settings(scale.masked, seed, passes=(1,))
    large = at.learner(at.size.models["large"])
    return [
        at.arm("alone", {"large": large}),
        at.teacher("teacher", at.size.models["small"]),
        at.arm("taught", {"teacher": frozen("teacher"), "large": large}, edge("teacher", "large", 0.5)),
        at.arm("pair", {"large": large, "small": at.learner(at.size.models["small"])}, edge("large", "small")),
    ]


STUDY = Study(
    name="toy",
    question="Does it work?",
    arms=arms,
    contrasts=[Contrast("taught − alone", "taught/large", "alone/large")],
    curves=["alone/large", "taught/large"],
    seeds=2,
    along=True,
)


def request(out: Path, study: Study = STUDY, seeds: int = 1) -> Request:
    return Request(study, SCALE, seeds, out)


def data_folder(folder: Path, text: Path) -> Path:
    """A folder as `--data` takes it: the prose as training and validation text, and four pairs of BLiMP."""
    place = folder / "text" / "prose"
    place.mkdir(parents=True)
    table = pyarrow.table({"text": text.read_text().split(". ")})
    for split in ("train", "validation"):
        pyarrow.parquet.write_table(table, place / f"{split}.parquet")
    return folder


def made_up(arm: str, seed: int, loss: float, blimp: float | None = None, failed: str = "") -> dict:
    """A cell of an arm whose one member is `large`."""
    member = {
        "loss": loss, "accuracy": 0.1, "parameters": 10, "flops": {"own": 6, "teachers": 2}, "seconds": 1.0,
        "teachers": ["guide"] if arm == "taught" else [], "curve": [[50, loss + 1], [100, loss]],
        "blimp": None if blimp is None else {"score": blimp, "pairs": 100},
    }  # fmt: skip
    return {
        "key": f"{arm}{seed}", "arm": arm, "regime": "one pass", "seed": seed, "failed": failed, "unigram_loss": 7.0,
        "steps": 1, "tokens": 100, "passes": 0.5, "precision": "float32", "text": {"train": "a", "validation": "b"},
        "machine": {"device": "x", "threads": 1}, "versions": {"torch": "2"}, "date": "2026-01-01", "agreement": None,
        "members": {} if failed else {"large": member},
    }  # fmt: skip
