"""What has to be known about an architecture to train it, and nothing more.

Shape suffixes: B sequences, T position, D width, N predicted rows, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from codistill.config import ModelConfig
from codistill.families.layers import first_list


@dataclass(frozen=True)
class Family:
    """Where an architecture keeps its backbone, the head's transform and the output embedding; how to configure it.

    `backbone`, `transform` and `output` are names of submodules; a transform may be several of them in turn, functions
    among them, or None: nothing stands between the backbone's last hidden state and the output embedding. `bias`: the
    name of the output bias where it is not `output`'s own. `configure` makes a configuration from ours and a number of
    positions; with `counts_from_padding` the model's positions begin after the padding token's id.
    """

    model: type[PreTrainedModel]
    objective: Literal["mlm", "clm"]
    backbone: str
    transform: str | tuple[str | Callable[[Tensor], Tensor], ...] | None
    output: str
    configure: Callable[[ModelConfig, int], PreTrainedConfig]
    bias: str | None = None
    counts_from_padding: bool = False


@dataclass(frozen=True)
class Parts:
    """A model cut before its output embedding.

    `features(inputs, rows_N)` are (N, D); logits are features @ `weight`ᵀ + `bias`. With `output` None the features
    are the logits. `bias_of` names the bias where it is not `output`'s own. Both are read at each use, because sharding
    replaces parameters. `layers`: those that put out the hidden states, none where none are known to; None: not asked.
    """

    features: Callable[[Mapping[str, Tensor], Tensor], Tensor]
    output: nn.Module | None
    bias_of: tuple[nn.Module, str] | None = None
    layers: Sequence[nn.Module] | None = None

    @property
    def weight(self) -> Tensor | None:
        """(at least V, D)."""
        return None if self.output is None else cast(Tensor, self.output.weight)

    @property
    def bias(self) -> Tensor | None:
        """As long as `weight`, or None."""
        module, name = self.bias_of or (self.output, "bias")
        return getattr(module, name, None)


@dataclass(frozen=True)
class Chain:
    """The features of a model whose parts are known: backbone, choice of rows, and what the head does to those."""

    backbone: nn.Module
    transform: tuple[Callable[[Tensor], Tensor], ...]
    options: Mapping[str, Any]

    def __call__(self, inputs: Mapping[str, Any], rows_N: Tensor) -> Tensor:
        features_ND = self.backbone(**inputs, **self.options).last_hidden_state.flatten(0, 1).index_select(0, rows_N)
        for part in self.transform:
            features_ND = part(features_ND)
        return features_ND


def parts_of(model: PreTrainedModel, family: Family) -> Parts:
    """`model` cut where its family's row in the table says."""
    names = (family.transform,) if isinstance(family.transform, str) else family.transform or ()
    transform = tuple(model.get_submodule(name) if isinstance(name, str) else name for name in names)
    bias_of = None
    if family.bias is not None:
        module, _, name = family.bias.rpartition(".")
        bias_of = (model.get_submodule(module), name)
    # A causal model would keep its keys and values, and with them take documents for one another's past.
    options = {"use_cache": False} if family.objective == "clm" else {}
    chain = Chain(model.get_submodule(family.backbone), transform, options)
    return Parts(chain, model.get_submodule(family.output), bias_of, first_list(model))
