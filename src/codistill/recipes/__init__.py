"""Recipes: names for a method at a size, masked or (NAME-clm) causal. Every method is data for the same step."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from codistill.config import Run
from codistill.errors import UserError, did_you_mean
from codistill.recipes import methods
from codistill.recipes.sizes import CAUSAL_SIZES, SIZES, Size, command_for_teacher, teacher_path

Recipe = Callable[[Size], Run]

_MASKED: Mapping[str, Recipe] = {
    "quickstart": methods.quickstart,
    "standalone": methods.standalone,
    "kd": methods.kd,
    "dwt": methods.dwt,
    "dwt-strong": methods.dwt_strong,
    "dwt-decay": methods.dwt_decay,
    "ctcd": methods.ctcd,
    "one-way": methods.one_way,
    "reverse": methods.reverse,
    "inherit": methods.inherit,
    "community": methods.community,
}

_CAUSAL: Mapping[str, Recipe] = {
    "standalone-clm": methods.standalone,
    "kd-clm": methods.kd,
    "dwt-clm": methods.dwt,
    "ctcd-clm": methods.ctcd,
    "inherit-clm": methods.inherit,
    "mix-clm": methods.mix,
}

RECIPES: Mapping[str, Recipe] = {**_MASKED, **_CAUSAL}


def find(name: str) -> Run:
    """The `Run` of `RECIPE` or `RECIPE:SIZE` (tiny where no size is given); raises UserError with the nearest name."""
    recipe, colon, size = name.partition(":")
    if recipe not in RECIPES:
        hint = did_you_mean(recipe, RECIPES)
        raise UserError(f"there is no recipe or file {name!r}{hint}; `codistill recipes` lists the recipes")
    sizes = CAUSAL_SIZES if recipe in _CAUSAL else SIZES
    if colon and size not in sizes:
        raise UserError(f"recipe {recipe!r} has no size {size!r}; there are {', '.join(sizes)}")
    return replace(RECIPES[recipe](sizes[size or "tiny"]), recipe=f"{recipe}:{size or 'tiny'}")


def check_teachers(run: Run) -> None:
    """Raises UserError, with the command that makes one, where a recipe's own pre-trained teacher is not there yet."""
    commands = {
        teacher_path(size, role): command_for_teacher(size, role)
        for size in [*SIZES.values(), *CAUSAL_SIZES.values()]
        for role in size.models
    }
    for name, member in run.members.items():
        command = commands.get(member.path or "")
        if command and not Path(member.path or "").exists():
            raise UserError(
                f"members.{name}.path: the recipe needs a pre-trained teacher at {member.path}; make it with "
                f"`{command}`, or name another with --set members.{name}.path=FOLDER"
            )


__all__ = ["RECIPES", "check_teachers", "find"]
