"""Two models of your own teach each other inside your own loop, with optimizers and a divergence of your own."""

import torch
from material import VOCABULARY, bert, loader
from torch.optim import AdamW, Muon

from codistill import Batch, Cohort, Distillation, Member, Predictor


def total_variation(student, teacher, temperature):
    """Logits (N, V) of both and τ in, one loss per row (N,) out."""
    p, t = (torch.softmax(logits / temperature, -1) for logits in (student, teacher))
    return (p - t).abs().sum(-1) / 2


large, small = bert(layers=2), bert(layers=1)
matrices = [p for n, p in large.named_parameters() if p.ndim == 2 and "embeddings" not in n]
others = [p for p in large.parameters() if all(p is not matrix for matrix in matrices)]
muon = [Muon(matrices, lr=1e-2), AdamW(others, lr=1e-3)]
cohort = Cohort(
    [
        Member("large", Predictor(large, VOCABULARY), muon),
        Member("small", Predictor(small, VOCABULARY), AdamW(small.parameters()), lr=lambda step: 1e-3 / (1 + step)),
    ],
    [Distillation("small", "large", total_variation), Distillation("large", "small", weight=2.0)],
)
for step, batch in enumerate(loader()):
    metrics = cohort.step(step, Batch.from_labels(batch))
print(cohort.failure() or {name: round(value.item(), 3) for name, value in metrics.items()})
