"""How a score is made: every choice that a paper may leave out, with its default, recorded in results.json."""

from dataclasses import dataclass, field
from typing import Literal

from codistill.config import limited

# The default learning rate is this over the model's width squared: 1e-3 at 128, 6e-5 at 512, 3e-5 at 768.
RATE_TIMES_WIDTH_SQUARED = 16.0
# The settings of held-out text, which have no influence on fine-tuning.
OF_TEXT = ("mask_rate", "held_out_length", "held_out_column")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Fine-tuning, and how text is scored. Nothing is ever chosen by the dev set that is reported.

    `learning_rates`: none: 16 / width²; one: that; several: the one whose first seed scores best on a slice of the
    training set (`selection_share`) that it was not trained on. `checkpoint` best: the epoch that scores best on
    such a slice. `max_steps`: fewer epochs, and at last a part of one, where they would take more steps.
    `max_length`: tokens of an example, longer ones are cut and counted. `mask_rate`, `held_out_length` and
    `held_out_column`: of scores on held-out text, the last for files that have columns.
    """

    learning_rates: list[float] = field(default_factory=list)
    epochs: int = limited(3, low=1)
    max_steps: int | None = limited(None, low=1)
    batch: int = limited(32, low=1)
    warmup: float = limited(0.1, low=0, high=1)
    weight_decay: float = limited(0.01, low=0)
    clip: float = limited(1.0, above=0)
    dropout: float = limited(0.1, low=0, high=0.9)
    pooling: Literal["mean", "first"] = "mean"
    checkpoint: Literal["last", "best"] = "last"
    selection_share: float = limited(0.1, above=0, high=0.5)
    max_length: int = limited(128, low=8)
    edge_weight: float = limited(1.0, low=0)
    temperature: float = limited(1.0, above=0)
    mask_rate: float = limited(0.15, above=0, high=0.9)
    held_out_length: int = limited(128, low=8)
    held_out_column: str = "text"
