"""How the units of one space follow from another model's: a sparse pair of matrices, by index.

A wide model's activations are E·(a narrow model's), and R reads them back, R E = I. Then a matrix of the narrow model
becomes E_out W R_in and a bias E_out b: the function is kept, whatever stands between, as long as that treats units
alike. Every unit of the wide model is matched with one of the narrow model, so both matrices are an index and weights.
Going from wide to narrow swaps them: R_out W E_in. `docs/remap.md` has the equations and where they come from.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from codistill.seeds import seed_of


@dataclass(frozen=True)
class Map:
    """The units of one space. Weights are float64 of shape (wide,); see the module's first lines for E and R.

    Wide unit j is matched with narrow unit `units[j]`: E[j, units[j]] = `write[j]` and R[units[j], j] = `read[j]`.
    `keep` masks the units that count when wide becomes narrow. A `centred` map writes, to the units beyond the first
    copy, the mean of all units. `resting` says that those units are 0 once normed. `scale`, (wide,), is how much larger
    an activation is than the narrow one that it is matched with, where a norm takes that out again.
    """

    units: Tensor
    write: Tensor
    read: Tensor
    keep: Tensor
    scale: Tensor
    narrow: int
    narrows: bool = False
    centred: bool = False
    resting: bool = False

    @property
    def extra(self) -> Tensor:
        """The wide units beyond the first copy of each narrow one, a mask of shape (wide,)."""
        return ~first_copies(self.units, self.narrow)

    @property
    def same(self) -> bool:
        return len(self.units) == self.narrow and bool((self.units == torch.arange(self.narrow)).all())

    @property
    def source(self) -> int:
        return len(self.units) if self.narrows else self.narrow

    def written(self, tensor: Tensor, dim: int) -> Tensor:
        """`tensor` with the dimension `dim`, which writes this space, as long as the target has units."""
        if self.narrows:
            return merge(tensor, dim, self.units, self.read * self.keep, self.narrow)
        wide = gather(tensor, dim, self.units, self.write)
        if self.centred and self.extra.any():
            wide.index_copy_(dim, self.extra.nonzero().flatten(), self._means(tensor, dim))
        return wide

    def _means(self, tensor: Tensor, dim: int) -> Tensor:
        mean = tensor.to(wider(tensor.dtype)).mean(dim, keepdim=True) * self.scale[0].item()
        sizes = list(tensor.shape)
        sizes[dim] = int(self.extra.sum())
        return mean.to(tensor.dtype).expand(sizes)

    def reading(self, tensor: Tensor, dim: int) -> Tensor:
        """`tensor` with the dimension `dim`, which reads this space, as long as the target has units."""
        if self.narrows:
            return merge(tensor, dim, self.units, self.write * self.keep, self.narrow)
        return gather(tensor, dim, self.units, self.read)

    def gain(self, tensor: Tensor, before: "Map") -> Tensor:
        """A norm's gain, from the space `before` the norm to this one."""
        if self.narrows:
            weight = self.keep / self.scale if before.resting else self.read * self.keep
            return merge(tensor, 0, self.units, weight * before.scale, self.narrow)
        # A unit that rests is 0 whatever its gain, so it gets one it can learn with.
        weight = self.scale if before.resting else self.write
        return gather(tensor, 0, self.units, weight / before.scale)


