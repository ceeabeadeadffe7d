"""From YAML to frozen dataclasses: every key checked, every error with its path in the recipe.

A section of a recipe is a dataclass; its fields are the keys. A section with a `type` is one of a table of dataclasses,
marked by `choice`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from understudy.errors import RecipeError, brief, nearest, written

Section = TypeVar("Section")

MAX_SAME = 3
"""Places of one key that a hint names."""


@dataclass(frozen=True)
class Choice:
    """A table of sections by their `type`, and names that are refused with a reason."""

    table: Mapping[str, type[Any]]
    refused: Mapping[str, str]
    optional: bool
    named: bool = False
    """Whether the value is a mapping of names to such sections."""


def choice(table: Mapping[str, type[Any]], *, refused: Mapping[str, str] | None = None, optional: bool = False) -> Any:
    """A field whose value says `type: NAME`. `optional`: None where the recipe leaves it out."""
    metadata = {"choice": Choice(table, refused or {}, optional)}
    return field(default=None, metadata=metadata) if optional else field(metadata=metadata)


def choices(table: Mapping[str, type[Any]]) -> Any:
    """A field whose value maps names to sections that say `type: NAME`; empty where the recipe leaves it out."""
    return field(default_factory=dict, metadata={"choice": Choice(table, {}, optional=False, named=True)})


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: list[object] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            keys.append(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


# a date stays the string that it is: no key holds anything else
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file. Raises RecipeError for a missing file, bad YAML (with the line) and anything but a mapping."""
    if not path.is_file():
        others = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, others) if others else f"there is no folder {path.parent}"
        raise RecipeError(f"there is no recipe {path}; {hint}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds {brief(values)}; a recipe is a mapping of sections")
    return values


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy with `path.to.key=VALUE` applied, VALUE read as YAML. Raises RecipeError for what is no assignment."""
    result = deepcopy(dict(values))
    for text in assignments:
        path, equals, value = text.partition("=")
        if not equals or not path or any(not part for part in path.split(".")):
            raise RecipeError(f"{text!r} is not an override; write KEY=VALUE, such as method.k=64")
        *parents, last = path.split(".")
        inner = result
        for depth, part in enumerate(parents, 1):
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise RecipeError(f"{text!r}: {'.'.join(parents[:depth])} is {brief(inner)}, not a section")
        try:
            inner[last] = yaml.load(value, _Loader)  # noqa: S506 (a SafeLoader)
        except yaml.YAMLError as error:
            raise RecipeError(f"{text!r}: the value is not valid YAML: {' '.join(str(error).split())}") from error
    return result


def parse(section: type[Section], values: object, path: str = "", root: type[Any] | None = None) -> Section:
    """The dataclass filled from a mapping. Raises RecipeError with the path, the value, and what is allowed.

    `root`: the section of which it is a part at `path`. It may have the names that other toolkits have for its keys and
    types, `other_names` and `other_types`.
    """
    root = root or section
    if not isinstance(values, Mapping):
        raise RecipeError(f"{path or 'the recipe'} is {brief(values)}; it must be a mapping of keys")
    known = {key_of(item): item for item in fields(cast(Any, section)) if item.init}
    unknown = [
        f"{_join(path, key)}: unknown key; {_meant(root, path, key, values[key], known)}"
        for key in values
        if key not in known
    ]
    if unknown:
        raise RecipeError("\n".join(unknown))
    hints = get_type_hints(section)
    found = {
        item.name: _parse_field(item, hints[item.name], values[key], _join(path, key), root)
        for key, item in known.items()
        if key in values
    }
    for key, item in known.items():
        if key not in values and item.default is MISSING and item.default_factory is MISSING:
            chosen, hint = item.metadata.get("choice"), hints[item.name]
            expected = "" if _dataclass_in(hint) else f"; it must be {words(hint)}"
            if chosen is not None:
                expected = f"; it needs a `type`: {', '.join(chosen.table)}"
            raise RecipeError(f"{_join(path, key)} is missing{expected}")
    try:
        return section(**found)
    except ValueError as error:
        raise RecipeError(f"{path or 'the recipe'}: {error}") from error


def key_of(item: Field[Any]) -> str:
    """Name of a field in a recipe: `async_` is `async` there, a word that Python reserves."""
    return item.name.rstrip("_")


def places(section: type[Any], path: str = "", kind: str = "") -> Iterator[tuple[str, str]]:
    """Every key of a section and its parts by its path, with the type of the part that has it; empty where there is one."""
    hints = get_type_hints(section)
    for item in fields(cast(Any, section)):
        place, chosen, inner = _join(path, key_of(item)), item.metadata.get("choice"), _dataclass_in(hints[item.name])
        if item.init:
            yield place, kind
        if chosen is not None and not chosen.named:
            yield f"{place}.type", ""
            for name, part in chosen.table.items():
                yield from places(part, place, name)
        elif chosen is None and inner is not None:
            yield from places(inner, place)


def _meant(root: type[Any], path: str, key: object, value: object, known: Iterable[str]) -> str:
    """The hint for an unknown key: the same key elsewhere, the key for another toolkit's name, or the nearest one."""
    name, kinds_at = str(key).lower().replace("-", "_"), dict[str, list[str]]()
    for place, kind in places(root):
        kinds_at.setdefault(place, []).append(kind)

    def known_as(given: str) -> str | None:
        found = getattr(root, "other_names", {}).get(given)
        # an option of the command line is no place
        exists = found and (found.startswith("--") or re.split(r"[^\w.]", found)[0] in kinds_at)
        return found if exists else None

    if _join(path, name) in kinds_at:
        kinds = [kind for kind in kinds_at[_join(path, name)] if kind]
        return f"only the types {', '.join(kinds)} have it" if kinds and name == key else f"did you mean {name!r}?"
    if found := known_as(_join(path, name)) or known_as(name):
        return f"the key is {found}"
    if isinstance(value, Mapping):
        leaves = ((leaf, known_as(leaf.rpartition(".")[2])) for leaf in flatten(value))
        told = [f"{leaf} is {found}" for leaf, found in leaves if found]
        if told:
            return f"of its keys, {', '.join(told)}"
    same = [place for place in kinds_at if place.rpartition(".")[2] == name]
    if same and len(same) <= MAX_SAME:
        return f"did you mean {' or '.join(same)}?"
    return nearest(str(key), known)


