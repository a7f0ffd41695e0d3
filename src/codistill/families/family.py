"""What has to be known about an architecture to train it, and nothing more."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedConfig, PreTrainedModel

from codistill.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """Where an architecture keeps its backbone, the head's transform and the output embedding; how to configure it.

    `backbone`, `transform` and `output` are names of submodules; `transform` None: there is none between the backbone's
    last hidden state and the output embedding. `configure` makes a configuration from ours and a number of positions.
    """

    model: type[PreTrainedModel]
    objective: Literal["mlm", "clm"]
    backbone: str
    transform: str | None
    output: str
    configure: Callable[[ModelConfig, int], PreTrainedConfig]


def heads(config: ModelConfig) -> int:
    """Attention heads of `config`: 64 wide where it does not say how many."""
    return config.heads or max(config.width // 64, 1)
