"""What the library does on a CPU and on a pretended GPU, as JSON: check.py TEXT FOLDER."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu import pretend, reads, waits  # first: torch must not be there yet
from torch import float32, tensor

from codistill import caching
from codistill.cohort import Cohort, Distillation
from codistill.errors import UserError
from codistill.evaluate.run import evaluate
from codistill.generate import generate
from codistill.loading import load, override, to_dict
from codistill.train import Stopped, train
from cohorts import VOCABULARY, batch, member
from evaluations import QUICK, labelled, model_folder, pairs, write
from runs import assert_same_run, small_run, with_teachers

SHORT = [
    "steps=4",
    "evaluate.every=4",
    "checkpoint.every=2",
    "log.every=4",
    "batch={sequences: 2, accumulate: 2}",
    "data.length=16",
]
FLOAT32 = [*SHORT, "precision=float32"]
KINDS = "{{teacher: large, student: small, kind: {}}}"
BACK = "{teacher: small, student: large, divergence: reverse_kl}"
EDGES = ", ".join([*map(KINDS.format, ("hidden", "relation")), BACK])


def losses(folder: Path) -> dict[str, float]:
    members = json.loads((folder / "results.json").read_text())["members"]
    return {name: member["loss"] for name, member in members.items()}


class Checks:
    """What is done on one device, in a folder of its own."""

    def __init__(self, device: str, text: Path, folder: Path, teacher: Path, causal: Path):
        self.device, self.text, self.folder = device, text, folder / device
        self.teacher, self.causal, self.made = teacher, causal, 0

    def trained(self, run, **options) -> Path:
        self.made += 1
        return train(run, self.folder / f"run-{self.made}", device=self.device, **options)

    def ctcd(self):
        run = small_run("ctcd", self.text, *FLOAT32)
        whole = self.trained(run)
        with pytest.raises(Stopped):
            train(run, self.folder / "parts", device=self.device, stop_at=2)
        assert_same_run(whole, train(run, self.folder / "parts", device=self.device, resume=True))
        return losses(whole)

    def other_edges(self):
        more = [f"distillation=[{EDGES}]", "members.large.gradient_checkpointing=true"]
        return losses(self.trained(small_run("ctcd", self.text, *FLOAT32, *more)))

    def documents(self):
        run = small_run("ctcd-clm", self.text, *FLOAT32, "data.within_documents=true")
        return losses(self.trained(run))

    def cached(self):
        run = with_teachers("dwt", self.text, self.teacher, *FLOAT32)
        plan = caching.plan(run, "weak", kind="features", few=4, dtype="float32", device=self.device)
        caching.write(plan, self.folder / "cache")
        return losses(self.trained(load(override(to_dict(run), [f"members.weak.cached={self.folder / 'cache'}"]))))

    def begun(self):
        init = [f"members.large.init={{from: {self.teacher}, learned: 2}}", f"data.tokenizer={self.teacher}"]
        return losses(self.trained(small_run("standalone", self.text, *FLOAT32, *init)))

    def scored(self):
        model = model_folder(self.folder / "model")
        write(self.folder / "blimp" / "a.parquet", pairs(12))
        for split, count in (("train", 40), ("validation", 20)):
            write(self.folder / "glue" / "sst2" / f"{split}.parquet", labelled("sst2", count, 0))
        tasks, data = ["mlm", "blimp", "glue/sst2"], self.folder
        found = evaluate(
            [str(model)],
            tasks,
            out=data / "scores",
            data=data,
            text=[str(self.text)],
            protocol=QUICK,
            device=self.device,
        )
        return {cell["task"]: cell["failed"] or cell["score"] for cell in found["cells"]}

    def wrong_label(self):
        """A label that is no token, and an edge whose weight is a tensor: which member failed, or the refusal."""
        members = [member(name, dropout=0.0) for name in ("one", "two")]
        for each in members:
            each.predictor.to(self.device)
        weight = tensor(0.5).to(self.device)
        cohort = Cohort(members, [Distillation("one", "two", weight=weight)], precision=float32)
        wrong = batch(0)
        wrong.labels_N[3] = VOCABULARY
        try:
            cohort.step(0, batch(1).to(self.device))
            cohort.step(1, wrong.to(self.device))
        except UserError as refusal:
            return str(refusal)
        failure = cohort.failure()
        assert failure is not None
        return str(failure)

    def continued(self):
        return generate(self.causal, "large", "the cat", tokens=5, temperature=0.0, device=self.device)


def watched(step: Callable[..., Any], inside: list[str]) -> Callable[..., Any]:
    """`step`, whose reads go into `inside`."""

    def watching(*args):
        before = len(reads)
        found = step(*args)
        inside.extend(reads[before:])
        return found

    return watching


def main(text: Path, folder: Path) -> None:
    teacher = train(small_run("standalone", text, *FLOAT32), folder / "teacher", device="cpu") / "members" / "large"
    causal = train(small_run("standalone-clm", text, *FLOAT32), folder / "causal", device="cpu")
    names = [name for name, of in vars(Checks).items() if callable(of) and name not in ("__init__", "trained")]
    checks, found = Checks("cpu", text, folder, teacher, causal), {}
    for name in names:
        found[name] = [getattr(checks, name)()]
    checks, inside = Checks("cuda", text, folder, teacher, causal), []
    Cohort.step = watched(Cohort.step, inside)
    with pretend():
        for name in names:
            found[name].append(getattr(checks, name)())
        low = checks.trained(small_run("ctcd", text, *SHORT, f"distillation=[{EDGES}]"))
    found["bfloat16"] = json.loads((low / "results.json").read_text())["precision"]
    print(json.dumps({"found": found, "reads": sorted(set(reads)), "in a step": inside, "waits": sorted(waits)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
