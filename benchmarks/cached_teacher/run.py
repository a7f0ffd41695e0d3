"""What reading a teacher's cache costs, beside a stand-alone step, and what a step costs with the live teacher.

    python benchmarks/cached_teacher/run.py [--rounds 15] [--out benchmarks/cached_teacher/results.json]

The sizes of dwt-clm:tiny on the built-in text, in float32, on one thread, interleaved in one process: a student of 6
layers × 128, a teacher of 4 (of random weights: it takes as long as a trained one), 16 rows of 64 tokens, vocabulary
4,096. `read` is what `Batch.cached` adds to making a batch, with the file in the page cache. A run reads ahead in a
thread, so that what stands here is an upper bound of what it waits.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from codistill import caching
from codistill.bench.measure import interleaved, machine, summary
from codistill.build import build
from codistill.data.tokenizers import load_tokenizer
from codistill.loading import load, override, to_dict
from codistill.models import new_model
from codistill.recipes import find
from codistill.recipes.sizes import CAUSAL_TINY
from codistill.teacher_cache import TeacherCache

CPU, STEPS = torch.device("cpu"), 20
KINDS = {"features": {}, "top_k": {"few": 64}, "sampled": {"few": 64}}


def a_teacher(folder: Path) -> Path:
    """A model folder of the recipe's teacher, with the run's tokenizer."""
    alone = build(run_of("standalone-clm"), CPU)
    model = new_model(
        CAUSAL_TINY.models["small"],
        vocabulary=alone.cohort.members["large"].predictor.vocabulary,
        length=64,
        tokenizer=alone.tokenizer,
        seed=1,
        name="weak",
    )
    model.save_pretrained(folder)
    alone.tokenizer.save_pretrained(folder)
    load_tokenizer(folder)
    return folder


def run_of(recipe: str, *settings: str):
    changes = [f"steps={STEPS}", "precision=float32", "evaluate.sequences=8", *settings]
    return load(override(to_dict(find(recipe)), changes))


def stepper(built):
    state = {"step": 0}

    def step():
        built.cohort.step(state["step"] % STEPS, built.batches.at(state["step"] % STEPS))
        state["step"] += 1

    return step


def reader(cache: TeacherCache, batches):
    state = {"step": 0}

    def read():
        at = state["step"] % STEPS
        cache.read(at * 16, batches[at])
        state["step"] += 1

    return read


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        teacher = a_teacher(Path(scratch) / "teacher")
        run = run_of("dwt-clm", f"members.weak.path={teacher}")
        live = build(run, CPU)
        batches = [live.batches.at(step)[0] for step in range(STEPS)]
        steps = {"stand-alone step": stepper(build(run_of("standalone-clm"), CPU)), "step, live teacher": stepper(live)}
        sizes = {}
        for kind, settings in KINDS.items():
            plan = caching.plan(run, "weak", kind=kind, device="cpu", **settings)
            folder = Path(scratch) / kind
            manifest = caching.write(plan, folder)
            sizes[kind] = {"bytes_per_token": plan.bytes_per_token, "kl_error": manifest["kl_error"], **settings}
            steps[f"read {kind}"] = reader(TeacherCache.open(str(folder), "cache"), batches)
            reading = load(override(to_dict(run), [f"members.weak.cached={folder}"]))
            steps[f"step, cached {kind}"] = stepper(build(reading, CPU))
        seconds = interleaved(steps, arguments.rounds, "cpu")
    medians = {name: summary(each)["median"] for name, each in seconds.items()}
    alone = medians["stand-alone step"]
    results = {
        "kinds": sizes,
        "seconds": {name: summary(each) for name, each in seconds.items()},
        "of_a_stand_alone_step": {name: round(median / alone, 4) for name, median in medians.items()},
        "machine": machine("cpu", ("transformers",)),
    }
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results["of_a_stand_alone_step"] | {"kinds": sizes}, indent=1))


if __name__ == "__main__":
    main()
