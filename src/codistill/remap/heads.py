"""How attention heads follow from another model's: whole heads, then units inside a head.

Grouped queries: query head h reads key-value head ⌊h / G⌋. A copy of a query head therefore has to sit with a copy of
its key-value head. Inside a head, attention is softmax(q·k / √d): a new head width d' takes √(d'/d) into the queries,
unless the model does not divide.
Rotary positions turn the units i and i + d/2 by position × θ^(−2i/d): a unit only keeps its meaning at a place that
turns as fast, so these places are matched by frequency and the others are new.
"""

import math
from typing import Any

import torch
from torch import Tensor

from codistill.errors import UserError
from codistill.remap.architectures import Shape
from codistill.remap.maps import Map, Selection, balanced, copies, first_copies, matched, picked, unit_map


def head_units(method: str, narrow: Shape, wide: Shape, seed: int) -> tuple[Tensor, Tensor]:
    """The narrow model's (query, key-value) head of each head of the wide one.

    Raises `UserError` if no copy of some query head can sit with a copy of its key-value head.
    """
    kv = matched(method, narrow.kv_heads, wide.kv_heads, seed)
    group, wide_group = narrow.heads // narrow.kv_heads, wide.heads // wide.kv_heads
    nth_copy = torch.tensor([(kv[:i] == head).sum().item() for i, head in enumerate(kv)])
    slots = nth_copy[:, None] * wide_group + torch.arange(wide_group)
    query = (kv[:, None] * group + slots % group).flatten()
    if len(query.unique()) < narrow.heads:
        raise UserError(
            f"width: {_heads(wide)} leave no room for a copy of each of {_heads(narrow)} beside its key-value head: "
            f"choose a whole multiple of {narrow.kv_heads} key-value heads, or {group} or more queries for each"
        )
    return query, kv


def _heads(shape: Shape) -> str:
    return f"{shape.heads} heads ({shape.kv_heads} for keys and values)"


def inside(heads: Tensor, units: Tensor, width: int) -> Tensor:
    """The flat index of each unit of each head, heads of `width` units being stored one after the other."""
    return (heads[:, None] * width + units[None, :]).flatten()


def head_maps(
    method: str, narrow: Shape, wide: Shape, seed: int, *, ratio: int | None, stretch: float
) -> dict[str, Map]:
    """The maps of query, key, value and attended. `ratio`: of rotary places (see `rotary_ratio`), None without.
    `stretch`: what queries take (see `query_stretch`)."""
    query_heads, kv_heads = head_units(method, narrow, wide, seed)
    d, wide_d = narrow.head_width, wide.head_width
    plain = matched(method, d, wide_d, seed)
    turning = plain if ratio is None else rotary_units(d, wide_d, ratio)
    # Places that turn unlike any of the narrow model's, and padding, count for nothing in q·k: their queries are 0.
    counts = first_copies(turning, d).double() if method == "zero" or ratio else torch.ones(wide_d, dtype=torch.float64)
    share = counts if method == "zero" or ratio else 1 / copies(turning, d)
    query = inside(query_heads, turning, d), (stretch * share).repeat(wide.heads), counts.repeat(wide.heads)
    key = inside(kv_heads, turning, d), torch.ones(wide.units("key"), dtype=torch.float64), counts.repeat(wide.kv_heads)
    return {
        "query": _first_only(method, balanced(*query, narrow.units("query"))),
        "key": _first_only(method, balanced(*key, narrow.units("key"))),
        "value": unit_map(method, inside(kv_heads, plain, d), narrow.units("value")),
        "attended": unit_map(method, inside(query_heads, plain, d), narrow.units("attended")),
    }


def query_stretch(narrow: Any, wide: Any, narrow_width: int, wide_width: int) -> float:
    """How much larger q·k has to be for the wide heads: √(d'/d), but 1 where a GPT-2 is told not to divide by √d.

    `narrow` and `wide` are Hugging Face configurations. Raises `UserError` if only one of them divides.
    """
    divides = {getattr(config, "scale_attn_weights", True) for config in (narrow, wide)}
    if len(divides) > 1:
        raise UserError("width: of source and target only one has scale_attn_weights; give the target the source's")
    return math.sqrt(wide_width / narrow_width) if divides.pop() else 1.0


def _first_only(method: str, space: Map) -> Map:
    """Under `zero` only the first copy of a head counts when the model is narrowed again."""
    if method != "zero":
        return space
    return balanced(space.units, space.write, first_copies(space.units, space.narrow).double(), space.narrow)


def head_selections(method: str, source: Shape, target: Shape, ratio: int | None) -> dict[str, Selection]:
    """Weight selection of key-value heads, of query heads within their group, and of units within a head."""
    group, target_group = source.heads // source.kv_heads, target.heads // target.kv_heads
    kv = picked(method, source.kv_heads, target.kv_heads)
    query = inside(kv, picked(method, group, target_group), group)
    plain = picked(method, source.head_width, target.head_width)
    turning = plain if ratio is None else rotary_selection(source.head_width, target.head_width, ratio)
    chosen = {"query": (query, turning), "key": (kv, turning), "value": (kv, plain), "attended": (query, plain)}
    return {
        name: Selection(inside(heads, units, source.head_width), source.units(name))
        for name, (heads, units) in chosen.items()
    }


def rotary_units(narrow: int, wide: int, ratio: int) -> Tensor:
    """The narrow head's unit of each of a wide head's: place i sits at place i · ratio, the first copy of each."""
    pair = torch.arange(wide // 2) // ratio % (narrow // 2)
    return torch.cat([pair, pair + narrow // 2])


def rotary_selection(wide: int, narrow: int, ratio: int) -> Tensor:
    """The wide head's unit of each of a narrow head's, those that turn as fast."""
    pair = torch.arange(narrow // 2) * ratio
    return torch.cat([pair, pair + wide // 2])


def rotary_ratio(narrow: Any, wide: Any, narrow_width: int, wide_width: int) -> int:
    """How many times further along the same frequency sits in the wide head: θ^(−2i/d) = θ'^(−2 i ratio / d').

    `narrow` and `wide` are Hugging Face configurations. Raises `UserError` if no whole number does that.
    """
    if narrow_width == wide_width:
        return 1
    ratios = {_ratio(a, narrow_width, b, wide_width) for a, b in zip(ropes(narrow), ropes(wide), strict=True)}
    if len(ratios) == 1 and (ratio := ratios.pop()):
        return ratio
    raise UserError(
        f"width: rotary heads of {narrow_width} and of {wide_width} units do not turn at common frequencies; choose a "
        f"head width that is a whole multiple, with the same rope_theta and default rope, or keep {narrow_width}"
    )


def ropes(config: Any) -> list[dict[str, Any]]:
    """What a configuration says of its rotary positions, for each kind of layer that has its own."""
    rope = config.rope_parameters
    return [rope] if "rope_theta" in rope else [rope[kind] for kind in sorted(rope)]


def _ratio(narrow: dict[str, Any], narrow_width: int, wide: dict[str, Any], wide_width: int) -> int:
    """The whole number, or 0 if there is none."""
    if {narrow.get("rope_type", "default"), wide.get("rope_type", "default")} != {"default"}:
        return 0
    ratio = math.log(narrow["rope_theta"]) * wide_width / (math.log(wide["rope_theta"]) * narrow_width)
    fits = abs(ratio - round(ratio)) < 1e-9 and round(ratio) * (narrow_width // 2 - 1) < wide_width // 2
    return round(ratio) if fits else 0
