"""How large a study's models and runs are. `tiny` is what a CPU does in minutes a cohort; `small` and `paper` are the
recipes' sizes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from codistill.config import BatchSize, Checkpointing, Evaluation
from codistill.recipes.sizes import CAUSAL_PAPER, CAUSAL_SMALL, CAUSAL_TINY, PAPER, SMALL, TINY, Size
from codistill.study.scoring import BLIMP, GLUE

_VOCABULARIES = {"bert-base-uncased": 30_522, "Qwen/Qwen3-1.7B-Base": 151_669}
_LOOKS = 8


@dataclass(frozen=True, kw_only=True)
class Scale:
    """`masked` and `causal`: the runs of a study. `tasks`: what its models are scored on, beside the held-out text.
    `pairs`: BLiMP pairs of each paradigm, None for all. `most_members`: about how many models are trained in one
    process, so that a cohort takes at most a quarter of an hour at `tiny`."""

    name: str
    masked: Size
    causal: Size
    pairs: int | None
    most_members: int
    tasks: tuple[str, ...] = (BLIMP,)


def vocabulary_of(size: Size) -> int:
    """How many tokens the runs of `size` tell apart, as far as their tokenizer's name says it."""
    tokenizer = size.data.tokenizer or ""
    return _VOCABULARIES.get(tokenizer) or int(tokenizer.rpartition(":")[2])


def rows_of(size: Size) -> int:
    """Predicted rows in a step."""
    return size.batch.sequences * size.objective.rows_of(size.data.length)


def _often(size: Size, sequences: int = 1024) -> Size:
    """`size` with a learning curve of eight points, and a checkpoint at each of them."""
    every = max(1, size.steps // _LOOKS)
    checkpoint = Checkpointing(every=min(every, size.checkpoint.every), keep=1)
    return replace(size, evaluate=Evaluation(every=every, sequences=sequences), checkpoint=checkpoint)


def _of_shape(size: Size, width: int, heads: int, layers: Mapping[str, int]) -> Size:
    model = size.models["large"]
    shaped = {role: replace(model, layers=count, width=width, heads=heads) for role, count in layers.items()}
    return replace(size, models=shaped)


def _with_half(size: Size) -> Size:
    """With an extremely weak model: the very weak one at half its width."""
    model = size.models["very_weak"]
    half = replace(model, width=model.width // 2)
    return replace(size, models={**size.models, "extremely_weak": half})


def _for_a_gpu(name: str, masked: Size, causal: Size, *, most_members: int) -> Scale:
    """A recipe's sizes, scored on everything there is."""
    tasks = (BLIMP, *GLUE)
    return Scale(
        name=name, masked=_often(masked), causal=_often(causal), pairs=None, most_members=most_members, tasks=tasks
    )


# Chosen so that a stand-alone model leaves the unigram plateau far behind in a minute or two of one core; what was
# tried stands in docs/log.md.
_MASKED = replace(
    TINY,
    steps=1600,
    batch=BatchSize(sequences=16),
    learner=replace(TINY.learner, lr={"warmup_linear": [2e-3, 0.05]}),
)
_MASKED_LAYERS = {"large": 4, "small": 2, "very_weak": 1}
_CAUSAL = replace(CAUSAL_TINY, data=replace(TINY.data, tokenizer="train:wordpiece:2048"), steps=_MASKED.steps)
_CAUSAL_LAYERS = {"large": 4, "small": 2, "extremely_weak": 1}
_SHALLOW = replace(CAUSAL_PAPER.models["small"], layers=CAUSAL_PAPER.models["small"].layers // 2)
_CAUSAL_PAPER = replace(CAUSAL_PAPER, models={**CAUSAL_PAPER.models, "extremely_weak": _SHALLOW})

SCALES: Mapping[str, Scale] = {
    "tiny": Scale(
        name="tiny",
        masked=_often(_with_half(_of_shape(_MASKED, 128, 2, _MASKED_LAYERS)), sequences=512),
        causal=_often(_of_shape(_CAUSAL, 64, 2, _CAUSAL_LAYERS), sequences=512),
        pairs=30,
        most_members=6,
    ),
    "small": _for_a_gpu("small", SMALL, CAUSAL_SMALL, most_members=8),
    "paper": _for_a_gpu("paper", PAPER, _CAUSAL_PAPER, most_members=2),
}
