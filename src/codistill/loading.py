"""Configurations from and to YAML, strictly: an unknown key, a wrong type or a value out of range is refused.

Every refusal names the field, what came in, and what is wanted.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from codistill import schedules
from codistill.checks import check_whole
from codistill.config import Run
from codistill.errors import UserError, did_you_mean

Part = TypeVar("Part")


class _Loader(yaml.SafeLoader):
    """YAML with the numbers people write (1e-4 is one), booleans `true` and `false` only, and no repeated keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own protocol)
        first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":float", ":bool"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if not isinstance(key, str | int | float):
            raise UserError(f"the key {key!r} is neither a name nor a number; mind the braces")
        if keys.count(key) > 1:
            raise UserError(f"the key {key!r} stands twice (line {node.start_mark.line + 1}); keep one")
    return dict(zip(keys, (loader.construct_object(value, deep=True) for _, value in node.value), strict=True))


_FLOAT = re.compile(r"^[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))(?:[eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|false)$"), list("tf"))
_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def parse_yaml(text: str, source: str) -> Any:
    """The value that `text` spells; raises UserError naming `source` where it is no YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:  # PyYAML lets the latter through
        raise UserError(f"{source} is not YAML: {' '.join(str(error).split())}") from None


def read_run(file: Path) -> dict:
    """The mapping in a configuration file, not yet checked."""
    try:
        value = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as a configuration: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no mapping of keys to values; `codistill show RECIPE` prints an example")
    return value


def to_dict(run: Run) -> dict:
    """`run` as plain mappings and lists, without fields that are None or that a twin shares with its original; of what
    has changed a None is kept, which says that there was no such setting."""
    tree = _without_none(dataclasses.asdict(run))
    if run.provenance and "changed" in run.provenance:
        tree["provenance"]["changed"] = _copied(run.provenance["changed"])
    members = tree["members"]
    tree["members"] = {
        name: _beyond(members.get(member.get("twin_of"), {}), member) for name, member in members.items()
    }
    return tree


def _beyond(original: Mapping[str, Any], member: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in which `member` differs from its original; null for one that only the original has."""
    own = {key: value for key, value in member.items() if original.get(key) != value}
    return own | {key: None for key in original if key not in member}


def to_yaml(run: Run) -> str:
    """`run` as YAML that `train` accepts back."""
    return yaml.dump(to_dict(run), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def override(tree: dict, assignments: Sequence[str]) -> dict:
    """`tree` with dotted assignments `a.b.c=value` applied; list entries are named by their index."""
    tree = _copied(tree)
    for assignment in assignments:
        path, text = split_assignment(assignment)
        _assign(tree, path.split("."), parse_yaml(text, f"--set {path}"), path)
    return tree


def split_assignment(assignment: str) -> tuple[str, str]:
    """Key and value of `KEY=VALUE`, as they were written; raises UserError where it is nothing of the kind."""
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise UserError(f"--set {assignment}: write KEY=VALUE without a space, as in --set steps=100")
    return path, text


def load(tree: Mapping[str, Any]) -> Run:
    """The `Run` that `tree` describes, checked field by field and then as a whole; raises UserError."""
    tree = {**tree, "members": _with_twins(tree.get("members", {}))}
    run = _from_home(_dataclass(Run, tree, ""))
    check_whole(run)
    return run


def load_part(kind: type[Part], tree: Mapping[str, Any]) -> Part:
    """A single dataclass of `tree`, checked field by field as in `load`."""
    return _dataclass(kind, tree, "")


# ---- one value of one type ---------------------------------------------------------------------


def _value(kind: Any, value: Any, field: str, limits: Mapping[str, Any]) -> Any:
    if kind == schedules.Spec:
        return schedules.check(value, field)
    if get_origin(kind) in (Union, UnionType):
        if value is None and NoneType in get_args(kind):
            return None
        arms = [arm for arm in get_args(kind) if arm is not NoneType]
        fitting = [arm for arm in arms if (get_origin(arm) is list) == isinstance(value, list)]
        return _value((fitting or arms)[0], value, field, limits)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, field)
    if get_origin(kind) is dict:
        _expect(isinstance(value, Mapping), field, value, "a mapping of names to settings")
        arm = get_args(kind)[1]
        return {k: v if arm is Any else _value(arm, v, f"{field}.{k}", {}) for k, v in value.items()}
    if get_origin(kind) is list:
        value = [value] if isinstance(value, str) else value
        _expect(isinstance(value, list), field, value, "a list")
        return [_value(get_args(kind)[0], item, f"{field}.{index}", {}) for index, item in enumerate(value)]
    return _scalar(kind, value, field, limits)


