"""What saving costs training, for the `small` pair: one save per 50 steps.

    python benchmarks/checkpoint/run.py [--sequences 8] [--out benchmarks/checkpoint/results.json]

Trains `ctcd:small`'s two members on random tokens, in rounds: ten steps without saving, then a save and ten steps
during which it is written. The cost of a save is the time the call took plus what those ten steps took beyond the
others; over 50 steps of the median length that is the share. The smaller the batch the larger the share: 8 sequences
are a thirty-second of the recipe's batch.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.optim import AdamW

from codistill.bench.measure import machine
from codistill.checkpoint import Retention, Saver, Trained
from codistill.cohort import Cohort, Distillation, Member
from codistill.models import Predictor, new_model
from codistill.objectives import Batch
from codistill.recipes import find
from codistill.schedules import constant

VOCABULARY, STEPS_A_PART, STEPS_A_SAVE = 30522, 10, 50


def new_cohort(length: int) -> Cohort:
    members = []
    for name, config in find("ctcd:small").members.items():
        model = new_model(config.model, vocabulary=VOCABULARY, length=length, tokenizer=None, seed=0, name=name)
        optimizer = AdamW(model.parameters(), lr=1e-4, fused=True)
        members.append(Member(name, Predictor(model, VOCABULARY), optimizer, lr=constant(1e-4)))
    return Cohort(members, [Distillation("large", "small"), Distillation("small", "large")])


def new_batch(sequences: int, length: int) -> Batch:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (sequences, length), generator=draw)
    rows_N = torch.randperm(ids.numel(), generator=draw)[: round(0.3 * ids.numel())]
    return Batch({"input_ids": ids}, rows_N, ids.flatten()[rows_N])


def timed_steps(cohort: Cohort, batch: Batch) -> list[float]:
    seconds = []
    for step in range(STEPS_A_PART):
        start = time.perf_counter()
        cohort.step(step, [batch])
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cohort, batch = new_cohort(128), new_batch(arguments.sequences, 128)
    trained = {m.name: Trained(m.predictor.model, m.optimizer) for m in cohort.trained}
    cohort.step(0, [batch])
    plain: list[float] = []
    calls, extras = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            plain += timed_steps(cohort, batch)
            saver = Saver(Path(folder), Retention(newest=1))
            start = time.perf_counter()
            saver.save(1, trained)
            calls.append(time.perf_counter() - start)
            beside = timed_steps(cohort, batch)
            saver.finish()
            extras.append(sum(beside) - STEPS_A_PART * statistics.median(plain))
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    step = statistics.median(plain)
    cost = statistics.median(calls) + max(statistics.median(extras), 0.0)
    results = {
        "command": f"python benchmarks/checkpoint/run.py --sequences {arguments.sequences} --rounds {arguments.rounds}",
        "machine": machine("cpu"),
        "checkpoint_megabytes": round(size / 1e6),
        "seconds": {
            "step": round(step, 3),
            "save_call": [round(s, 3) for s in calls],
            "extra_in_the_ten_steps_beside": [round(s, 3) for s in extras],
        },
        "share_of_50_steps": round(cost / (STEPS_A_SAVE * step), 4),
    }
    print(json.dumps(results, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
