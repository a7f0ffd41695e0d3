"""What chosen layers of a model give, picked up by hooks while it runs; a model without taps runs as ever.

Shape suffixes: B sequences, T position, D width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from codistill.errors import UserError
from codistill.families import state_of

# How attention layers call their three projections.
_PROJECTIONS = (
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_proj", "k_proj", "v_proj"),
)
# By family, the one projection that gives queries, keys and values side by side; others that have one mix them by head,
# or have keys and values narrower than queries, under the same names.
_FUSED = {"gpt2": "c_attn", "modernbert": "Wqkv"}


class Tap(NamedTuple):
    """Of layer `layer`, counted from 1: its output ("hidden") or its queries, keys and values ("relation")."""

    kind: str
    layer: int


Kept = dict[Tap, dict[int, Tensor]]  # 0: the one (B, T, D); or 0, 1 and 2: queries, keys and values


class Taps:
    """The `layers` of a Hugging Face model; raises UserError, naming `member`, where there are none."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], member: str):
        config = getattr(model, "config", None)
        if not layers:
            raise UserError(
                f"member {member!r}: {type(model).__name__} has no list of layers that are known to put out its hidden "
                "states; edges of kind hidden and relation need a Hugging Face model with one"
            )
        self.member, self.count, self._layers = member, len(layers), layers
        self.width, self._config = getattr(config, "hidden_size", 0), config
        self._family = getattr(config, "model_type", type(model).__name__)

    def check(self, tap: Tap) -> None:
        """Raises UserError where there is no such layer, or it has no queries, keys and values."""
        if tap.layer > self.count:
            raise UserError(f"member {self.member!r}: layer {tap.layer} of {self.count}; layers are counted from 1")
        if tap.kind == "relation":
            self._projections(tap.layer)

    @property
    def heads(self) -> int:
        """Of attention, as many in every layer; raises UserError where the configuration does not say so."""
        with suppress(RuntimeError):  # transformers' where layers have numbers of their own
            if found := getattr(self._config, "num_attention_heads", 0):
                return found
        raise UserError(f"member {self.member!r}: how many heads its layers have is not known; give relation_heads")

    def widths(self, layer: int) -> list[int]:
        """Of a layer's queries, keys and values."""
        parts = self._projections(layer)
        pieces = 3 // len(parts)
        return [_width(part) // pieces for part in parts for _ in range(pieces)]

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
        fused = (_FUSED[self._family],) if self._family in _FUSED else None
        for names in _PROJECTIONS if fused is None else (fused,):
            if all(name in by_name and _width(by_name[name]) for name in names):
                return [by_name[name] for name in names]
        raise UserError(
            f"member {self.member!r}: where layer {layer} of a {self._family} has queries, keys and values is not "
            "known; leave out this edge of kind relation, or give a model of another family"
        )


def _width(projection: nn.Module) -> int:
    """What it puts out, as a linear layer or GPT-2's convolution calls it; 0 where it is neither."""
    return getattr(projection, "out_features", 0) or getattr(projection, "nf", 0)


def _keep(kept: Kept, tap: Tap, place: int, pieces: int) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        for index, piece in enumerate(state_of(output).chunk(pieces, -1), start=place):
            # The first time only: DeBERTa's projections go on to run on embeddings of positions.
            kept.setdefault(tap, {}).setdefault(index, piece)

    return hook
