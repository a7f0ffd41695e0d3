"""A cohort in PyTorch Lightning's loop: manual optimization, because each member has an optimizer of its own."""

import lightning
from material import VOCABULARY, bert, loader
from torch.nn import ModuleDict
from torch.optim import AdamW

from codistill import Batch, Cohort, Distillation, Member, Predictor


class Pair(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization, self.done = False, 0
        self.models = ModuleDict({"large": bert(layers=2), "small": bert(layers=1)})

    def configure_optimizers(self):  # here the models are on their device
        made = {name: AdamW(model.parameters(), lr=1e-3) for name, model in self.models.items()}
        members = [Member(name, Predictor(self.models[name], VOCABULARY), made[name]) for name in made]
        self.cohort = Cohort(members, [Distillation("large", "small"), Distillation("small", "large")])

    def training_step(self, batch, index):
        self.log_dict(self.cohort.step(self.done, Batch.from_labels(batch)))
        assert self.cohort.failure() is None, self.cohort.failure()
        self.done += 1


trainer = lightning.Trainer(max_epochs=1, accelerator="auto", devices=1, logger=False, enable_checkpointing=False)
trainer.fit(Pair(), loader())
