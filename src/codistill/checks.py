"""Checks on a run's settings together, each of which is valid by itself."""

import re
from typing import Any

from codistill.config import ModelConfig, Run, edge_problem
from codistill.errors import UserError, did_you_mean


def check_whole(run: Run) -> None:
    """UserError naming the first setting of `run` that does not go with the others."""
    for name, member in run.members.items():
        _check_member(name, member, run)
    if not run.trained:
        raise UserError("members: none is trained; a run needs at least one member without `frozen: true`")
    for index, edge in enumerate(run.distillation):
        _check_edge(run, edge, f"distillation.{index}")
    below = next((edge.kind for edge in run.distillation if edge.kind != "logits"), None)
    if run.compile and below:
        raise UserError(
            f"compile: edges of kind {below} look into layers as they run, which compiled ones do not allow; "
            "set compile: false, or leave those edges out"
        )
    pairs = [(edge.teacher, edge.student, edge.kind) for edge in run.distillation]
    for index, pair in enumerate(pairs):
        if pair in pairs[:index]:
            raise UserError(
                f"distillation.{index}: {pair[0]!r} teaches {pair[1]!r} already; keep one edge of a pair and kind"
            )
    if run.batch.sequences % run.batch.accumulate:
        raise UserError(
            f"batch.accumulate: {run.batch.accumulate} does not divide the {run.batch.sequences} sequences of a batch; "
            "choose a divisor"
        )
    if run.objective.rows_of(run.data.length) < 1:
        raise UserError(
            f"objective.mask_rate: {run.objective.mask_rate} of {run.data.length} tokens rounds to no predicted row; "
            "raise it, or data.length"
        )


def _check_member(name: str, member: Any, run: Run) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(f"members: {name!r} cannot name a member; use letters, digits, - and _ (it becomes a folder)")
    if (member.model is None) == (member.path is None):
        near = did_you_mean(name, [other for other in run.members if other != name]) if member.model is None else ""
        raise UserError(f"members.{name}: give `model` (random initialisation) or `path` (a trained model){near}")
    if member.init is not None and member.path is not None:
        raise UserError(f"members.{name}.init: a member with a `path` has its parameters already; give `model` instead")
    if member.init is not None and member.init.learned and (member.init.width or member.init.noise):
        raise UserError(f"members.{name}.init: `learned` finds the widths itself; leave width and noise out")
    if member.cached is not None and not member.frozen:
        raise UserError(
            f"members.{name}.cached: {name} is trained, and only a frozen member's outputs stay as they are; "
            "add frozen: true, or leave cached out"
        )
    if member.gradient_checkpointing and member.frozen:
        raise UserError(f"members.{name}.gradient_checkpointing: a frozen member keeps no activations; leave it out")
    if len(member.betas) != 2 or not all(0 <= beta < 1 for beta in member.betas):
        raise UserError(f"members.{name}.betas: {member.betas} came in where two numbers in [0, 1) are wanted")
    heads_are_the_sources = member.init is not None and member.init.keeps_widths and member.model.heads is None
    if member.model is not None and not heads_are_the_sources:  # those are checked when the source is read
        check_heads(member.model, f"members.{name}.model")


_ROTARY = ("modernbert", "llama", "qwen2", "qwen3", "gemma3_text")
_WITH_KEY_VALUE_HEADS = ("llama", "qwen2", "qwen3", "gemma3_text")


def check_heads(model: ModelConfig, field: str) -> None:
    """UserError where the heads of `model` do not share out its width, or its family has none such."""
    heads = model.num_heads
    if model.width % heads:
        raise UserError(f"{field}.heads: a width of {model.width} does not divide into {heads} heads")
    if model.family in _ROTARY and (model.width // heads) % 2:
        raise UserError(
            f"{field}.heads: {model.family} turns pairs of numbers, and {heads} heads of a width of {model.width} are "
            f"{model.width // heads} wide; wanted an even width of a head"
        )
    shared = model.key_value_heads
    if shared is not None and (heads % shared or model.family not in _WITH_KEY_VALUE_HEADS):
        raise UserError(
            f"{field}.key_value_heads: {shared} came in; {model.family} with {heads} heads takes "
            + ("a number that divides them" if heads % shared else "none: each head has its own")
        )


def _check_edge(run: Run, edge: Any, field: str) -> None:
    for role in ("teacher", "student"):
        name = getattr(edge, role)
        if name not in run.members:
            raise UserError(
                f"{field}.{role}: there is no member {name!r}{did_you_mean(name, run.members)}; "
                f"there are {', '.join(run.members)}"
            )
    if run.members[edge.student].frozen:
        raise UserError(f"{field}.student: {edge.student!r} is frozen and cannot learn; unfreeze it or drop the edge")
    problem = edge_problem(edge)
    if problem is not None:
        raise UserError(f"{field}: {problem}")
    if edge.kind != "logits" and run.members[edge.teacher].cached is not None:
        raise UserError(
            f"{field}.kind: {edge.kind} looks into the layers of {edge.teacher!r}, which is cached and does not run; "
            f"remove members.{edge.teacher}.cached, or use the kind logits"
        )
