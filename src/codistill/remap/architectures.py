"""What an architecture's tensors mean: which activations each dimension writes or reads.

A family is described once, one line a tensor, and every way of remapping follows from the description. Each dimension
of a tensor names the space it belongs to:

    stream     the residual stream, D units          normed   what a pre-norm layer's blocks read, D units
    head       inside a masked-LM head, D units      features what the output embedding reads, D units
    query, key, value                                attention heads × head width
    attended   the heads' outputs, as wide as query  ffn      the feed-forward units
    vocabulary, positions, types

and how: `query` writes it (a matrix's output, a bias), `<stream` reads it (a matrix's input), `query+key+value` is
packed one after the other, `stream>normed` is the gain of a norm from one space to another and `>normed` its bias.
`?field` marks a tensor that exists only when that field of the configuration is true.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from codistill.errors import UserError


@dataclass(frozen=True)
class Shape:
    """The sizes that a remapping changes or checks."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ffn: int
    vocabulary: int
    positions: int
    types: int

    def __str__(self) -> str:
        shared = "" if self.kv_heads == self.heads else f" ({self.kv_heads} for keys and values)"
        return (
            f"{self.layers} layers × {self.width}, {self.heads} heads{shared} of {self.head_width}, FFN {self.ffn}, "
            f"vocabulary {self.vocabulary}"
        )

    def units(self, space: str) -> int:
        """The number of units of a space."""
        sizes = {
            "query": self.heads * self.head_width,
            "attended": self.heads * self.head_width,
            "key": self.kv_heads * self.head_width,
            "value": self.kv_heads * self.head_width,
            "ffn": self.ffn,
            "vocabulary": self.vocabulary,
            "positions": self.positions,
            "types": self.types,
        }
        return sizes.get(space, self.width)


@dataclass(frozen=True)
class Axis:
    """One dimension of a tensor: its spaces (several when packed), and whether it reads or writes them."""

    spaces: tuple[str, ...]
    reads: bool = False


@dataclass(frozen=True)
class Role:
    """What a tensor is for: its axes; for a norm's gain also the space it norms from; the switch that creates it."""

    axes: tuple[Axis, ...]
    gain_from: str | None = None
    norm: bool = False
    switch: str | None = None

    def writes(self, space: str) -> bool:
        return any(space in axis.spaces and not axis.reads for axis in self.axes)

    def shape(self, shape: Shape) -> tuple[int, ...]:
        """The tensor's shape in a model of that shape."""
        return tuple(sum(map(shape.units, axis.spaces)) for axis in self.axes)


@cache
def role(text: str) -> Role:
    """The role that a line of a description spells."""
    text, _, field = text.partition("?")
    switch = field.strip() or None
    if ">" in text:
        before, after = text.strip().split(">")
        return Role((Axis((after,)),), before or None, norm=True, switch=switch)
    axes = (Axis(tuple(word.lstrip("<").split("+")), word.startswith("<")) for word in text.split())
    return Role(tuple(axes), switch=switch)


@dataclass(frozen=True)
class Architecture:
    """A family: its Hugging Face class, its tensors, and how its layers differ from one another."""

    model_class: str
    prefix: str  # of the bare model's tensors, which some published checkpoints leave out
    layers: str
    outside: Mapping[str, str]
    layer: Mapping[str, str]
    aliases: Mapping[str, str]  # tied tensor -> the tensor it shares
    ignored: tuple[str, ...] = ()
    centring: bool = True  # LayerNorm; False for RMSNorm
    rotary: bool = False
    output_norm: tuple[str, ...] = ()  # post-norm families: the norm that a layer ends with
    first_layer: Mapping[str, str] | None = None  # where layer 0 differs: other roles
    first_layer_lacks: Mapping[str, str] | None = None  # norm that layer 0 lacks -> the matrix that reads its output

    def layer_roles(self, index: int, config: Any) -> dict[str, Role]:
        """The tensors of layer `index` by their name inside the layer."""
        lines = dict(self.layer)
        if index == 0:
            lines |= self.first_layer or {}
            lines = {name: line for name, line in lines.items() if name not in (self.first_layer_lacks or {})}
        return present(lines, config)

    def outside_roles(self, config: Any) -> dict[str, Role]:
        """The tensors outside the layers, tied ones left out."""
        roles = present(self.outside, config)
        return {name: r for name, r in roles.items() if not (tied(config) and name in self.aliases)}


def present(lines: Mapping[str, str], config: Any) -> dict[str, Role]:
    """The roles of the tensors that this configuration has."""
    roles = {name: role(line) for name, line in lines.items()}
    return {name: r for name, r in roles.items() if r.switch is None or getattr(config, r.switch)}


def tied(config: Any) -> bool:
    return bool(getattr(config, "tie_word_embeddings", True))


def shape_of(config: Any) -> Shape:
    """The sizes that a Hugging Face configuration spells. Raises `UserError` if the heads do not divide the width, and
    for a size below 1, which transformers lets through."""
    for field in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        if (size := getattr(config, field)) < 1:
            raise UserError(f"{config.model_type}: {field} is {size}; wanted at least 1")
    width, heads = config.hidden_size, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if width % heads or heads % kv_heads:
        raise UserError(
            f"{config.model_type}: {heads} heads ({kv_heads} for keys and values) do not divide width {width}: "
            f"choose a number of heads that divides the width, and key-value heads that divide it"
        )
    return Shape(
        layers=config.num_hidden_layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_width=getattr(config, "head_dim", None) or width // heads,
        ffn=_ffn(config),
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        types=getattr(config, "type_vocab_size", 0),
    )


def _ffn(config: Any) -> int:
    if config.model_type == "gpt2":
        return config.n_inner or 4 * config.n_embd
    return config.hidden_dim if config.model_type == "distilbert" else config.intermediate_size
