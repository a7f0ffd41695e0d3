"""The map of every space from one shape to another, by a method:

    replicate     copies of units drawn at random, fan-out divided by the copies (Net2Net; bert2BERT's FPI)
    advanced      the same, but the added units are the next layer's (bert2BERT's AKI)
    tile          the units in order, n times over, fan-out divided by n (HyperCloning)
    zero          the added units are silent
    select        evenly spaced units (weight selection), select-first the first

`replicate`, `tile` and `zero` go both ways: narrowing takes back what widening did.
"""

from dataclasses import replace
from typing import Any

import torch

from codistill.errors import UserError
from codistill.remap.architectures import Shape, shape_of, tied
from codistill.remap.families import describe
from codistill.remap.heads import head_maps, head_selections, query_stretch, rotary_ratio
from codistill.remap.maps import Map, Selection, matched, picked, stream_maps, unit_map

WIDEN = ("replicate", "advanced", "tile", "zero")
SHRINK = ("select", "select-first", "replicate", "tile", "zero")
Maps = dict[str, Map | Selection]


def width_maps(method: str | None, source: Any, target: Any, seed: int = 0) -> Maps:
    """The map of each space from one Hugging Face configuration to another of the same family.

    Raises `UserError`, with both shapes, where the method cannot do that.
    """
    before, after = shape_of(source), shape_of(target)
    _check_method(method, before, after)
    try:
        if method is None or method.startswith("select"):
            maps = _selections(method or "select", source, target)
        else:
            maps = _unit_maps(method, source, target, seed) | _head_maps(method, source, target, seed)
    except UserError as error:
        raise UserError(f"{error} [source: {before}; target: {after}]") from None
    return maps | _tables(before, after)


def _check_method(method: str | None, before: Shape, after: Shape) -> None:
    shapes = f"source: {before}; target: {after}"
    names = ("width", "heads", "kv_heads", "head_width", "ffn")
    sizes = [(name, getattr(before, name), getattr(after, name)) for name in names]
    changed = [(name, a, b) for name, a, b in sizes if a != b]
    if method is None and changed:
        raise UserError(
            f"width: the shapes differ, so choose a method that widens ({', '.join(WIDEN)}) or shrinks "
            f"({', '.join(SHRINK)}): {shapes}"
        )
    if method not in (None, *WIDEN, *SHRINK):
        raise UserError(f"width: {method!r} is no method; choose {', '.join(dict.fromkeys((*WIDEN, *SHRINK)))}")
    for name, a, b in changed:
        if (b > a and method not in WIDEN) or (b < a and method not in SHRINK):
            methods = ", ".join(WIDEN if b > a else SHRINK)
            raise UserError(f"width: {method!r} cannot take {name} from {a} to {b}; choose {methods} ({shapes})")
        if method == "tile" and max(a, b) % min(a, b):
            raise UserError(
                f"width: 'tile' needs whole multiples, and {name} goes from {a} to {b}: "
                f"choose replicate or zero ({shapes})"
            )


def _selections(method: str, source: Any, target: Any) -> Maps:
    before, after = shape_of(source), shape_of(target)
    stream = Selection(picked(method, before.width, after.width), before.width)
    maps: Maps = dict.fromkeys(("stream", "normed", "head", "features"), stream)
    maps["ffn"] = Selection(picked(method, before.ffn, after.ffn), before.ffn)
    return maps | head_selections(method, before, after, _ratio(target, source))


def _unit_maps(method: str, source: Any, target: Any, seed: int) -> Maps:
    before, after = shape_of(source), shape_of(target)
    narrow, wide = sorted((before.width, after.width))
    units = matched(method, narrow, wide, seed)
    spaces = stream_maps(method, units, narrow, centring=describe(source).centring, tied=tied(target))
    narrows = after.width < before.width
    maps: Maps = {name: replace(space, narrows=narrows) for name, space in spaces.items()}
    narrow, wide = sorted((before.ffn, after.ffn))
    ffn = unit_map(method, matched(method, narrow, wide, seed), narrow)
    return maps | {"ffn": replace(ffn, narrows=after.ffn < before.ffn)}


def _head_maps(method: str, source: Any, target: Any, seed: int) -> Maps:
    before, after = shape_of(source), shape_of(target)
    sizes = [(getattr(before, name), getattr(after, name)) for name in ("heads", "kv_heads", "head_width")]
    narrows = any(b < a for a, b in sizes)
    if narrows and any(b > a for a, b in sizes):
        raise UserError("width: heads, key-value heads and head width must all grow or all shrink")
    narrow, wide = (target, source) if narrows else (source, target)
    widths = shape_of(narrow).head_width, shape_of(wide).head_width
    spaces = head_maps(
        method,
        shape_of(narrow),
        shape_of(wide),
        seed,
        ratio=_ratio(narrow, wide),
        stretch=query_stretch(narrow, wide, *widths),
    )
    return {name: replace(space, narrows=narrows) for name, space in spaces.items()}


def _ratio(narrow: Any, wide: Any) -> int | None:
    if not describe(narrow).rotary:
        return None
    return rotary_ratio(narrow, wide, shape_of(narrow).head_width, shape_of(wide).head_width)


def _tables(before: Shape, after: Shape) -> Maps:
    """The vocabulary as it is, positions and token types as they are or the first of them."""
    maps: Maps = {}
    for name in ("vocabulary", "positions", "types"):
        maps[name] = Selection(torch.arange(after.units(name)), before.units(name))
    return maps
