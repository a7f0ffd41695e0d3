"""The memory that a plan says, and what PyTorch then counts."""

import torch

from codistill import Run
from codistill import plan as planning
from codistill.bench.measure import live_bytes
from codistill.machine import compile_layers
from codistill.plan import made_up_batch, made_up_cohort, memory_of, model_of, most_at_once


def planned_and_counted_memory(run: Run) -> tuple[int, int]:
    """Bytes at once of a step on a CPU, parameters and optimizer included."""
    precision, vocabulary = getattr(torch, run.precision), planning._vocabulary(run)
    models = {name: model_of(run, name, vocabulary) for name in run.members}
    memory = memory_of(run, models, vocabulary, precision, "cpu")
    cohort = made_up_cohort(run, models, vocabulary, torch.device("cpu"), precision)
    if run.compile:  # as `build` does
        cohort.compiled = True
        for member in cohort.members.values():
            compile_layers(member.predictor.model)
    resident = sum(t.numel() * t.element_size() for m in cohort.members.values() for t in m.predictor.parameters())
    batches = [made_up_batch(run, vocabulary) for _ in range(run.batch.accumulate)]
    resident += 2 * sum(p.numel() * 4 for m in cohort.trained for p in m.parameters)  # AdamW's, made in the first step
    cohort.step(0, batches)
    counted = resident + live_bytes(lambda: cohort.step(1, batches))
    return most_at_once(memory, accumulates=run.batch.accumulate > 1), counted
