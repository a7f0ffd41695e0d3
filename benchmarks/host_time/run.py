"""Host time of a cohort step beside a bare PyTorch loop that does the same work, interleaved in one run.

    python benchmarks/host_time/run.py [--rounds 400] [--out benchmarks/host_time/results.json]

Both train two masked LMs that teach one another, so small that the host's work is most of a step: 1 and 2 layers of
32 units, 4 sequences of 16 tokens, 20 predicted rows, one thread. The bare loop calls the same models, the same loss
function, clipping and fused AdamW by hand; what it lacks is what a cohort adds: seeded noise, schedules, the watch
for values that are not finite, and metrics.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.optim import AdamW

from codistill.bench.measure import machine
from codistill.cohort import Cohort, Distillation, Member
from codistill.config import ModelConfig
from codistill.kernels import Edge, linear_cohort_loss
from codistill.models import Predictor, new_model
from codistill.objectives import Batch
from codistill.schedules import constant

VOCABULARY, LENGTH, SEQUENCES, ROWS = 50, 16, 4, 20
LAYERS = {"large": 2, "small": 1}


def new_predictors() -> dict[str, Predictor]:
    return {
        name: Predictor(
            new_model(
                ModelConfig(layers=layers, width=32, heads=2, dropout=0.1),
                vocabulary=VOCABULARY,
                length=LENGTH,
                tokenizer=None,
                seed=0,
                name=name,
            ),
            VOCABULARY,
        )
        for name, layers in LAYERS.items()
    }


def new_batch() -> Batch:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=draw)
    rows_N = torch.randperm(ids.numel(), generator=draw)[:ROWS]
    return Batch({"input_ids": ids}, rows_N, ids.flatten()[rows_N])


def cohort_step():
    members = [
        Member(name, p, AdamW(p.parameters(), lr=1e-3, fused=True), lr=constant(1e-3))
        for name, p in new_predictors().items()
    ]
    cohort = Cohort(members, [Distillation("large", "small"), Distillation("small", "large")])
    return lambda step, batch: cohort.step(step, [batch])


def bare_step():
    predictors = new_predictors()
    optimizers = [AdamW(p.parameters(), lr=1e-3, fused=True) for p in predictors.values()]
    edges = [Edge("large", "small"), Edge("small", "large")]
    rows = torch.tensor(float(ROWS))

    def step(_: int, batch: Batch) -> None:
        features = {name: p(batch.inputs, batch.rows_N) for name, p in predictors.items()}
        loss = linear_cohort_loss(
            features,
            {name: p.output_weight for name, p in predictors.items()},
            {name: p.output_bias for name, p in predictors.items()},
            batch.labels_N,
            hard_weight=dict.fromkeys(predictors, 1.0),
            edges=edges,
            denominator=rows,
        )
        loss.total.backward()
        for predictor, optimizer in zip(predictors.values(), optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps, batch = {"cohort": cohort_step(), "bare": bare_step()}, new_batch()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(arguments.rounds + 20):
        for name, step in steps.items():
            start = time.perf_counter()
            step(round_, batch)
            if round_ >= 20:
                seconds[name].append(time.perf_counter() - start)
    deciles = {n: [round(1e6 * q) for q in statistics.quantiles(s, n=10)] for n, s in seconds.items()}
    results = {
        "command": f"python benchmarks/host_time/run.py --rounds {arguments.rounds}",
        "machine": machine("cpu"),
        "microseconds": {name: {"p10": d[0], "median": d[4], "p90": d[8]} for name, d in deciles.items()},
        "ratio": {
            "p10": round(deciles["cohort"][0] / deciles["bare"][0], 3),
            "median": round(deciles["cohort"][4] / deciles["bare"][4], 3),
        },
    }
    print(json.dumps(results, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
