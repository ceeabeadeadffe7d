"""The JSON Schema of recipes, by which editors complete keys, show their documentation and underline mistakes."""

from __future__ import annotations

import ast
import inspect
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter

from understudy import config
from understudy.methods import METHODS, Phases
from understudy.methods.base import Range
from understudy.recipe.schema import Recipe

FILE = "recipe.schema.json"
"""Name of the file that the first line of a recipe refers to."""
MODELINE = "# yaml-language-server: $schema="
"""Begins that line; the schema's path from the recipe's folder follows."""


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of recipes: every section and key with its docstring, type, bounds and default.

    It refuses unknown keys, values of another type and values outside of bounds. Rules that concern several keys are
    those of `understudy train --dry-run`.
    """
    sections: dict[str, Any] = {}
    whole = _section(Recipe, sections)
    # the name of the file stands in
    whole["required"].remove("run_dir")
    whole["properties"]["run_dir"]["description"] = "Directory of the run; left out: runs/NAME of this file."
    return (
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "understudy recipe"}
        | whole
        | {"$defs": sections}
    )


def _section(section: Any, sections: dict[str, Any], name: str | None = None) -> dict[str, Any]:
    """The schema of a section. `name`: its `type`, where it is one of a table."""
    hints, docs, bounds = get_type_hints(section), key_docs(section), key_bounds(section)
    properties: dict[str, Any] = {} if name is None else {"type": {"const": name}}
    required = [] if name is None else ["type"]
    for item in fields(section):
        if not item.init:
            continue
        key = config.key_of(item)
        if item.default is MISSING and item.default_factory is MISSING:
            required.append(key)
        properties[key] = _value(item, hints[item.name], sections) | bounds.get(item.name, {})
        if item.name in docs:
            properties[key]["description"] = docs[item.name]
    if section is Phases:
        properties["parts"]["items"] = {"oneOf": [_part(name, sections) for name in METHODS if name != "phases"]}
    return {
        "type": "object",
        "description": inspect.cleandoc(section.__doc__ or ""),
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _value(item: Field[Any], hint: Any, sections: dict[str, Any]) -> dict[str, Any]:
    chosen: config.Choice | None = item.metadata.get("choice")
    options = get_args(hint) or (hint,)
    inner = next((part for part in options if isinstance(part, type) and is_dataclass(part)), None)
    if chosen is not None:
        value = _one_of(chosen.table, sections)
        if chosen.named:
            value = {"type": "object", "additionalProperties": value}
    elif inner is not None:
        value = _reference(inner, sections)
    else:
        value = TypeAdapter(hint).json_schema()
    if NoneType in options and (inner is not None or chosen is not None):
        value = {"anyOf": [value, {"type": "null"}]}
    if item.default is not MISSING and item.default is not None:
        value["default"] = config.dump(item.default) if is_dataclass(item.default) else item.default
    return value


def _one_of(table: Mapping[str, type[Any]], sections: dict[str, Any]) -> dict[str, Any]:
    return {"oneOf": [_reference(section, sections, name) for name, section in table.items()]}


def _reference(section: type[Any], sections: dict[str, Any], name: str | None = None) -> dict[str, Any]:
    """A link to the section's schema, which is made where it is not there yet: tasks may hold tasks."""
    known = f"{section.__module__.removeprefix('understudy.')}.{name or section.__name__}"
    if known not in sections:
        sections[known] = {}
        sections[known] = _section(section, sections, name)
    return {"$ref": f"#/$defs/{known}"}


def _part(name: str, sections: dict[str, Any]) -> dict[str, Any]:
    """A method as a part of `phases`, which says beside its keys until when it is in force."""
    part = _section(METHODS[name], sections, name)
    until = {"type": "number", "description": "Share of the run at which the part ends; 1 for the last one."}
    return part | {"properties": part["properties"] | {"until": until}}


@cache
def _classes_of(module: str) -> dict[str, ast.ClassDef]:
    """The source of a module's classes by their names."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _classes(section: type[Any]) -> list[ast.ClassDef]:
    """The source of the dataclass and of those that it extends, the outermost first."""
    found = [
        _classes_of(kind.__module__).get(kind.__name__) for kind in reversed(section.__mro__) if is_dataclass(kind)
    ]
    return [tree for tree in found if tree is not None]


def key_docs(section: type[Any]) -> dict[str, str]:
    """Field -> the docstring under it in the source."""
    found: dict[str, str] = {}
    for tree in _classes(section):
        for line, after in zip(tree.body, tree.body[1:], strict=False):
            if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                # a recipe writes null
                found[line.target.id] = re.sub(r"\bNone\b", "null", inspect.cleandoc(str(after.value.value)))
    return found


def key_bounds(section: type[Any]) -> dict[str, dict[str, float]]:
    """Field -> the bounds that its `Range` names, or that `errors.check_range` is called with in the source."""
    found: dict[str, dict[str, float]] = {}
    for name, hint in get_type_hints(section, include_extras=True).items():
        for bound in getattr(hint, "__metadata__", ()):
            if isinstance(bound, Range):
                found[name] = {"minimum": bound.low, "maximum": bound.high}
    for call in (node for tree in _classes(section) for node in ast.walk(tree)):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "check_range":
            continue
        if all(isinstance(value, ast.Constant) for value in call.args[1:]):
            low, *names = map(ast.literal_eval, call.args[1:])
            options = {item.arg: ast.literal_eval(item.value) for item in call.keywords}
            lowest = "exclusiveMinimum" if options.get("above") else "minimum"
            found |= {name: {lowest: low, "maximum": options.get("high", math.inf)} for name in names}
    return {
        name: {word: bound for word, bound in bounds.items() if math.isfinite(bound)} for name, bounds in found.items()
    }
