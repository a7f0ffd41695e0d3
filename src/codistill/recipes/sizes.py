"""The three sizes that every recipe comes in, for masked and for causal models. A recipe takes its lengths, batches
and rates from here.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from codistill.config import (
    BatchSize,
    Checkpointing,
    Data,
    Evaluation,
    Logging,
    MemberConfig,
    ModelConfig,
    Objective,
)

_LAYERS = {"large": 6, "small": 4, "very_weak": 2, "extremely_weak": 1}


@dataclass(frozen=True, kw_only=True)
class Size:
    """What the runs of a size have in common. `models`: by their role; `learner`: how every model is trained.
    `teacher_steps`: of a pre-trained teacher, if not as many as its student's."""

    name: str
    models: Mapping[str, ModelConfig]
    objective: Objective
    data: Data
    batch: BatchSize
    steps: int
    learner: MemberConfig
    teacher_steps: int | None = None
    checkpoint: Checkpointing
    evaluate: Evaluation
    log: Logging


def teacher_path(size: Size, role: str) -> str:
    """Where a recipe looks for a pre-trained teacher of `role`."""
    return f"runs/standalone{_suffix(size)}-{size.name}-{size.models[role].layers}-layers/members/large"


def command_for_teacher(size: Size, role: str) -> str:
    """The command that makes the model at `teacher_path`."""
    model, large = asdict(size.models[role]), asdict(size.models["large"])
    changes = [f"members.large.model.{key}={value}" for key, value in model.items() if value != large[key]]
    changes = changes or [f"members.large.model.layers={model['layers']}"]
    if size.teacher_steps is not None and role != "large":
        changes.append(f"steps={size.teacher_steps}")
    settings = " ".join(f"--set {change}" for change in changes)
    out = teacher_path(size, role).removesuffix("/members/large")
    return f"codistill train standalone{_suffix(size)}:{size.name} {settings} --out {out}"


def _suffix(size: Size) -> str:
    return "-clm" if size.objective.name == "clm" else ""


def _by_depth(model: ModelConfig) -> dict[str, ModelConfig]:
    return {role: replace(model, layers=layers) for role, layers in _LAYERS.items()}


# Minutes on two CPU cores. A pre-norm ModernBERT leaves the unigram plateau within a minute, where a post-norm BERT
# of the same size sits on it for millions of tokens; what was tried stands in docs/log.md.
TINY = Size(
    name="tiny",
    models=_by_depth(ModelConfig(family="modernbert", width=128)),
    objective=Objective(mask_rate=0.3),
    data=Data(
        train=["builtin:python/train"],
        validation=["builtin:python/validation"],
        tokenizer="train:wordpiece:4096",
        length=64,
    ),
    batch=BatchSize(sequences=64),
    steps=1000,
    learner=MemberConfig(lr={"warmup_linear": [3e-3, 0.05]}),
    checkpoint=Checkpointing(every=500),
    evaluate=Evaluation(every=250, sequences=1024),
    log=Logging(every=10),
)

# Minutes on one GPU, on the user's own text: `data.train` and `data.validation` must be given.
SMALL = Size(
    name="small",
    models=_by_depth(ModelConfig(family="modernbert", width=512)),
    objective=Objective(mask_rate=0.3),
    data=Data(tokenizer="train:wordpiece:30522", length=128),
    batch=BatchSize(sequences=256),
    steps=4000,
    learner=MemberConfig(lr={"warmup_linear": [1e-3, 0.05]}),
    checkpoint=Checkpointing(every=500),
    evaluate=Evaluation(every=500, sequences=2048),
    log=Logging(every=50),
)

# The published setting (DWT, ACL Findings 2023; CTCD, EMNLP Findings 2023). From the DWT paper: 67M parameters in 6
# layers (teachers of 4, 2 and 1 layers: inferred from their size ratios), 30M sentences of BookCorpus + Wikipedia,
# 20 epochs, learning rate 5e-4, 5 % linear warm-up, Adam, 16 sequences on each of 8 GPUs, weights 1 : 1. For CTCD the
# sizes are known second-hand and its weights not at all, so it takes the same. Chosen here, because the papers leave
# it open:
#   length 128, one sentence a row (30M / 128 sequences × 20 epochs = 4,687,500 steps), the 30M being every fourth;
#   masking rate 15 %, drawn anew in every epoch; linear decay to 0; betas 0.9 and 0.999, eps 1e-8, weight decay 0.01;
#   clipping at 1; dropout 0.1 (BERT's); temperature 1 with the factor τ²; KL over the masked positions; no
#   next-sentence prediction; the "quantization" that DWT mentions left out; seed 0.
PAPER = Size(
    name="paper",
    models=_by_depth(ModelConfig(family="bert", width=768, dropout=0.1)),
    objective=Objective(mask_rate=0.15),
    data=Data(tokenizer="bert-base-uncased", unit="sentence", keep_every=4, packing="padded", length=128),
    batch=BatchSize(sequences=128),
    steps=4_687_500,
    learner=MemberConfig(lr={"warmup_linear": [5e-4, 0.05]}),
    checkpoint=Checkpointing(every=5000),
    evaluate=Evaluation(every=20_000, sequences=4096),
    log=Logging(every=100),
)

# Two minutes a model on one CPU core: a pre-norm decoder as SmolLM's and Llama's.
CAUSAL_TINY = Size(
    name="tiny",
    models=_by_depth(ModelConfig(family="llama", width=128)),
    objective=Objective(name="clm"),
    data=TINY.data,
    batch=BatchSize(sequences=16),
    steps=600,
    learner=TINY.learner,
    checkpoint=Checkpointing(every=300),
    evaluate=Evaluation(every=150, sequences=512),
    log=Logging(every=10),
)

# Minutes on one GPU, on the user's own text.
CAUSAL_SMALL = Size(
    name="small",
    models=_by_depth(ModelConfig(family="llama", width=512)),
    objective=Objective(name="clm"),
    data=Data(tokenizer="train:bpe:32000", length=256),
    batch=BatchSize(sequences=128),
    steps=4000,
    learner=SMALL.learner,
    checkpoint=SMALL.checkpoint,
    evaluate=SMALL.evaluate,
    log=SMALL.log,
)

# A plan for a cluster, after Lu and Liu (2026): a teacher of 0.7B parameters, trained on 30B tokens, and a student of
# 1.7B, trained on 50B. Only these four numbers are theirs; known to us second-hand. Chosen here: the shape of Qwen3
# and its tokenizer, 1M tokens a step, the rates, betas and decay that are usual at this size, whole rows of text.
CAUSAL_PAPER = Size(
    name="paper",
    models={
        "large": ModelConfig(family="qwen3", layers=28, width=2048, heads=16, key_value_heads=8),
        "small": ModelConfig(family="qwen3", layers=26, width=1280, heads=20, key_value_heads=10),
    },
    objective=Objective(name="clm"),
    data=Data(tokenizer="Qwen/Qwen3-1.7B-Base", length=2048),
    batch=BatchSize(sequences=512),
    steps=47_684,
    teacher_steps=28_611,
    learner=MemberConfig(lr={"warmup_cosine": [3e-4, 0.02]}, betas=[0.9, 0.95], weight_decay=0.1),
    checkpoint=Checkpointing(every=500),
    evaluate=Evaluation(every=1000, sequences=1024),
    log=Logging(every=20),
)

SIZES: Mapping[str, Size] = {"tiny": TINY, "small": SMALL, "paper": PAPER}
CAUSAL_SIZES: Mapping[str, Size] = {"tiny": CAUSAL_TINY, "small": CAUSAL_SMALL, "paper": CAUSAL_PAPER}
