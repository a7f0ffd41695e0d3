"""Runs drawn at random, from all that a configuration can say at once, against a loop written by hand."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from codistill.build import build
from codistill.config import Run
from codistill.loading import load
from codistill.train import Stopped, train
from plain_loop import PlainLoop
from runs import assert_same_run

FAMILIES = {
    "mlm": ["bert", "modernbert", "roberta", "distilbert", "electra", "deberta-v2"],
    "clm": ["gpt2", "llama", "qwen2", "qwen3", "gemma3_text"],
}
DIVERGENCES = ["forward_kl", "reverse_kl", "jensen_shannon", "squared_error"]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "far", "into", "our", "old", "garden", "eat", "quickly"]


class Draw(random.Random):
    """Random settings."""

    def text(self, file: Path) -> Path:
        """Documents of 1 to 60 sentences."""
        sentence = lambda: " ".join(self.choices(WORDS, k=self.randint(1, 12))).capitalize() + "."  # noqa: E731
        documents = [" ".join(sentence() for _ in range(self.choice([1, 3, 8, 20, 60]))) for _ in range(60)]
        file.write_text("\n".join(json.dumps({"text": document}) for document in documents))
        return file

    def schedule(self, low: float, high: float, steps: int) -> float | dict:
        """A number as often as not."""
        a, b = (round(self.uniform(low, high), 4) for _ in range(2))
        return self.choice(
            [
                *[a, a, a, 0.0],
                {self.choice(["linear", "cosine"]): [a, b]},
                {self.choice(["linear", "cosine"]): [a, b, self.randint(1, steps + 2)]},
                {"step": {0: a, self.randint(1, steps + 1): b}},
                {self.choice(["warmup_linear", "warmup_cosine"]): [a, round(self.random(), 2)]},
            ]
        )

    def member(self, objective: str, steps: int, families: list[str]) -> dict:
        """A model of 16 to 48 units, and how it is trained."""
        family = self.choice(families)
        shape = {"family": family, "layers": self.randint(1, 3), "width": self.choice([16, 32, 48])}
        shape["heads"] = self.choice([1, 2, 4])
        if objective == "clm" and family != "gpt2" and self.random() < 0.3:
            shape["key_value_heads"] = 1
        if self.random() < 0.3:
            shape["feed_forward"] = self.choice([16, 40])
        return {
            "model": shape,
            "hard_weight": self.schedule(0, 2, steps),
            "lr": self.schedule(1e-4, 2e-2, steps),
            "betas": [self.choice([0.0, 0.9]), self.choice([0.95, 0.999])],
            "eps": self.choice([1e-3, 1e-4]),  # a smaller one makes rounding as large as a gradient near 0
            "weight_decay": self.choice([0.0, 0.01, 0.3]),
            "clip": self.choice([0.1, 1.0, 50.0]),
            "gradient_checkpointing": self.random() < 0.2,
        }

    def members(self, objective: str, steps: int, families: list[str]) -> dict:
        """One to three, of which the first learns."""
        names = self.sample(["large", "small", "mid-1", "a_b"], self.choice([1, 2, 2, 3, 3]))
        found = {name: self.member(objective, steps, families) for name in names}
        for name in names[1:]:
            if self.random() < 0.2:
                found[name] = {"model": found[name]["model"], "frozen": True}
            elif self.random() < 0.1:
                found[name] = {"twin_of": names[0]}
        return found

    def edge(self, members: dict, teacher: str, student: str, steps: int) -> dict:
        """One edge of any kind."""
        edge = {"teacher": teacher, "student": student, "weight": self.schedule(0, 3, steps)}
        edge["kind"] = self.choice(["logits", "hidden", "relation", "relation"])
        if edge["kind"] == "logits":
            return {**edge, "divergence": self.choice(DIVERGENCES), "temperature": self.choice([0.5, 1, 1, 2, 4])}
        if edge["kind"] == "relation":
            edge["relation_heads"] = self.choice([1, 2, 4])
        if all("model" in members[name] for name in (teacher, student)) and self.random() < 0.5:
            depths = [members[name]["model"]["layers"] for name in (student, teacher)]
            pairs = [[own, its] for own in range(1, depths[0] + 1) for its in range(1, depths[1] + 1)]
            own, its = zip(*self.sample(pairs, min(len(pairs), self.randint(1, 2))), strict=True)
            edge["layers"] = {"student": list(own), "teacher": list(its)}
        return edge

    def run(self, folder: Path) -> dict:
        """The whole configuration."""
        objective, steps = self.choice(["mlm", "clm"]), self.randint(2, 4)
        packing, accumulate = self.choice(["contiguous", "padded"]), self.choice([1, 1, 2, 3])
        apart = packing == "contiguous" and self.random() < 0.7
        families = [f for f in FAMILIES[objective] if not (apart and f == "deberta-v2")]  # which cannot keep them apart
        members = self.members(objective, steps, families)
        learn = [name for name in members if not members[name].get("frozen")]
        pairs = [(a, b) for a in members for b in learn if a != b and self.random() < 0.8]
        text = str(self.text(folder / "text.jsonl"))
        masks = {"mask_rate": self.choice([0.1, 0.15, 0.3, 0.5]), "whole_word": self.random() < 0.3}
        return {
            "objective": {"name": objective, **(masks if objective == "mlm" else {})},
            "data": {
                "train": [text],
                "validation": [text],
                "tokenizer": self.choice(["train:wordpiece:200", "train:wordpiece:128"]),
                "length": self.choice([8, 13, 24, 40]),
                "packing": packing,
                "within_documents": apart,
                "unit": self.choice(["document", "sentence"]),
                "keep_every": self.choice([1, 1, 2]),
            },
            "members": members,
            "distillation": [self.edge(members, *pair, steps) for pair in pairs],
            "steps": steps,
            "batch": {"sequences": accumulate * self.choice([2, 3, 5]), "accumulate": accumulate},
            "precision": "float32",
            "seed": self.randint(0, 99),
            "log": {"every": 1},
            "evaluate": {"every": self.choice([1, 2, 100]), "sequences": self.choice([4, 9])},
            "checkpoint": {"every": self.choice([1, 2, 100])},
        }


def logged(out: Path, run: Run) -> tuple[list[dict], dict]:
    """(the lines of each step, the held-out losses of the end)."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    ends = [line["held_out"] for line in lines if "held_out" in line and line["step"] == run.steps]
    return [line for line in lines if "held_out" not in line], {name: s["loss"] for name, s in ends[-1].items()}


