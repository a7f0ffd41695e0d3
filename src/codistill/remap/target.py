"""The configuration of a model that starts from another one, where only its sizes are chosen."""

from collections.abc import Sequence
from typing import Any

from codistill.errors import UserError
from codistill.remap.depth import layer_map
from codistill.remap.families import describe
from codistill.remap.heads import ropes

# By the names that the described families have for them.
_SIZES = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"),
    *("n_layers", "dim", "n_heads", "hidden_dim"),
    *("n_layer", "n_embd", "n_head", "n_inner"),
)
_DROPOUT = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"),
    *("embedding_dropout", "mlp_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop"),
)
# Of the file and not of the model; code of its own is nothing that the described families need.
_OF_THE_FILE = ("architectures", "dtype", "transformers_version", "_name_or_path", "auto_map")


def grown_config(
    source: Any, sizes: Any, *, depth: str | Sequence[int] | None = None, key_value_heads: int | None = None
) -> Any:
    """The Hugging Face configuration `source` with the sizes and the dropout of `sizes`, one of the same family.

    All else is the source's, for what it computes depends on it: rotary base and scaling, norm epsilons, windows,
    activations, positions, vocabulary, whether embeddings are tied, ids of special tokens. `key_value_heads` None: as
    many for each head as in the source. A width of heads that is not hidden size / heads stays. Raises `UserError`
    where the heads do not divide so, and for a depth that is no method.
    """
    chosen = sizes.to_dict()
    tree = {key: value for key, value in source.to_dict().items() if key not in _OF_THE_FILE}
    tree |= {key: chosen[key] for key in (*_SIZES, *_DROPOUT) if key in chosen}
    if tree.get("layer_types"):
        tree["layer_types"] = _layer_types(source, sizes, depth)
    if "num_key_value_heads" in tree:
        tree["num_key_value_heads"] = key_value_heads or _key_value_heads(source, sizes.num_attention_heads)
    if tree.get("head_dim") == source.hidden_size // source.num_attention_heads:
        del tree["head_dim"]  # which follows from the others
    return type(source).from_dict(tree)


def takes_any_length(config: Any) -> bool:
    """Whether no number of positions is built into what `config` computes: no table, and frequencies that do not
    depend on it."""
    plain = ("default", "linear", "llama3")
    return describe(config).rotary and all(rope.get("rope_type", "default") in plain for rope in ropes(config))


def _layer_types(source: Any, sizes: Any, depth: str | Sequence[int] | None) -> list[str]:
    """The kind of each layer, local or global. Where every so many of the source's are global the target's are; else a
    layer is of the kind of the one it starts from, whose weights were trained so."""
    before, after = source.num_hidden_layers, sizes.num_hidden_layers
    every = getattr(source, "global_attn_every_n_layers", None) or 3  # as transformers has it
    regular = [
        type(source)(num_hidden_layers=layers, global_attn_every_n_layers=every).layer_types
        for layers in (before, after)
    ]
    if source.layer_types == regular[0]:
        return regular[1]
    return [source.layer_types[layer] for layer in layer_map(depth, before, after)]


def _key_value_heads(source: Any, heads: int) -> int:
    before, shared = source.num_attention_heads, source.num_key_value_heads
    if heads * shared % before:
        raise UserError(
            f"heads: the source has {before} heads with {shared} for keys and values, and {heads} cannot be shared "
            "out so; set model.key_value_heads, or choose another number of heads"
        )
    return heads * shared // before
