"""What a run is: frozen dataclasses that round-trip to YAML. Loading them strictly is `codistill.loading`'s work.

Nothing here imports torch, so a configuration is checked in a fraction of a second. Durations are in steps; `lr` and
every weight take a number or a schedule (`codistill.schedules`).
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

from codistill.errors import did_you_mean
from codistill.own_code import is_own
from codistill.schedules import Spec

Family = Literal[
    "bert",
    "modernbert",
    "roberta",
    "distilbert",
    "electra",
    "deberta-v2",
    "gpt2",
    "llama",
    "qwen2",
    "qwen3",
    "gemma3_text",
]


def limited(default: Any, low: float | None = None, high: float | None = None, above: float | None = None) -> Any:
    """A field with a default and a range: low ≤ value ≤ high, or value > above."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


# What language models are called that are trained with an objective.
KINDS = {"mlm": "masked", "clm": "causal"}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is predicted, by its `name`: `mlm` masks `mask_rate` of each row (80 % [MASK], 10 % random, 10 % kept), with
    `whole_word` all pieces of a word or none; `clm` predicts every token from those before it, and has no use for
    either."""

    name: Literal["mlm", "clm"] = "mlm"
    mask_rate: float = limited(0.15, above=0, high=0.9)
    whole_word: bool = False

    def rows_of(self, length: int) -> int:
        """How many positions of a row of `length` tokens are predicted."""
        return length - 1 if self.name == "clm" else round(self.mask_rate * length)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Text and its tokenizer. `train` and `validation`: files, folders, globs, built-in text, hub data sets, or one
    prepared folder (docs/data.md). `tokenizer`: a folder, a hub name, a vocab.txt, or `train:wordpiece:4096` to train
    one; None: the one of a prepared folder, or of the run's pre-trained members. `length`: tokens in a row.

    `column`: where the text stands in .jsonl and Parquet. `unit`: what a separator ends, document, paragraph or
    sentence; `keep_every` 4: train on one unit of every four. `packing`: rows cut from the running text
    (contiguous), or one unit to a row, cut at `length` and padded up to it (padded; the tokens that a run counts are
    positions, padding among them).
    `within_documents` limits attention to the document (a row holds several), and lets positions begin anew with it;
    `clm` then predicts no first token of a document from the one before. `tokens`: use only so many tokens of the
    training text, taken evenly from all of it; a run that needs more passes over them again.
    """

    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    column: str = "text"
    unit: Literal["document", "paragraph", "sentence"] = "document"
    keep_every: int = limited(1, low=1)
    packing: Literal["contiguous", "padded"] = "contiguous"
    length: int = limited(128, low=8)
    within_documents: bool = False
    tokens: int | None = limited(None, low=1)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """An architecture of `family` to initialise at random: `layers` of `width`, with `dropout`; its vocabulary is the
    tokenizer's.

    `heads` None: width / 64. `key_value_heads` None: as many, or with `init` as many for each head as in its source.
    `feed_forward` None: 1.5 · width (gated) for ModernBERT, 4 · width for the other masked families and GPT-2,
    3 · width (gated) for the other causal ones. With an `init` without `width` and `learned`, from a source of this
    width, both are as many as the source has.
    """

    family: Family = "modernbert"
    layers: int = limited(4, low=1)
    width: int = limited(128, low=8)
    heads: int | None = limited(None, low=1)
    key_value_heads: int | None = limited(None, low=1)
    feed_forward: int | None = limited(None, low=1)
    dropout: float = limited(0.0, low=0, high=0.9)

    @property
    def num_heads(self) -> int:
        """Attention heads, 64 wide where `heads` does not say how many."""
        return self.heads or max(self.width // 64, 1)


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """What a member starts from instead of random numbers (docs/remap.md).

    `from`: a model folder, as a finished run's members/NAME or a checkpoint's NAME. `depth` and `width` are methods of
    `codistill.remap`; `depth` may be a list of source layers instead, counted from 0. `noise` parts the copies that
    `width` makes, by so many standard deviations, and keeps the function. `learned`: steps of LiGO on the run's own
    text, which begin from `depth` and find the widths themselves.
    Without `width` and `learned` only the depth changes, and heads and feed-forward units that `model` does not name
    are the source's. So is what `model` has no setting for: rotary positions, norm epsilons, activation, vocabulary.
    """

    from_: str
    depth: list[int] | str | None = None
    width: str | None = None
    noise: float = limited(0.0, low=0)
    learned: int | None = limited(None, low=1)

    @property
    def keeps_widths(self) -> bool:
        """Whether all widths have to be the source's."""
        return self.width is None and self.learned is None


@dataclass(frozen=True, kw_only=True)
class MemberConfig:
    """A model of the cohort: `model` (a new one) or `path` (a Hugging Face folder or hub name).

    A new one starts at random, or with `init` from another model of any size. `trust_remote_code`: run Python code
    that comes with the model at `path`. `frozen`: teach, and do not learn. `hard_weight`: of its loss on the text
    itself, beside what teachers add. AdamW takes `lr`, `betas`, `eps` and `weight_decay`, after the gradient's norm is
    cut to `clip`.
    `cached`: a folder of `codistill cache-teacher`, read in place of running a frozen member (docs/causal.md).
    `gradient_checkpointing` computes activations again in the backward pass instead of keeping them: the same bits,
    less memory, more time. `twin_of` names a member whose settings, initialisation and noise this one shares, for a
    paired comparison; `seeded_as` a name to key initialisation and noise by, in place of its own.
    """

    model: ModelConfig | None = None
    path: str | None = None
    trust_remote_code: bool = False
    init: InitConfig | None = None
    twin_of: str | None = None
    seeded_as: str | None = None
    frozen: bool = False
    cached: str | None = None
    hard_weight: Spec = field(default=1.0)
    lr: Spec = field(default_factory=lambda: {"warmup_linear": [5e-4, 0.05]})
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = limited(1e-8, above=0)
    weight_decay: float = limited(0.01, low=0)
    clip: float = limited(1.0, above=0)
    gradient_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Pairs of layers, counted from 1: the first of `student` learns from the first of `teacher`, and so on."""

    student: list[int]
    teacher: list[int]


_DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "squared_error")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """An edge: `teacher` teaches `student`, whose loss gains `weight` · what `kind` says. The teacher gets no gradient.

    `logits`: τ² · `divergence`, of forward_kl, reverse_kl, jensen_shannon and squared_error, τ being the `temperature`;
    or FILE.py:FUNCTION, a function of your own of student's and teacher's logits (N, V) and τ that gives (N,), τ²
    included where you want it. `hidden`: squared error of states. `relation`: KL of attention relations, in
    `relation_heads` heads, by default as many as the student's. `layers`: which, by default the last of each.
    """

    teacher: str
    student: str
    kind: Literal["logits", "hidden", "relation"] = "logits"
    divergence: str = "forward_kl"
    weight: Spec = field(default=1.0)
    temperature: float = limited(1.0, above=0)
    layers: Layers | None = None
    relation_heads: int | None = limited(None, low=1)


def edge_problem(edge: Any) -> str | None:
    """Why an edge's settings conflict, in words; None if they do not."""
    if edge.teacher == edge.student:
        return f"{edge.teacher!r} cannot teach itself; name another teacher or student"
    if isinstance(edge.divergence, str) and edge.divergence not in _DIVERGENCES and not is_own(edge.divergence):
        near = did_you_mean(edge.divergence, _DIVERGENCES)
        return f"divergence {edge.divergence!r}{near}; wanted {', '.join(_DIVERGENCES)} or FILE.py:FUNCTION"
    if not isinstance(edge.temperature, Real) or not 0 < float(edge.temperature) < math.inf:
        return f"temperature {edge.temperature!r}; wanted a finite number above 0"
    if edge.kind not in ("logits", "hidden", "relation"):
        return f"kind {edge.kind!r}; wanted logits, hidden or relation"
    if edge.kind == "logits":
        return "layers are for the kinds hidden and relation" if edge.layers is not None else _heads_problem(edge)
    if edge.divergence != "forward_kl" or edge.temperature != 1:
        return f"divergence and temperature are for the kind logits, not {edge.kind}; leave them out"
    return (None if edge.layers is None else _layers_problem(edge.layers)) or _heads_problem(edge)


def _layers_problem(layers: Layers) -> str | None:
    if not (len(layers.student) == len(layers.teacher) > 0):
        return f"layers: {len(layers.student)} of the student and {len(layers.teacher)} of the teacher; give pairs"
    if min(*layers.student, *layers.teacher) < 1:
        return f"layers: {min(*layers.student, *layers.teacher)}; layers are counted from 1"
    (student, teacher), times = Counter(zip(layers.student, layers.teacher, strict=True)).most_common(1)[0]
    if times > 1:
        return f"layers: the student's {student} and the teacher's {teacher} are paired {times} times; give a pair once"
    return None


def _heads_problem(edge: Any) -> str | None:
    if edge.relation_heads is not None and edge.kind != "relation":
        return f"relation_heads are for the kind relation, not {edge.kind}"
    return None


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """`sequences` of one step, over all ranks, computed in `accumulate` micro-batches."""

    sequences: int = limited(64, low=1)
    accumulate: int = limited(1, low=1)


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """A checkpoint every `every` steps and at the end.

    The newest `keep` stay, those whose step `keep_every` divides, and with `keep_best` for each trained member the one
    with its lowest held-out loss, of those that were saved right after an evaluation.
    """

    every: int = limited(1000, low=1)
    keep: int = limited(2, low=1)
    keep_every: int | None = limited(None, low=1)
    keep_best: bool = False


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out loss every `every` steps and at the end, on at most `sequences` rows of the validation text."""

    every: int = limited(1000, low=1)
    sequences: int = limited(1024, low=1)


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """End the run after `patience` evaluations in a row without a held-out loss that is lower than the lowest before.

    The loss is summed over the trained members; it counts as lower if it is so by more than `least` nats.
    """

    patience: int = limited(3, low=1)
    least: float = limited(0.0, low=0)


@dataclass(frozen=True, kw_only=True)
class Logging:
    """A line of `metrics.jsonl` every `every` steps; only there does the host wait for the device."""

    every: int = limited(10, low=1)


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that determines a run's numbers; `provenance` is what `run.yaml` records besides (versions, data hashes).

    `recipe`: the name of what it was made from. `steps`: of all members together, on one batch each. `precision`: of
    matrix products; auto is what the device is good at. `seed`: of parameters, noise, and the order and masks of the
    text. `deterministic`: on a GPU, only algorithms that repeat their bits, which is slower.
    `non_finite`: what to do about a step with a loss or gradient that is not finite: stop, or skip it and count.
    `compile`: whether layers (on a CPU the loss too) are compiled: faster; other roundings; a minute at the start.
    `distributed`: what the processes that torchrun starts share; auto is ddp where there are several, else single.
    `track`: where to send the lines of `metrics.jsonl` besides; changes no number.
    """

    recipe: str | None = None
    objective: Objective = field(default_factory=Objective)
    data: Data = field(default_factory=Data)
    members: dict[str, MemberConfig] = field(default_factory=dict)
    distillation: list[DistillationConfig] = field(default_factory=list)
    steps: int = limited(1000, low=1)
    batch: BatchSize = field(default_factory=BatchSize)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    deterministic: bool = False
    seed: int = limited(0, low=0)
    non_finite: Literal["stop", "skip"] = "stop"
    distributed: Literal["auto", "single", "ddp", "fsdp2"] = "auto"
    checkpoint: Checkpointing = field(default_factory=Checkpointing)
    evaluate: Evaluation = field(default_factory=Evaluation)
    stop_early: EarlyStop | None = None
    log: Logging = field(default_factory=Logging)
    track: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = field(default_factory=list)
    provenance: dict[str, Any] | None = None

    def seed_name(self, member: str) -> str:
        """What the initialisation and the noise of `member` are keyed by."""
        return self.members[member].seeded_as or self.members[member].twin_of or member

    @property
    def rows_per_step(self) -> int:
        """Predicted rows of a step, where every sequence is full."""
        return self.batch.sequences * self.objective.rows_of(self.data.length)

    @property
    def trained(self) -> list[str]:
        """Names of the members that learn."""
        return [name for name, member in self.members.items() if not member.frozen]
