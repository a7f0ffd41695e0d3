"""Small cohorts and batches that tests share. 30,000 parameters a model: a step takes milliseconds."""

import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from codistill.cohort import Cohort, Member
from codistill.config import ModelConfig
from codistill.models import Predictor, new_model
from codistill.objectives import Batch
from codistill.schedules import constant

VOCABULARY, LENGTH = 50, 16
# Of a small model, as most configurations of transformers call it.
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}


def predictor(
    name: str, layers: int = 1, *, family: str = "modernbert", width: int = 32, dropout: float = 0.1, seed: int = 0
):
    config = ModelConfig(family=family, layers=layers, width=width, heads=2, dropout=dropout)
    model = new_model(config, vocabulary=VOCABULARY, length=LENGTH, tokenizer=None, seed=seed, name=name)
    return Predictor(model, VOCABULARY)


def member(name: str, layers: int = 1, *, trained: bool = True, noise_key: str = "", **kwargs) -> Member:
    built = predictor(noise_key or name, layers, **kwargs)
    optimizer = AdamW(built.parameters(), lr=0.0, weight_decay=0.01, fused=True) if trained else None
    return Member(name, built, optimizer, lr=constant(1e-2), noise_key=noise_key)


def batch(seed: int, sequences: int = 4, rows: int = 20) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (sequences, LENGTH), generator=draw)
    rows_N = torch.randperm(sequences * LENGTH, generator=draw)[:rows].sort().values
    return Batch({"input_ids": ids}, rows_N, torch.randint(VOCABULARY, (rows,), generator=draw))


def run(cohort: Cohort, steps: Sequence[int] = range(5), micro_batches: int = 2) -> Cohort:
    for step in steps:
        cohort.step(step, [batch(1000 * step + index) for index in range(micro_batches)])
    return cohort


def parameters(cohort: Cohort, name: str) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in cohort.members[name].parameters]


def assert_same_bits(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


class Looks(TorchDispatchMode):
    """Collects reads of a tensor's value, for each of which the host would wait on an accelerator."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"):
            place = next(f for f in reversed(traceback.extract_stack()) if "codistill" in f.filename)
            self.found.append(f"{Path(place.filename).name}: {place.line}")
        return func(*args, **(kwargs or {}))
