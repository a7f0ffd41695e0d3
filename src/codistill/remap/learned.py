"""LiGO: a growth operator that is linear in the source's parameters, and learned on the data.

vec(W'_i for all i) = (w ⊗ I) diag(B_j ⊗ A_j) vec(W_j for all j), which is W'_i = Σ_j w_ij B_j W_j A_jᵀ: every source
layer j is widened by its own maps, and target layer i is a mixture of the widened layers. Maps are tied: all spaces as
wide as the residual stream share one; what reads a space uses the transpose of what writes it; biases and norms follow
the map that writes. Each tensor of a layer has its own w.

Two things differ from the paper's description, so that training starts at a model that works: the maps start as those
of `replicate` and w as a depth method, and what reads a space divides by the number of copies `replicate` starts with.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from codistill.errors import UserError
from codistill.remap.architectures import Architecture, Role, shape_of
from codistill.remap.depth import LayerPlan, layer_map
from codistill.remap.maps import Map
from codistill.remap.source import Fetch, check_pair, fetcher
from codistill.remap.states import layer_tensor, with_tied
from codistill.remap.width import Maps, width_maps

STREAM = ("stream", "normed", "head", "features")


def learn_growth(
    state: Mapping[str, Tensor],
    source: Any,
    target: Any,
    loss_of: Callable[[dict[str, Tensor]], Tensor],
    *,
    depth: str | Sequence[int] = "stack",
    steps: int = 100,
    lr: float = 0.003,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A state of the target's shape, grown by maps that `steps` steps of gradient descent have fitted.

    `source` and `target` are Hugging Face configurations of one family, the target nowhere smaller. `loss_of` takes a
    state (as from `remap_state`, in `state`'s precision) to a 0-d loss with its gradient, for instance by
    `torch.func.functional_call` on the target's model and the next batch; it is called `steps` times.
    Raises `UserError` for shapes that cannot grow so, and for a loss that is not finite.
    """
    growth = Growth.between(state, source, target, seed)
    parameters = {name: t.requires_grad_() for name, t in growth.start(depth).items()}
    if not parameters:
        return growth.state({})
    optimizer = torch.optim.SGD(parameters.values(), lr=lr, momentum=0.9)
    for step in range(steps):
        loss = loss_of(growth.state(parameters))
        if not loss.isfinite():
            raise UserError(
                f"learned: the loss is {loss.item()} at step {step} of {steps}; choose a smaller lr than {lr}"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return {name: tensor.clone() for name, tensor in growth.state(parameters).items()}


@dataclass(frozen=True)
class Growth:
    """The linear operator between two configurations, given the source's tensors."""

    architecture: Architecture
    source: Any
    target: Any
    maps: Maps
    fetch: Fetch

    @classmethod
    def between(cls, state: Mapping[str, Tensor], source: Any, target: Any, seed: int = 0) -> "Growth":
        """Raises `UserError` where the target is smaller or another kind of model."""
        architecture = check_pair(source, target)
        maps = width_maps("advanced", source, target, seed)  # the units of `replicate`, and nothing may shrink
        fetch = fetcher({name: t.detach() for name, t in state.items()}.__getitem__, state.keys(), source)
        return cls(architecture, source, target, maps, fetch)

    def start(self, depth: str | Sequence[int]) -> dict[str, Tensor]:
        """The parameters to learn: maps `width.SPACE` or `width.LAYER.SPACE` (wide, narrow), `depth.TENSOR` (L₂, L₁).

        Where the sizes agree there is nothing to learn, and no parameter.
        """
        layers = range(self.source.num_hidden_layers)
        grow = [space for space, map_ in self.maps.items() if isinstance(map_, Map) and not map_.same]
        first = self.fetch(next(iter(self.architecture.outside_roles(self.source))))
        start = {
            f"width.{self.map_name(space, layer)}": self._one_hot(space).to(first.dtype)
            for layer in layers
            for space in grow
        }
        if self.target.num_hidden_layers == self.source.num_hidden_layers:
            return start
        chosen = layer_map(depth, self.source.num_hidden_layers, self.target.num_hidden_layers)
        mixture = functional.one_hot(torch.tensor(chosen), len(layers)).to(first.dtype)
        return start | {f"depth.{name}": mixture.clone() for name in self.architecture.layer_roles(1, self.target)}

    def map_name(self, space: str, layer: int) -> str:
        """The name of the map of a space in a source layer: one along the stream, one for values and heads' outputs."""
        if space in STREAM:
            return "stream"
        shape = shape_of(self.source), shape_of(self.target)
        grouped = any(s.heads != s.kv_heads for s in shape)
        return f"{layer}.value" if space == "attended" and not grouped else f"{layer}.{space}"

    def _one_hot(self, space: str) -> Tensor:
        map_ = self.maps[space]
        assert isinstance(map_, Map)
        return functional.one_hot(map_.units, map_.narrow).double()

    def state(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The target's state for these parameters, differentiable in them."""
        roles = self.architecture.outside_roles(self.target)
        grown = {name: self.widened(self.fetch(name), role, 0, parameters) for name, role in roles.items()}
        rest: dict[tuple[bool, str], list[Tensor]] = {}  # the widened source layers, which all but layer 0 share
        for i in range(self.target.num_hidden_layers):
            for name, role in self.architecture.layer_roles(i, self.target).items():
                key = (i == 0 and self.architecture.first_layer is not None, name)
                if key not in rest:
                    rest[key] = self._layers(i, name, role, parameters)
                grown[self.architecture.layers.format(i) + name] = self._mixed(rest[key], i, name, parameters)
        return with_tied(grown, self.target)

    def _layers(self, i: int, name: str, role: Role, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensor `name` of every source layer, widened, as target layer i would have it."""
        plans = [LayerPlan(j, output_norm=j) for j in range(self.source.num_hidden_layers)]
        tensors = [layer_tensor(self.architecture, self.fetch, i, plan, name, role) for plan in plans]
        return [self.widened(tensor, role, j, parameters) for j, tensor in enumerate(tensors)]

    def _mixed(self, layers: list[Tensor], i: int, name: str, parameters: Mapping[str, Tensor]) -> Tensor:
        mixture = parameters.get(f"depth.{name}")
        return layers[i] if mixture is None else torch.einsum("l,l...->...", mixture[i], torch.stack(layers))

    def widened(self, tensor: Tensor, role: Role, layer: int, parameters: Mapping[str, Tensor]) -> Tensor:
        """B W Aᵀ, for a tensor of source layer `layer` (any layer outside them)."""
        for dim, axis in enumerate(role.axes):
            parts = tensor.split([self.maps[space].source for space in axis.spaces], dim)
            learned = [parameters.get(f"width.{self.map_name(space, layer)}") for space in axis.spaces]
            moved = [
                self._along(part, dim, self._weight(space, axis.reads, role), theta)
                if theta is not None
                else self.maps[space].written(part, dim)
                for part, space, theta in zip(parts, axis.spaces, learned, strict=True)
            ]
            tensor = torch.cat(moved, dim)
        return tensor

    def _weight(self, space: str, reads: bool, role: Role) -> Tensor:
        """What multiplies a row of the learned map, fixed: 1 ÷ copies where it reads, for instance."""
        map_ = self.maps[space]
        assert isinstance(map_, Map)
        weight = map_.read if reads else map_.write
        if role.gain_from:
            before = self.maps[role.gain_from]
            assert isinstance(before, Map)
            weight = weight / before.scale
        return weight

    def _along(self, tensor: Tensor, dim: int, weight: Tensor, theta: Tensor) -> Tensor:
        return torch.tensordot(theta * weight.to(theta.dtype)[:, None], tensor, ([1], [dim])).movedim(0, dim)
