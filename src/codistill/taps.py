"""What chosen layers of a model give, picked up by hooks while it runs; a model without taps runs as ever.

Shape suffixes: B sequences, T position, D width.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from codistill.errors import UserError

# How attention layers call their projections: three of them, or one that gives queries, keys and values side by side.
_PROJECTIONS = (
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_proj", "k_proj", "v_proj"),
    ("Wqkv",),
    ("c_attn",),
)


class Tap(NamedTuple):
    """Of layer `layer`, counted from 1: its output ("hidden") or its queries, keys and values ("relation")."""

    kind: str
    layer: int


Kept = dict[Tap, dict[int, Tensor]]  # 0: the one (B, T, D); or 0, 1 and 2: queries, keys and values


class Taps:
    """The layers of a Hugging Face model; raises UserError, naming `member`, where they cannot be told."""

    def __init__(self, model: nn.Module, member: str):
        config = getattr(model, "config", None)
        self.member, self.count = member, getattr(config, "num_hidden_layers", 0)
        self.width, self.heads = getattr(config, "hidden_size", 0), getattr(config, "num_attention_heads", 0)
        lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == self.count]
        if not self.count or not lists:
            raise UserError(
                f"member {member!r}: {type(model).__name__} has no list of layers to be seen; edges of kind hidden and "
                "relation need a Hugging Face model with one"
            )
        self._layers = lists[0]

    def check(self, tap: Tap) -> None:
        """Raises UserError where there is no such layer, or it has no queries, keys and values."""
        if tap.layer > self.count:
            raise UserError(f"member {self.member!r}: layer {tap.layer} of {self.count}; layers are counted from 1")
        if tap.kind == "relation":
            self._projections(tap.layer)

    @contextmanager
    def open(self, taps: Iterable[Tap]) -> Iterator[Kept]:
        """Inside, what the layers give is kept; afterwards no hook is left."""
        kept: Kept = {}
        handles = [handle for tap in taps for handle in self._hook(tap, kept)]
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, tap: Tap, kept: Kept) -> list[RemovableHandle]:
        if tap.kind == "hidden":
            return [self._layers[tap.layer - 1].register_forward_hook(_keep(kept, tap, 0, 1))]
        parts = self._projections(tap.layer)
        return [part.register_forward_hook(_keep(kept, tap, i, 3 // len(parts))) for i, part in enumerate(parts)]

    def _projections(self, layer: int) -> list[nn.Module]:
        """Queries', keys' and values', or one for all three."""
        by_name: dict[str, nn.Module] = {}
        for name, part in self._layers[layer - 1].named_modules():
            by_name.setdefault(name.rpartition(".")[2], part)
        for names in _PROJECTIONS:
            if all(name in by_name for name in names):
                return [by_name[name] for name in names]
        raise UserError(
            f"member {self.member!r}: layer {layer} has no queries, keys and values by a known name; "
            "edges of kind relation cannot use this model"
        )


def _keep(kept: Kept, tap: Tap, place: int, pieces: int) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        for index, piece in enumerate(tensor.chunk(pieces, -1), start=place):
            # The first time only: DeBERTa's projections go on to run on embeddings of positions.
            kept.setdefault(tap, {}).setdefault(index, piece)

    return hook