def _scalar(kind: Any, value: Any, field: str, limits: Mapping[str, Any]) -> Any:
    if get_origin(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind)]
        _expect(value in choices, field, value, f"one of {', '.join(choices)}{did_you_mean(str(value), choices)}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    wanted = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]
    _expect(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), field, value, wanted)
    low, high, above = (limits.get(key) for key in ("low", "high", "above"))
    _expect(low is None or value >= low, field, value, f"at least {low}")
    _expect(above is None or value > above, field, value, f"more than {above}")
    _expect(high is None or value <= high, field, value, f"at most {high}")
    return value


def _dataclass(kind: Any, value: Any, field: str) -> Any:
    _expect(isinstance(value, Mapping), field, value, "a mapping")
    # A name that Python reserves has an underscore there, and none here.
    fields = {f.name.rstrip("_"): f for f in dataclasses.fields(kind)}
    hints = {name.rstrip("_"): hint for name, hint in get_type_hints(kind).items()}
    for key in value:
        if key not in fields:
            place = f"{field}.{key}" if field else str(key)
            raise UserError(
                f"{place}: there is no such setting{did_you_mean(str(key), fields)}; there are {', '.join(fields)}"
            )
    prefix = f"{field}." if field else ""
    for name, f in fields.items():
        if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"{prefix}{name}: missing; every {kind.__name__.removesuffix('Config').lower()} needs one")
    return kind(**{fields[k].name: _value(hints[k], v, prefix + k, fields[k].metadata) for k, v in value.items()})


def _expect(condition: bool, field: str, value: Any, wanted: str) -> None:
    if not condition:
        raise UserError(f"{field}: {value!r} came in where {wanted} is wanted")


# ---- the whole run -----------------------------------------------------------------------------


def _with_twins(members: Any) -> Any:
    """Members with what a twin leaves out filled in from the member it is the twin of."""
    if not isinstance(members, Mapping):
        return members
    filled = dict(members)
    for name, member in members.items():
        original = member.get("twin_of") if isinstance(member, Mapping) else None
        if original is None:
            continue
        if original == name:
            raise UserError(
                f"members.{name}.twin_of: {name!r} cannot be its own twin; name another member, or leave it out"
            )
        if not isinstance(original, str) or not isinstance(members.get(original), Mapping):
            raise UserError(f"members.{name}.twin_of: there is no member {original!r}; there are {', '.join(members)}")
        if members[original].get("twin_of") is not None:
            raise UserError(f"members.{name}.twin_of: {original!r} is a twin itself; name the member that both repeat")
        filled[name] = {**members[original], **member}
    return filled


def _from_home(run: Run) -> Run:
    """With ~ spelled out in the folders that members begin from."""

    def spelled(member: Any) -> Any:
        init = member.init and dataclasses.replace(member.init, from_=_home(member.init.from_))
        return dataclasses.replace(member, path=member.path and _home(member.path), init=init)

    return dataclasses.replace(run, members={name: spelled(member) for name, member in run.members.items()})


def _home(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~") else path


# ---- plain trees -------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Block style for mappings, flow style for lists of scalars: how people write configurations."""


def _represent_list(dumper: _Dumper, items: list) -> yaml.Node:
    flat = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flat)


_Dumper.add_representer(list, _represent_list)
# So that text which `_Loader` takes for a number, as a folder called 1e-3, is written in quotes.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _assign(tree: Any, keys: list[str], value: Any, path: str) -> None:
    *parents, last = keys
    for key in parents:
        tree = _child(tree, key, path)
    if isinstance(tree, list):
        _child(tree, last, path)
        tree[int(last)] = value
    elif isinstance(tree, dict):
        tree[last] = value
    else:
        raise UserError(f"--set {path}: {'.'.join(parents)} is a single value and has no part {last!r}")


def _child(tree: Any, key: str, path: str) -> Any:
    if isinstance(tree, list):
        if not key.isdecimal() or int(key) >= len(tree):
            raise UserError(f"--set {path}: {key!r} is no index of a list of {len(tree)}")
        return tree[int(key)]
    if not isinstance(tree, dict):
        raise UserError(f"--set {path}: what stands before {key!r} is a single value")
    return tree.setdefault(key, {})


def _copied(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list) else tree


def _written(key: Any) -> Any:
    """A key as it stands in a file, where no name is reserved. Keys are names of members too, and of steps: numbers."""
    return "from" if key == "from_" else key


def _without_none(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {_written(key): _without_none(value) for key, value in tree.items() if value is not None}
    return [_without_none(value) for value in tree] if isinstance(tree, list) else tree