@pytest.mark.parametrize("seed", range(32))
def test_a_run_drawn_at_random_is_what_a_plain_loop_computes(seed, tmp_path):
    run = load(Draw(seed).run(tmp_path))
    out = train(run, tmp_path / "run", device="cpu")
    plain = PlainLoop(run, build(run, torch.device("cpu"))).train()
    lines, held_out = logged(out, run)
    assert len(lines) == len(plain.metrics) == run.steps
    for step, (line, expected) in enumerate(zip(lines, plain.metrics, strict=True)):
        losses = {name: line.get(name) for name in expected}
        assert losses == pytest.approx(expected, rel=3e-3 if step else 2e-4, abs=1e-4), f"step {step}"
    assert held_out == pytest.approx({name: plain.held_out_loss(name) for name in run.members}, rel=1e-3)
    for name in run.trained:
        saved, mine = load_file(out / "members" / name / "model.safetensors"), plain.models[name].state_dict()
        for key, tensor in saved.items():
            torch.testing.assert_close(tensor, mine[key], rtol=0, atol=2e-3)


@pytest.mark.parametrize("seed", range(100, 108))
def test_a_run_drawn_at_random_resumes_bit_for_bit(seed, tmp_path):
    draw = Draw(seed)
    tree = draw.run(tmp_path)
    for member in tree["members"].values():
        if "model" in member:
            member["model"]["dropout"] = draw.choice([0.0, 0.1, 0.3])
    tree["precision"] = draw.choice(["float32", "bfloat16"])
    tree["log"]["every"], tree["data"]["tokens"] = draw.choice([1, 2]), draw.choice([None, 1000])
    run = load(tree)
    whole = train(run, tmp_path / "whole", device="cpu")
    with pytest.raises(Stopped):
        train(run, tmp_path / "parts", device="cpu", stop_at=draw.randint(1, run.steps - 1))
    assert_same_run(whole, train(run, tmp_path / "parts", device="cpu", resume=True))
