"""The commands `methods`, which lists them, and `init`, which writes a recipe to begin with."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import MISSING, fields
from importlib.resources import files
from pathlib import Path
from typing import get_type_hints

import yaml

from understudy import config
from understudy.errors import RecipeError, nearest
from understudy.files import write_atomically
from understudy.methods import METHODS
from understudy.recipe import Recipe
from understudy.trainer.console import Console


def methods(name: str | None) -> None:
    """Prints the table of methods, or the keys of one with their defaults."""
    with Console() as console:
        if name is None:
            rows = []
            for key, kind in METHODS.items():
                summary = (inspect.getdoc(inspect.getmodule(kind)) or "").splitlines()[0].partition(": ")[2]
                has_default = all(item.default is not MISSING for item in fields(kind))
                needs = ", ".join(sorted(kind().needs)) if has_default else "what its parts ask for"
                rows.append([key, summary, needs])
            console.table("methods", ["type", "what it minimises", "asks the teacher for"], rows)
            return
        if name not in METHODS:
            raise RecipeError(f"there is no method {name!r}; {nearest(name, METHODS)}")
        kind = METHODS[name]
        console.note(inspect.getdoc(inspect.getmodule(kind)) or "")
        console.note("")
        console.note(inspect.getdoc(kind) or "")
        hints = get_type_hints(kind)
        rows = [
            [item.name, config.words(hints[item.name]), "required" if item.default is MISSING else str(item.default)]
            for item in fields(kind)
        ]
        if rows:
            console.table(f"method: {{type: {name}, ...}}", ["key", "values", "default"], rows)


def init(path: Path, student: str, teacher: str) -> str:
    """Writes the recipe and returns what to do next. Raises RecipeError where the file exists."""
    if path.exists():
        raise RecipeError(f"{path} exists; choose another file")
    text = (files("understudy") / "cli" / "recipe.yaml").read_text(encoding="utf-8")
    named = {"NAME": path.stem, "STUDENT": json.dumps(student), "TEACHER": json.dumps(teacher)}
    text = re.sub(r"\b(NAME|STUDENT|TEACHER)\b", lambda found: named[found[0]], text)
    config.parse(Recipe, yaml.safe_load(text))
    write_atomically(path, text)
    return f"wrote {path}; check it with: understudy train {path} --dry-run"
