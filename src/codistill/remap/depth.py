"""Which source layer each target layer starts from.

With L₁ source and L₂ target layers, target layer i starts from source layer:

    repeat-last  min(i, L₁ − 1)            the DWT paper's remapping: layers 1–4 ← 1–4, 5–6 ← 4
    stack        i mod L₁                  StackBERT
    interpolate  ⌊i L₁ / L₂⌋               each layer k times in a row when L₂ = k L₁
    identity     min(i, L₁ − 1), and the added layers pass their input on: the function is kept
    first, last  i, L₂ before the end
    uniform      round(i (L₁ − 1) / (L₂ − 1)): DistilBERT's 0, 2, 4, 7, 9, 11 of 12
    a list       as it says
"""

from collections.abc import Sequence
from dataclasses import dataclass

from codistill.errors import UserError

DEEPEN = ("repeat-last", "stack", "interpolate", "identity")
SHRINK = ("first", "uniform", "last", "identity")


@dataclass(frozen=True)
class LayerPlan:
    """What one target layer starts from.

    `added` marks a layer that has to pass its input on. `output_norm` is the source layer of the norm that ends a
    post-norm layer, None for a norm without gain and bias.
    """

    source: int
    added: bool = False
    output_norm: int | None = None


def plan_layers(method: str | Sequence[int] | None, source: int, target: int) -> list[LayerPlan]:
    """The plan of each of `target` layers from `source` layers. Raises `UserError` where the method cannot do that."""
    chosen = layer_map(method, source, target)
    if method != "identity":
        return [LayerPlan(layer, output_norm=layer) for layer in chosen]
    # A post-norm layer ends with a norm of gain g and bias b. A norm of what another norm without gain and bias has
    # normed changes nothing, so the last g and b move past the added layers, and back when they are taken away.
    plans = [LayerPlan(layer, added=i >= source, output_norm=layer) for i, layer in enumerate(chosen)]
    for i in range(min(source, target) - 1, target):
        plans[i] = LayerPlan(plans[i].source, plans[i].added, source - 1 if i == target - 1 else None)
    return plans


def layer_map(method: str | Sequence[int] | None, source: int, target: int) -> list[int]:
    """The source layer of each target layer. Raises `UserError` where the method cannot do that."""
    if method is None:
        if source != target:
            raise UserError(f"depth: the source has {source} layers and the target {target}; {_hint(source, target)}")
        return list(range(target))
    if not isinstance(method, str):
        return _listed(list(method), source, target)
    if method not in (*DEEPEN, *SHRINK):
        methods = ", ".join(dict.fromkeys((*DEEPEN, *SHRINK)))
        raise UserError(f"depth: {method!r} is no method; choose {methods} or a list of source layers")
    if (target > source and method not in DEEPEN) or (target < source and method not in SHRINK):
        raise UserError(f"depth: {method!r} cannot take {source} layers to {target}; {_hint(source, target)}")
    return [_from(method, i, source, target) for i in range(target)]


def _from(method: str, i: int, source: int, target: int) -> int:
    match method:
        case "stack":
            return i % source
        case "interpolate":
            return i * source // target
        case "uniform":
            return round(i * (source - 1) / max(target - 1, 1))
        case "last":
            return source - target + i
        case _:
            return min(i, source - 1)


def _listed(layers: list[int], source: int, target: int) -> list[int]:
    if len(layers) != target:
        raise UserError(f"depth: {layers} names {len(layers)} layers and the target has {target}; name one for each")
    if wrong := [layer for layer in layers if layer not in range(source)]:
        raise UserError(f"depth: the source has {source} layers, 0 to {source - 1}, and no layer {wrong[0]}")
    twice = [layer for layer in layers if layers.count(layer) > 1]
    if twice and target <= source:
        raise UserError(
            f"depth: {layers} names layer {twice[0]} twice, and the source's {source} layers are enough "
            f"for the target's {target}; name each layer once"
        )
    return layers


def _hint(source: int, target: int) -> str:
    return "choose " + ", ".join(DEEPEN if target > source else SHRINK) + " or a list of source layers"
