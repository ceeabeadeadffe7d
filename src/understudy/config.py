"""From YAML to frozen dataclasses: every key checked, every error with its path in the recipe.

A section of a recipe is a dataclass; its fields are the keys. A section with a `type` is one of a table of dataclasses,
marked by `choice`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from understudy.errors import RecipeError, brief, nearest, written
from understudy.text import plain_tree, without_secrets

Section = TypeVar("Section")

MAX_SAME = 3
"""Places of one key that a hint names."""
MAX_DEPTH = 20
"""Sections inside each other that an override may name."""
MAX_YAML_BYTES, MAX_NODES, MAX_YAML_DEPTH = 200_000, 5_000, 50
"""The most that one document may have. The recipes of this project have 4,000 characters, 150 values and 5 levels."""
MAX_DIGITS = 80


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


_INT, _FLOAT, _DATE, _STRING, _MERGE = (
    f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp", "str", "merge")
)
_NUMBERS = {
    _INT: (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    _FLOAT: (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""Numbers as YAML 1.2 and JSON write them, with the characters that they begin with. PyYAML follows YAML 1.1, in which 1e-5 is
a string, 010 is 8 and 1:30 is 90."""


class _Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2, leaves dates and keys strings, and refuses a key that stands twice in one mapping, of which
    YAML would keep the last without a word.

    Limits hold while nodes are composed, before any value is made: an alias counts as all that it stands for.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._num_nodes = self._depth = 0
        self._sizes: dict[str, int] = {}
        """Nodes that an alias stands for, by its name."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        anchor, is_alias = event.anchor, isinstance(event, yaml.AliasEvent)
        if is_alias and anchor in self.anchors and anchor not in self._sizes:
            self._refuse(f"*{anchor} stands inside what it names", event)
        first, self._depth = self._num_nodes, self._depth + 1
        self._num_nodes += self._sizes.get(anchor, 1) if is_alias else 1
        if self._num_nodes > MAX_NODES:
            self._refuse(f"it has more than {MAX_NODES:,} values, with those that aliases repeat", event)
        if self._depth > MAX_YAML_DEPTH:
            self._refuse(f"it is nested too deeply for a recipe, over {MAX_YAML_DEPTH} levels", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if anchor is not None and not is_alias:
            self._sizes[anchor] = self._num_nodes - first
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.tag != _MERGE:
                    key.tag = _STRING
                if (key.tag, key.value) in keys:
                    raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
                keys.add((key.tag, key.value))
        return node

    def _refuse(self, reason: str, event: Any) -> NoReturn:
        raise yaml.composer.ComposerError(None, None, reason, event.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes a string that the loader, or another reader of YAML, would take for a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT, _DATE)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, (_pattern, _first) in _NUMBERS.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))


def _whole_number(_: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) <= MAX_DIGITS:
        value = int(node.value, 0 if node.value[:2] in ("0x", "0o") else 10)
        if abs(value) < 2**64:
            return value
    raise yaml.constructor.ConstructorError(None, None, "a whole number of more than 64 bits", node.start_mark)


_Loader.add_constructor(_INT, _whole_number)
# of tags there are those of JSON's kinds of values, and merge keys
_KINDS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
_Loader.yaml_constructors = {tag: make for tag, make in _Loader.yaml_constructors.items() if tag in {*_KINDS, None}}


def load(text: str, place: str) -> Any:
    """The value of a YAML document. Raises RecipeError that begins with the place and names the line, also for more than a
    recipe ever holds: `MAX_YAML_BYTES`, `MAX_NODES` values, `MAX_YAML_DEPTH` levels."""
    if len(text) > MAX_YAML_BYTES:
        raise RecipeError(f"{place} has {len(text):,} characters; a recipe has at most {MAX_YAML_BYTES:,}")
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        said = " ".join(str(error).replace('in "<unicode string>",', "at").split())
        if isinstance(error, yaml.MarkedYAMLError) and error.problem is not None:
            # without the line itself, in which a key may stand
            mark = error.problem_mark or error.context_mark
            said = " ".join(filter(None, (error.context, error.problem)))
            said += "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
        hint = "; indent with spaces, not with tabs" if r"character '\t'" in said else ""
        raise RecipeError(f"{place} is not valid YAML: {said}{hint}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise RecipeError(
            f"{place} is not valid YAML: a value is not of the kind that its tag (!!int, !!bool) says"
        ) from None
    except RecursionError:
        raise RecipeError(f"{place} is nested too deeply for a recipe") from None


def load_json(text: str | bytes) -> Any:
    """As `json.loads`, with ValueError for nesting and numbers that Python cannot hold too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def split_values(text: str, place: str) -> list[str]:
    """Splits at the commas that separate YAML values, not at those inside brackets, braces and quotes. Raises as `load`."""
    listed = f"[{text}]"
    load(listed, place)
    parsed: Any = yaml.compose(listed, _Loader)
    return [listed[node.start_mark.index : node.end_mark.index] for node in parsed.value]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file. Raises RecipeError for a missing file, bad YAML (with the line) and anything but a mapping."""
    if path.is_dir():
        inside = f"; did you mean {path / 'recipe.yaml'}?" if (path / "recipe.yaml").is_file() else ""
        raise RecipeError(f"{path} is a directory, and a recipe is a file{inside}")
    if not path.is_file():
        hint = f"there is no folder {path.parent}"
        if path.parent.is_dir():
            others = [item.name for item in path.parent.iterdir() if item.suffix in (".yaml", ".yml")]
            hint = nearest(path.name, others) if others else "write one with: understudy init"
        raise RecipeError(f"there is no recipe {path}; {hint}")
    try:
        if (size := path.stat().st_size) > 4 * MAX_YAML_BYTES:
            raise RecipeError(f"{path} has {size:,} bytes; a recipe has at most {MAX_YAML_BYTES:,} characters")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not text in UTF-8: {error}") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}") from error
    values = load(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds {brief(values)}; a recipe is a mapping of sections")
    return values


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy with `path.to.key=VALUE` applied, VALUE read as YAML. Raises RecipeError for what is no assignment."""
    result = deepcopy(dict(values))
    if isinstance(assignments, str | Mapping):
        raise RecipeError(f"overrides are {brief(assignments)}; give a list, such as ['method.k=64']")
    for text in assignments:
        path, equals, value = text.partition("=") if isinstance(text, str) else ("", "", "")
        shown = brief(without_secrets(text) if isinstance(text, str) else text)
        if not equals or not path or any(not part for part in path.split(".")):
            raise RecipeError(f"{shown} is not an override; write KEY=VALUE, such as method.k=64")
        *parents, last = path.split(".")
        if len(parents) > MAX_DEPTH:
            raise RecipeError(f"{shown} is nested too deeply for a recipe")
        inner = result
        for depth, part in enumerate(parents, 1):
            # a saved recipe has null for a section that it leaves out
            inner[part] = {} if inner.get(part) is None else inner[part]
            inner = inner[part]
            if not isinstance(inner, dict):
                raise RecipeError(f"{shown}: {(at := '.'.join(parents[:depth]))} is {_told(at, inner)}, not a section")
        inner[last] = load(value, f"{shown}: the value")
    return result


