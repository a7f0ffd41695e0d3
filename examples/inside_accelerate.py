"""A cohort in a loop with Accelerate, which places models and batches and writes to trackers."""

from accelerate import Accelerator
from material import VOCABULARY, bert, loader
from torch.optim import AdamW

from codistill import Batch, Cohort, Distillation, Member, Predictor

accelerator = Accelerator()
members = []
for name, layers in (("large", 2), ("small", 1)):
    model = bert(layers).to(accelerator.device)
    members.append(Member(name, Predictor(model, VOCABULARY), AdamW(model.parameters(), lr=1e-3)))
cohort = Cohort(members, [Distillation("large", "small"), Distillation("small", "large")])
for step, batch in enumerate(accelerator.prepare(loader())):
    metrics = cohort.step(step, Batch.from_labels(batch))
    if failure := cohort.failure():
        raise RuntimeError(failure)
    accelerator.log({name: value.item() for name, value in metrics.items()}, step=step)
accelerator.unwrap_model(members[0].predictor.model).save_pretrained("large")
