"""States of one shape to states of another: depth, then width, tensor by tensor."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from codistill.errors import UserError
from codistill.remap.architectures import Architecture, Axis, Role, tied
from codistill.remap.depth import LayerPlan, plan_layers
from codistill.remap.families import describe
from codistill.remap.maps import Map, gather, merge
from codistill.remap.source import Fetch, check_pair, fetcher
from codistill.remap.width import Maps, width_maps
from codistill.seeds import seed_of

Depth = str | Sequence[int] | None


def remap_state(
    state: Mapping[str, Tensor],
    source: Any,
    target: Any,
    *,
    depth: Depth = None,
    width: str | None = None,
    seed: int = 0,
    noise: float = 0.0,
) -> dict[str, Tensor]:
    """A state of the target's shape from a state of the source's, on the CPU and sharing no memory with it.

    `source` and `target` are Hugging Face configurations of one family; the states are those of its masked-LM or
    causal-LM class, and the result loads strictly (tied tensors are named twice and are one). `depth` and `width` are
    methods (see `codistill.remap.depth` and `.width`), None where the sizes agree. `noise`, for `replicate` and `tile`,
    splits the fan-out of copies unevenly, by that many standard deviations of the tensor: copies that are read alike
    have equal gradients and would stay copies for ever. The function is kept all the same.
    Raises `UserError` where the shapes cannot map, with both shapes and what would work.
    """
    fetch = fetcher(lambda name: state[name].detach().cpu(), state.keys(), source)
    moved = remapped(fetch, source, target, depth=depth, width=width, seed=seed, noise=noise)
    return with_tied({name: tensor.clone() for name, tensor in moved}, target)


def with_tied(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """`state` with the tied tensors under their second names too."""
    aliases = describe(config).aliases if tied(config) else {}
    return state | {alias: state[name] for alias, name in aliases.items()}


def remapped(
    fetch: Fetch,
    source: Any,
    target: Any,
    *,
    depth: Depth,
    width: str | None,
    seed: int = 0,
    noise: float = 0.0,
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the target by name, made when asked for; a tensor may share memory with what `fetch` gave."""
    architecture = check_pair(source, target)
    maps = width_maps(width, source, target, seed)
    if not 0 <= noise < math.inf:
        raise UserError(f"noise: {noise}; wanted a finite number of at least 0")
    plans = plan_layers(depth, source.num_hidden_layers, target.num_hidden_layers)
    if noise and width not in ("replicate", "tile"):
        raise UserError(f"noise: {noise} with width {width}; noise goes with width replicate or tile")

    def finished(name: str, role: Role, tensor: Tensor, following: Tensor | None = None) -> tuple[str, Tensor]:
        moved = carried(tensor, role, maps)
        if following is not None:
            moved = _with_extras(moved, carried(following, role, maps), role, maps)
        return name, split_unevenly(moved, role, maps, noise, seed_of(seed, "noise", name)) if noise else moved

    for name, role in architecture.outside_roles(target).items():
        yield finished(name, role, fetch(name))
    for i, plan in enumerate(plans):
        for name, role in architecture.layer_roles(i, target).items():
            tensor = layer_tensor(architecture, fetch, i, plan, name, role)
            following = None
            if width == "advanced" and not plan.added and plan.source + 1 < source.num_hidden_layers:
                next_plan = LayerPlan(plan.source + 1, output_norm=plan.source + 1)
                following = layer_tensor(architecture, fetch, i, next_plan, name, role)
            yield finished(architecture.layers.format(i) + name, role, tensor, following)


def layer_tensor(
    architecture: Architecture, fetch: Fetch, index: int, plan: LayerPlan, name: str, role: Role
) -> Tensor:
    """The tensor `name` that target layer `index` starts from, as wide as the source."""

    def own(name: str) -> Tensor:
        return fetch(architecture.layers.format(plan.source) + name)

    lacks = architecture.first_layer_lacks or {}
    if name in architecture.output_norm:
        if plan.output_norm is None:
            return _unit(role, own(name))
        return fetch(architecture.layers.format(plan.output_norm) + name)
    if plan.added and role.norm and architecture.output_norm:
        return _unit(role, own(name))
    if plan.added and role.writes("stream") and not role.norm:
        return torch.zeros_like(own(name))
    if name in lacks and plan.source == 0:
        # Layer 0 reads without a norm; elsewhere it gets one that has learnt nothing yet.
        matrix = next(iter(lacks.values()))
        return _unit(role, own(matrix).new_empty(own(matrix).shape[1]))
    if index == 0 and plan.source > 0 and name in lacks.values() and len(role.axes) == 2:
        # Layer 0 has no norm: the gain of the norm that is left out moves into the matrix.
        norm = next(norm for norm, matrix in lacks.items() if matrix == name)
        return own(name) * own(norm)
    return own(name)


def _unit(role: Role, like: Tensor) -> Tensor:
    return torch.ones_like(like) if role.gain_from else torch.zeros_like(like)


def carried(tensor: Tensor, role: Role, maps: Maps) -> Tensor:
    """`tensor` with every dimension mapped."""
    if role.gain_from:
        after = maps[role.axes[0].spaces[0]]
        return tensor if after.same else after.gain(tensor, maps[role.gain_from])  # type: ignore[arg-type]
    for dim, axis in enumerate(role.axes):
        tensor = _along(tensor, dim, axis, maps)
    return tensor


def _along(tensor: Tensor, dim: int, axis: Axis, maps: Maps) -> Tensor:
    spaces = [maps[name] for name in axis.spaces]
    if all(space.same for space in spaces):
        return tensor
    parts = tensor.split([space.source for space in spaces], dim)
    moved = [
        (space.reading if axis.reads else space.written)(part, dim) for space, part in zip(spaces, parts, strict=True)
    ]
    return moved[0] if len(moved) == 1 else torch.cat(moved, dim)


def _with_extras(own: Tensor, following: Tensor, role: Role, maps: Maps) -> Tensor:
    """The layer's own units, and beyond their first copies the next layer's (bert2BERT's AKI)."""
    dim, axis = next((dim, axis) for dim, axis in enumerate(role.axes) if not axis.reads)
    extra = torch.cat([maps[name].extra for name in axis.spaces])  # type: ignore[union-attr]
    sizes = [1] * own.ndim
    sizes[dim] = -1
    return torch.where(extra.view(sizes), following, own)


def split_unevenly(tensor: Tensor, role: Role, maps: Maps, noise: float, seed: int) -> Tensor:
    """`tensor` with noise on the fan-out of copies that adds up to nothing over the copies of a unit."""
    for dim, axis in enumerate(role.axes):
        space = maps[axis.spaces[0]]
        if axis.reads and isinstance(space, Map) and not space.narrows and not space.same:
            generator = torch.Generator().manual_seed(seed)
            eta = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * tensor.double().std() * noise
            mean = merge(eta, dim, space.units, space.read, space.narrow)
            tensor = (tensor + eta - gather(mean, dim, space.units, torch.ones_like(space.read))).to(tensor.dtype)
    return tensor