def parse(section: type[Section], values: object, path: str = "", root: type[Any] | None = None) -> Section:
    """The dataclass filled from a mapping. Raises RecipeError with the path, the value, and what is allowed.

    `root`: the section of which it is a part at `path`. It may have the names that other toolkits have for its keys and
    types, `other_names` and `other_types`, and `no_keys` for what none of its keys sets.
    """
    root = root or section
    if not isinstance(values, Mapping):
        raise RecipeError(f"{path or 'the recipe'} is {_told(path, values)}; it must be a mapping of keys")
    known = {key_of(item): item for item in fields(cast(Any, section)) if item.init}
    unknown = [
        f"{_join(path, key)}: unknown key; {_meant(root, path, key, values[key], known)}"
        for key in values
        if key not in known
    ]
    if unknown:
        raise RecipeError("\n".join(unknown))
    hints = get_type_hints(section)
    found = {}
    for key, item in known.items():
        if key in values:
            try:
                found[item.name] = _parse_field(item, hints[item.name], values[key], _join(path, key), root)
            except RecipeError as error:
                raise RecipeError(f"{error}{_to_do_without(item, hints[item.name], values[key])}") from error
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


def _known_as(root: type[Any], name: str) -> str | None:
    """The key for another toolkit's name, or for the last part of one."""
    names: Mapping[str, str] = getattr(root, "other_names", {})
    return names.get(name) or names.get(name.rpartition(".")[2])


