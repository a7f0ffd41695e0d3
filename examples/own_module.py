"""Modules that no library knows: one split at its output embedding, and one that gives nothing but logits."""

from material import VOCABULARY, bert, loader
from torch import nn
from torch.optim import SGD

from codistill import Batch, Cohort, Distillation, Member, Predictor


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.output = nn.Embedding(VOCABULARY, 24), nn.Linear(24, VOCABULARY)
        self.mixer = nn.GRU(24, 24, batch_first=True)

    def features(self, inputs, rows):
        return self.mixer(self.words(inputs["input_ids"]))[0].flatten(0, 1)[rows]


split, whole, teacher = Tagger(), Tagger(), bert(layers=1)
predictors = {
    "split": Predictor.from_module(split, split.features, split.output, vocabulary=VOCABULARY),
    "whole": Predictor.from_module(whole, lambda i, r: whole.output(whole.features(i, r)), vocabulary=VOCABULARY),
}
members = [Member(name, p, SGD(p.parameters(), lr=0.1)) for name, p in predictors.items()]
members.append(Member("teacher", Predictor(teacher, VOCABULARY)))  # without an optimizer: frozen
cohort = Cohort(members, [Distillation("teacher", "split"), Distillation("split", "whole")])
for step, batch in enumerate(loader()):
    print(cohort.step(step, Batch.from_labels(batch)), cohort.failure() or "")
