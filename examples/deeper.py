"""Beside the logits, hidden states and attention relations: small learns from large, as in MiniLMv2, and teaches it."""

from material import VOCABULARY, bert, loader
from torch.optim import AdamW

from codistill import Batch, Cohort, Distillation, Layers, Member, Predictor

members = []
for name, layers in (("large", 4), ("small", 2)):
    model = bert(layers)
    members.append(Member(name, Predictor(model, VOCABULARY), AdamW(model.parameters(), lr=1e-3, fused=True)))
cohort = Cohort(
    members,
    [
        Distillation("large", "small", kind="relation", relation_heads=4),
        Distillation("large", "small", kind="hidden", layers=Layers(student=[1, 2], teacher=[2, 4]), weight=0.1),
        Distillation("small", "large", "squared_error", weight=lambda step: max(0.0, 1 - step / 6)),
    ],
)
for step, batch in enumerate(loader()):
    metrics = cohort.step(step, Batch.from_labels(batch))
print(cohort.failure() or {name: round(value.item(), 3) for name, value in metrics.items()})
