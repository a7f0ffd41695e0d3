"""What comes in: the source's tensors by their described names, and whether source and target can be mapped at all."""

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from codistill.errors import UserError
from codistill.remap.architectures import Architecture, Role, present, role, shape_of, tied
from codistill.remap.families import describe

Fetch = Callable[[str], Tensor]


def fetcher(load: Fetch, names: Collection[str], config: Any) -> Fetch:
    """A function from a tensor's name to the tensor, for a checkpoint whose tensors are `names`.

    It knows the names that published checkpoints use instead, and checks every shape.
    Raises `UserError` for tensors that no line describes, at once, and for missing ones, when asked for.
    """
    architecture, shape = describe(config), shape_of(config)
    stored, roles = _stored_names(architecture, names), all_roles(config)
    if unknown := [name for name in stored if name not in roles and not _ignored(architecture, name)]:
        raise UserError(
            f"{config.model_type}: the source has {len(unknown)} tensors that {shape} does not, such as "
            f"{unknown[0]}: is its configuration that of the checkpoint?"
        )

    def fetch(name: str) -> Tensor:
        found = name if name in stored else architecture.aliases.get(name, name)
        if found not in stored:
            raise UserError(
                f"{config.model_type}: the source has no tensor {name} ({shape}): load it as "
                f"{architecture.model_class} and save it, then remap that"
            )
        tensor = load(stored[found])
        if tuple(tensor.shape) != (wanted := roles[name].shape(shape)):
            raise UserError(f"{name} is {tuple(tensor.shape)}, and for {shape} it should be {wanted}")
        return tensor

    return fetch


def all_roles(config: Any) -> dict[str, Role]:
    """The role of every tensor of a model by its name, tied ones under both."""
    architecture = describe(config)
    roles = present(architecture.outside, config)
    for i in range(config.num_hidden_layers):
        prefix = architecture.layers.format(i)
        roles |= {prefix + name: role for name, role in architecture.layer_roles(i, config).items()}
    return roles


def _stored_names(architecture: Architecture, names: Collection[str]) -> dict[str, str]:
    """The name in the description of each stored name."""
    found = {}
    bare = not any(name.startswith(architecture.prefix) for name in names)
    for stored in names:
        name = stored.replace(".gamma", ".weight").replace(".beta", ".bias")
        inside = {*architecture.outside} & {architecture.prefix + name} or (architecture.prefix + name).startswith(
            architecture.layers.split("{")[0]
        )
        found[architecture.prefix + name if bare and inside else name] = stored
    return found


def _ignored(architecture: Architecture, name: str) -> bool:
    return any(part in name for part in architecture.ignored)


def check_pair(source: Any, target: Any) -> Architecture:
    """The description of the family that both configurations belong to.

    Raises `UserError` where the target is not the same kind of model with the same vocabulary.
    """
    architecture = describe(source)
    describe(target)
    before, after = shape_of(source), shape_of(target)
    shapes = f"source: {source.model_type}, {before}; target: {target.model_type}, {after}"
    if source.model_type != target.model_type:
        raise UserError(f"a {source.model_type} cannot become a {target.model_type}; choose one family ({shapes})")
    if before.vocabulary != after.vocabulary:
        raise UserError(
            f"the vocabulary is {before.vocabulary} in the source and {after.vocabulary} in the target: "
            f"set the target's vocab_size to {before.vocabulary}, and use the source's tokenizer ({shapes})"
        )
    for name in ("types",) if architecture.rotary else ("positions", "types"):
        if (given := getattr(before, name)) < (wanted := getattr(after, name)):
            raise UserError(f"the source has {given} {name} and the target {wanted}; choose at most {given} ({shapes})")
    _check_fields(architecture, source, target)
    return architecture


def _check_fields(architecture: Architecture, source: Any, target: Any) -> None:
    for field in sorted(_fields_to_agree(architecture)):
        given, wanted = getattr(source, field, None), getattr(target, field, None)
        if given != wanted:
            raise UserError(f"{field} is {given!r} in the source and {wanted!r} in the target: they have to agree")
    if tied(target) and not tied(source):
        raise UserError(
            "the source's output embedding is its own and the target's is tied: set tie_word_embeddings to false in "
            "the target"
        )


def _fields_to_agree(architecture: Architecture) -> set[str]:
    lines = (*architecture.outside.values(), *architecture.layer.values())
    activations = {"hidden_act", "hidden_activation", "classifier_activation", "activation", "activation_function"}
    return activations | {switch for line in lines if (switch := role(line).switch)}
