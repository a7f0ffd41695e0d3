"""The three sizes that every recipe comes in. A recipe takes its lengths, batches and rates from here."""

from collections.abc import Mapping
from dataclasses import dataclass

from codistill.config import BatchSize, Checkpointing, Data, Evaluation, Family, Logging, Objective
from codistill.schedules import Spec


@dataclass(frozen=True, kw_only=True)
class Size:
    """What the members of a recipe have in common. Models differ in their number of layers only."""

    family: Family
    width: int
    dropout: float
    layers: Mapping[str, int]
    objective: Objective
    data: Data
    batch: BatchSize
    steps: int
    lr: Spec
    checkpoint: Checkpointing
    evaluate: Evaluation
    log: Logging


# Minutes on two CPU cores. A pre-norm ModernBERT leaves the unigram plateau within a minute, where a post-norm BERT
# of the same size sits on it for millions of tokens; what was tried stands in docs/log.md.
TINY = Size(
    family="modernbert",
    width=128,
    dropout=0.0,
    layers={"large": 6, "small": 4, "very_weak": 2, "extremely_weak": 1},
    objective=Objective(mask_rate=0.3),
    data=Data(
        train=["builtin:python/train"],
        validation=["builtin:python/validation"],
        tokenizer="train:wordpiece:4096",
        length=64,
    ),
    batch=BatchSize(sequences=64),
    steps=1000,
    lr={"warmup_linear": [3e-3, 0.05]},
    checkpoint=Checkpointing(every=500),
    evaluate=Evaluation(every=250, sequences=1024),
    log=Logging(every=10),
)

# Minutes on one GPU, on the user's own text: `data.train` and `data.validation` must be given.
SMALL = Size(
    family="modernbert",
    width=512,
    dropout=0.0,
    layers=TINY.layers,
    objective=Objective(mask_rate=0.3),
    data=Data(tokenizer="train:wordpiece:30522", length=128),
    batch=BatchSize(sequences=256),
    steps=4000,
    lr={"warmup_linear": [1e-3, 0.05]},
    checkpoint=Checkpointing(every=500),
    evaluate=Evaluation(every=500, sequences=2048),
    log=Logging(every=50),
)

# The published setting (DWT, ACL Findings 2023; CTCD, EMNLP Findings 2023). From the DWT paper: 67M parameters in 6
# layers (teachers of 4, 2 and 1 layers: inferred from their size ratios), 30M sentences of BookCorpus + Wikipedia,
# 20 epochs, learning rate 5e-4, 5 % linear warm-up, Adam, 16 sequences on each of 8 GPUs, weights 1 : 1. For CTCD the
# sizes are known second-hand and its weights not at all, so it takes the same. Chosen here, because the papers leave
# it open:
#   length 128, one sentence a row (30M / 128 sequences × 20 epochs = 4,687,500 steps); masking rate 15 %, drawn anew
#   in every epoch; linear decay to 0; betas 0.9 and 0.999, eps 1e-8, weight decay 0.01; clipping at 1; dropout 0.1
#   (BERT's); temperature 1 with the factor τ²; KL over the masked positions; no next-sentence prediction; the
#   "quantization" that DWT mentions left out; seed 0.
PAPER = Size(
    family="bert",
    width=768,
    dropout=0.1,
    layers=TINY.layers,
    objective=Objective(mask_rate=0.15),
    data=Data(tokenizer="bert-base-uncased", length=128),
    batch=BatchSize(sequences=128),
    steps=4_687_500,
    lr={"warmup_linear": [5e-4, 0.05]},
    checkpoint=Checkpointing(every=5000),
    evaluate=Evaluation(every=20_000, sequences=4096),
    log=Logging(every=100),
)

SIZES: Mapping[str, Size] = {"tiny": TINY, "small": SMALL, "paper": PAPER}
