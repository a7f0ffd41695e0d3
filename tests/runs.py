"""Small runs that tests share: models of 32 units with dropout, on a little made-up prose."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from codistill.errors import UserError
from codistill.loading import load, override, to_dict
from codistill.recipes import find
from codistill.train import train

SMALL = [
    "steps=20",
    "batch={sequences: 8, accumulate: 2}",
    "data={train: [TEXT], validation: [TEXT], tokenizer: 'train:wordpiece:300', length: 32}",
    "evaluate={every: 10, sequences: 16}",
    "checkpoint.every=10",
    "log.every=5",
]


def small_run(recipe: str, text: Path, *more: str):
    """`recipe` with models of 32 units and dropout."""
    tree = override(to_dict(find(recipe)), [s.replace("TEXT", str(text)) for s in SMALL])
    for number, member in enumerate(tree["members"].values()):
        if "model" in member:
            family = "llama" if tree["objective"]["name"] == "clm" else "modernbert"
            member["model"] = {"family": family, "layers": 2 - number % 2, "width": 32, "dropout": 0.1}
    return load(override(tree, more))


def with_teachers(recipe: str, text: Path, teacher: Path, *more: str):
    taught = [f"members.{n}.path={teacher}" for n, m in find(recipe).members.items() if m.path is not None]
    own = ["data.tokenizer=null"] if taught else []
    return small_run(recipe, text, *taught, *own, *more)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted((folder / "members").glob("*/model.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_run(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert mine
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)
    losses = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
        for lines in ((folder / "metrics.jsonl").read_text().splitlines() for folder in (one, other))
    ]
    assert losses[0] == losses[1]


def refused(message: str, run, out: Path, **kwargs) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        train(run, out, **kwargs)
    assert "\n" not in str(refusal.value)