def _meant(root: type[Any], path: str, key: object, value: object, known: Iterable[str]) -> str:
    """The hint for an unknown key: the same key elsewhere, the key for another toolkit's name, or the nearest one."""
    name, kinds_at = str(key).lower().replace("-", "_"), dict[str, list[str]]()
    for place, kind in places(root):
        kinds_at.setdefault(place, []).append(kind)
    if _join(path, name) in kinds_at:
        kinds = [kind for kind in kinds_at[_join(path, name)] if kind]
        return f"only the types {', '.join(kinds)} have it" if kinds and name == key else f"did you mean {name!r}?"
    if found := _known_as(root, _join(path, name)):
        return f"the key is {found}"
    if isinstance(value, Mapping):
        told = [f"{leaf} is {found}" for leaf in flatten(value) if (found := _known_as(root, leaf))]
        if told:
            return f"of its keys, {', '.join(told)}"
    if instead := getattr(root, "no_keys", {}).get(name):
        return f"no key sets it: {instead}"
    same = [place for place in kinds_at if place.rpartition(".")[2] == name]
    if same:
        # those of the outer sections first
        return f"did you mean {' or '.join(sorted(same, key=lambda place: place.count('.'))[:MAX_SAME])}?"
    return nearest(str(key), known)


def _to_do_without(item: Field[Any], hint: Any, value: object) -> str:
    """Advice for null and false where a key takes neither."""
    chosen = item.metadata.get("choice")
    if value is False and (NoneType in _flat(hint) if chosen is None else chosen.optional):
        return "; null does without"
    if value is None and item.default_factory is not MISSING:
        return "; leave it out for its default"
    if value is None and item.default is not MISSING:
        default = "s" if is_dataclass(item.default) else f", {written(item.default)}"
        return f"; leave it out for its default{default}"
    return ""


def _parse_field(item: Field[Any], hint: Any, value: object, path: str, root: type[Any]) -> Any:
    chosen: Choice | None = item.metadata.get("choice")
    if chosen is not None and chosen.named:
        if not isinstance(value, Mapping):
            raise RecipeError(
                f"{path} is {_told(path, value)}; it must be a mapping of names to sections with a `type`"
            )
        return {str(name): parse_choice(chosen, section, _join(path, name), root) for name, section in value.items()}
    if chosen is not None:
        return None if value is None and chosen.optional else parse_choice(chosen, value, path, root)
    inner = _dataclass_in(hint)
    if inner is not None:
        return None if value is None and NoneType in get_args(hint) else parse(inner, value, path, root)
    if isinstance(value, bool) and bool not in _flat(hint):
        raise RecipeError(f"{path} is {_told(path, value)}; {_complaint(hint, value)}")
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError:
        # without its cause, which would show the whole value
        raise RecipeError(f"{path} is {_told(path, value)}; {_complaint(hint, value)}") from None


def parse_choice(chosen: Choice, value: object, path: str, root: type[Any] | None = None) -> Any:
    """The section that `type: NAME` says. Raises RecipeError as `parse` does."""
    if not isinstance(value, Mapping):
        short = f"; write {path}: {{type: {value}}}" if isinstance(value, str) and value in chosen.table else ""
        raise RecipeError(
            f"{path} is {_told(path, value)}; it must be a mapping with a `type`: {', '.join(chosen.table)}{short}"
        )
    name = value.get("type")
    if name is None and root is not None:
        # another toolkit has a section of this name
        own = {key_of(item) for kind in chosen.table.values() for item in fields(kind)}
        strange = {key: item for key, item in value.items() if key not in own}
        told = [f"{_join(path, leaf)} is {found}" for leaf in flatten(strange) if (found := _known_as(root, leaf))]
        if told:
            raise RecipeError(f"{path}.type is missing; of its keys, {', '.join(told)}")
    if isinstance(name, str) and name in chosen.refused:
        raise RecipeError(f"{path}.type is {name!r}, which is refused: {chosen.refused[name]}")
    if not isinstance(name, str) or name not in chosen.table:
        said = "is missing" if name is None else f"is {brief(name)}"
        others = getattr(root, "other_types", {}).get(str(name).lower().replace("-", "_"), ())
        meant = [f"the type is {kind}" for kind in others if kind in chosen.table]
        raise RecipeError(f"{path}.type {said}; {meant[0] if meant else nearest(str(name), chosen.table)}")
    return parse(chosen.table[name], {key: item for key, item in value.items() if key != "type"}, path, root)


def _told(path: str, value: object) -> str:
    """A value as a message shows it, without secrets."""
    return brief(plain_tree(value, path.rpartition(".")[2]))


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


def write_yaml(values: Any) -> str:
    """YAML in the order of the sections."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


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
    name = key if isinstance(key, str) else written(key)
    return f"{path}.{name}" if path else name


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