@dataclass(frozen=True)
class Selection:
    """The units of one space, each target unit one of the source's (weight selection). `units` (target,)."""

    units: Tensor
    source: int

    @property
    def same(self) -> bool:
        return len(self.units) == self.source

    def written(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.index_select(dim, self.units)

    reading = written

    def gain(self, tensor: Tensor, before: "Map | Selection") -> Tensor:
        return self.written(tensor, 0)


def wider(dtype: torch.dtype) -> torch.dtype:
    """The precision that sums and products of a tensor are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _along(dim: int, weight: Tensor, tensor: Tensor) -> Tensor:
    """`weight` shaped to multiply the dimension `dim` of `tensor`, in the precision of products."""
    sizes = [1] * tensor.ndim
    sizes[dim] = -1
    return weight.to(wider(tensor.dtype)).view(sizes)


def gather(tensor: Tensor, dim: int, units: Tensor, weight: Tensor) -> Tensor:
    """out[j] = weight[j] · tensor[units[j]] along `dim`; weights of one copy bit by bit."""
    wide = tensor.index_select(dim, units)
    if bool((weight == 1).all()):
        return wide
    return wide.to(wider(tensor.dtype)).mul_(_along(dim, weight, tensor)).to(tensor.dtype)


def merge(tensor: Tensor, dim: int, units: Tensor, weight: Tensor, size: int) -> Tensor:
    """out[i] = Σ weight[j] · tensor[j] over the j with units[j] = i, along `dim`."""
    sizes = list(tensor.shape)
    sizes[dim] = size
    weighted = tensor.to(wider(tensor.dtype)) * _along(dim, weight, tensor)
    return torch.zeros(sizes, dtype=weighted.dtype).index_add_(dim, units, weighted).to(tensor.dtype)


def first_copies(units: Tensor, narrow: int) -> Tensor:
    """Which entries are the first with their value, a mask."""
    order = torch.arange(len(units))
    first = torch.full((narrow,), len(units)).scatter_reduce_(0, units, order, "amin")
    return order == first[units]


def copies(units: Tensor, narrow: int) -> Tensor:
    """How many copies the unit of each entry has, float64."""
    return torch.bincount(units, minlength=narrow)[units].double()


def matched(method: str, narrow: int, wide: int, seed: int) -> Tensor:
    """The narrow unit of each wide one: the units in order, then further copies, as evenly as possible.

    `replicate` and `advanced` draw the further copies at random (Net2Net), in shuffled rounds, so that a whole multiple
    copies every unit equally often and keeps a norm's mean and variance; the other methods repeat the units in order.
    """
    if method not in ("replicate", "advanced"):
        return torch.arange(wide) % narrow
    rounds = [torch.arange(narrow)]
    generator = torch.Generator().manual_seed(seed_of(seed, "remap", narrow, wide))
    while sum(map(len, rounds)) < wide:
        rounds.append(torch.randperm(narrow, generator=generator))
    return torch.cat(rounds)[:wide]


def picked(method: str, source: int, target: int) -> Tensor:
    """The source units that weight selection keeps: evenly spaced (`select`) or the first (`select-first`)."""
    if method == "select-first":
        return torch.arange(target)
    if source % target == 0:
        return torch.arange(target) * (source // target)
    return torch.linspace(0, source - 1, target, dtype=torch.float64).round().long()


def balanced(units: Tensor, write: Tensor, keep: Tensor, narrow: int) -> Map:
    """The map that writes so, and whose kept copies of a unit are read alike, R E = I."""
    total = torch.zeros(narrow, dtype=torch.float64).index_add_(0, units, write * keep)
    return Map(units, write, keep / total[units], keep, torch.ones_like(write), narrow)


def unit_map(method: str, units: Tensor, narrow: int) -> Map:
    """A space with nothing but a pointwise function between writing and reading it, such as the feed-forward units.

    Copies share their fan-out equally; under `zero` the first copy keeps it all, and the others, which write what
    nobody reads yet, can learn at once (a unit neither written nor read has no gradient).
    """
    one = torch.ones(len(units), dtype=torch.float64)
    keep = first_copies(units, narrow).double() if method == "zero" else one
    return balanced(units, one, keep, narrow)


def stream_maps(method: str, units: Tensor, narrow: int, *, centring: bool, tied: bool) -> dict[str, Map]:
    """The four spaces as wide as the residual stream: stream, normed, head and features.

    A tied output embedding is read with what wrote the input embedding, E, and not with R: what is left over is taken
    up by the gain and bias of the norm before it, Eᵀ F = I for what writes the features.
    """
    plain = unit_map(method, units, narrow)
    # n of n' units: times √(n'/n), the stream has the old mean square (with the mean in the added units, also the old
    # variance) and a norm's ε weighs what it weighed.
    scale = torch.full_like(plain.write, (len(units) / narrow) ** 0.5)
    if method == "zero":
        return _silent_maps(plain, scale, centring=centring, tied=tied)
    features = replace(plain, write=plain.read, read=plain.write) if tied else plain
    stream = plain
    if not centring:
        # Only the mean square counts: copies of size 1/√(number of copies) add up to the unit's, however many they are.
        write = scale / copies(units, narrow).sqrt()
        stream = replace(balanced(units, write, plain.keep, narrow), scale=write)
    return {"stream": stream, "normed": plain, "head": plain, "features": features}


def _silent_maps(plain: Map, scale: Tensor, *, centring: bool, tied: bool) -> dict[str, Map]:
    """The spaces of `stream_maps` with added units that are 0, or, where norms subtract it, at the mean.

    A masked-LM head norms what an activation function has made: nothing silent keeps its mean, so it has copies.
    """
    keep, one = plain.keep, plain.write
    down = 1 / scale if tied else one
    write = scale if centring else keep * scale
    return {
        "stream": replace(plain, write=write, read=keep / scale, scale=scale, centred=centring, resting=True),
        "normed": replace(plain, write=keep, read=one),
        "head": replace(plain, read=keep),
        "features": replace(plain, write=keep * down, read=keep / down if tied else one, scale=down),
    }