def _parse_field(item: Field[Any], hint: Any, value: object, path: str, root: type[Any]) -> Any:
    chosen: Choice | None = item.metadata.get("choice")
    if chosen is not None and chosen.named:
        if not isinstance(value, Mapping):
            raise RecipeError(f"{path} is {brief(value)}; it must be a mapping of names to sections with a `type`")
        return {str(name): parse_choice(chosen, section, _join(path, name), root) for name, section in value.items()}
    if chosen is not None:
        return None if value is None and chosen.optional else parse_choice(chosen, value, path, root)
    inner = _dataclass_in(hint)
    if inner is not None:
        return None if value is None and NoneType in get_args(hint) else parse(inner, value, path, root)
    if isinstance(value, bool) and bool not in _flat(hint):
        raise RecipeError(f"{path} is {brief(value)}; it must be {words(hint)}")
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise RecipeError(f"{path} is {brief(value)}; {_complaint(hint, value)}") from error


def parse_choice(chosen: Choice, value: object, path: str, root: type[Any] | None = None) -> Any:
    """The section that `type: NAME` says. Raises RecipeError as `parse` does."""
    if not isinstance(value, Mapping):
        raise RecipeError(f"{path} is {brief(value)}; it must be a mapping with a `type`: {', '.join(chosen.table)}")
    name = value.get("type")
    if name in chosen.refused:
        raise RecipeError(f"{path}.type is {name!r}, which is refused: {chosen.refused[str(name)]}")
    if not isinstance(name, str) or name not in chosen.table:
        said = "is missing" if name is None else f"is {brief(name)}"
        others = getattr(root, "other_types", {}).get(str(name).lower().replace("-", "_"), ())
        meant = [f"the type is {kind}" for kind in others if kind in chosen.table]
        raise RecipeError(f"{path}.type {said}; {meant[0] if meant else nearest(str(name), chosen.table)}")
    return parse(chosen.table[name], {key: item for key, item in value.items() if key != "type"}, path, root)


def dump(section: Any, chosen: Choice | None = None) -> dict[str, Any]:
    """The section as plain values, every default written out, which `parse` reads back to an equal section.

    `chosen`: the table that its `type` is from.
    """
    values: dict[str, Any] = {}
    if chosen is not None:
        values["type"] = next(name for name, kind in chosen.table.items() if kind is type(section))
    for item in fields(section):
        if not item.init:
            continue
        value, table = getattr(section, item.name), item.metadata.get("choice")
        if table is not None and table.named:
            value = {name: dump(part, table) for name, part in value.items()}
        values[key_of(item)] = dump(value, table) if is_dataclass(value) else _plain(value)
    return values


def write_yaml(values: Mapping[str, Any]) -> str:
    """YAML in the order of the sections."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120)


def flatten(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """`{"method.k": 64, ...}`: one entry a leaf."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, _join(path, key)) if isinstance(value, Mapping) else {_join(path, key): value}
    return flat


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """The leaves that are not equal by their path, as "KEY was OLD, is NEW"; a leaf that is absent is None."""
    old, new = flatten(before), flatten(after)
    changed = (key for key in old | new if old.get(key) != new.get(key))
    return {key: f"{key} was {written(old.get(key))}, is {written(new.get(key))}" for key in changed}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _flat(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _dataclass_in(hint: Any) -> type[Any] | None:
    return next((part for part in _flat(hint) if isinstance(part, type) and is_dataclass(part)), None)


_WORDS = {int: "whole number", float: "number", str: "string"}


def words(hint: Any) -> str:
    """The values that a key may have, in words: "a number or null", "token, sequence", "a list of strings"."""
    found = []
    for part in _flat(hint):
        origin, inner = get_origin(part), [item for item in get_args(part) if item is not Ellipsis]
        if origin is Literal:
            found.append(", ".join(map(str, inner)))
        elif part in _WORDS:
            found.append(f"a {_WORDS[part]}")
        elif part is bool:
            found.append("true or false")
        elif origin in (tuple, list, Sequence):
            size = f"{len(inner)} " if len(inner) > 1 else ""
            found.append(f"a list of {size}{_WORDS[inner[0]]}s" if inner and inner[0] in _WORDS else "a list")
        elif part is not NoneType:
            found.append("a mapping" if origin is Mapping else "a value")
    return " or ".join([*found, *(["null"] if NoneType in _flat(hint) else [])])


def _complaint(hint: Any, value: object) -> str:
    options = [option for part in _flat(hint) for option in get_args(part) if isinstance(option, str)]
    meant = nearest(str(value), options)
    among = "one of " if options else ""
    return f"it must be {among}{words(hint)}{f' ({meant})' if meant.startswith('did') else ''}"
