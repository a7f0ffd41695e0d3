"""Fixtures of whole runs. Every test worker computes on one thread: two workers fill two cores."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A little prose: long enough for three epochs of 20 steps to end inside the run."""
    import torch

    words = "the cat sat on a mat and saw some dog run far into our old garden to eat more of her food"
    words = words.split()
    draw = torch.Generator().manual_seed(0)
    sentences = [" ".join(words[i] for i in torch.randint(len(words), (9,), generator=draw)) for _ in range(400)]
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text(". ".join(sentences))
    return file


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    os.environ["CODISTILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def causal_teacher(text, tmp_path_factory) -> Path:
    """A pre-trained model folder of a causal model."""
    from codistill.train import train
    from runs import small_run

    out = tmp_path_factory.mktemp("causal_teacher") / "run"
    return train(small_run("standalone-clm", text, "steps=5"), out) / "members" / "large"


@pytest.fixture(scope="session")
def teacher(text, tmp_path_factory) -> Path:
    """A pre-trained model folder."""
    from codistill.train import train
    from runs import small_run

    out = tmp_path_factory.mktemp("teacher") / "run"
    return train(small_run("standalone", text, "steps=5"), out) / "members" / "large"
