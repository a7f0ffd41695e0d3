"""A model's repeated layers, and whether what they put out is what transformers calls its hidden states.

Shape suffixes: B sequences, T position, D width.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn


def lists_of_layers(model: nn.Module) -> list[tuple[nn.Module, ...]]:
    """The lists in `model` of as many modules as its configuration says there are layers."""
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)] if count else []
    return [tuple(part) for part in lists if len(part) == count]


def first_list(model: nn.Module) -> tuple[nn.Module, ...]:
    """The first of these, which holds the layers in every family of the table; nothing where there is none."""
    return next(iter(lists_of_layers(model)), ())


def state_of(output: Any) -> Tensor:
    """What a layer hands on, (B, T, D), beside which it may give its attention's weights."""
    return cast(Tensor, output[0] if isinstance(output, (tuple, list)) else output)


@torch.no_grad()
def puts_out_states(model: nn.Module, lists: Sequence[Sequence[nn.Module]], ids_BT: Tensor) -> bool:
    """Whether each layer of the first of `lists` but the last gives one of the hidden states of `model`, a copy in
    evaluation mode whose parameters are moved at random: XLM, whose list of attentions comes first, has them elsewhere.

    The last layer's is not asked for, which may have a final norm behind it; so one that is the only one is told by
    being in the only list of one.
    """
    if not lists or len(lists[0]) == 1:
        return len(lists) == 1
    given: dict[int, Tensor] = {}
    for number, layer in enumerate(lists[0]):
        layer.register_forward_hook(_keep(given, number))
    try:
        states = cast(Any, model)(input_ids=ids_BT, output_hidden_states=True).hidden_states
        below = [given[number] for number in range(len(lists[0]) - 1)]
        return all(any(_is_same(one_BTD, state_BTD) for state_BTD in states) for one_BTD in below)
    except Exception:  # whatever a stranger's forward raises
        return False


def _keep(given: dict[int, Tensor], number: int) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        given[number] = state_of(output)

    return hook


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())
