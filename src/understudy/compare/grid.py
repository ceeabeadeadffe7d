"""The grid of a comparison: axes of labelled changes to one recipe, seeds, and keys that are tuned first.

A combination takes one label of every axis. All combinations share every other key of the base recipe.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from understudy import config
from understudy.errors import RecipeError, brief, check_range, nearest
from understudy.recipe import Recipe

NUM_SEEDS = 5
TUNE_SEED = 1000
"""Seed of tuning runs: none of the compared seeds."""
MAX_SLUG = 100
"""Characters of a directory's name."""
RESERVED = frozenset({"seed", "run_dir"})
"""Keys that the grid itself sets."""

_UNSAFE = re.compile(r"[^A-Za-z0-9._=-]")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid file. `vary` is `{axis: {label: change}}`, a change as `apply` takes it; `tune` is `{dotted key: values}`."""

    vary: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    seeds: int = NUM_SEEDS
    tune: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    tune_steps: int | None = None
    """Steps of a tuning run; None: as many as the recipe's."""
    tune_seed: int = TUNE_SEED
    target: float | None = 0.5
    """The avg@k at which `samples to target` stops counting; None: no such column."""
    baseline: Mapping[str, str] = field(default_factory=dict)
    """The row that differences refer to: these labels, and the same ones on every other axis. Empty: the first label of the
    first axis."""

    def __post_init__(self) -> None:
        changed = {"tune": list(self.tune)}
        for axis, variants in self.vary.items():
            if not variants:
                raise ValueError(f"vary.{axis} has no label")
            changed |= {f"vary.{axis}.{label}": list(change) for label, change in variants.items()}
        for where, keys in changed.items():
            for key in RESERVED.intersection(keys):
                raise ValueError(f"{where}: {key} is set by the comparison; use `seeds` and --out")
        check_range(self, 1, "seeds")
        check_range(self, 1, "tune_steps", off="null: as many as the recipe's")
        check_range(self, 0, "target", high=1, above=True, off="null leaves the column out")
        if self.tune and 0 <= self.tune_seed < self.seeds:
            raise ValueError(f"tune_seed is {self.tune_seed}, which is compared too; it must be at least {self.seeds}")
        if any(not values for values in self.tune.values()):
            raise ValueError("a key of tune has no value")
        for axis, label in self.baseline.items():
            if axis not in self.vary:
                raise ValueError(f"baseline.{axis}: no such axis; {nearest(axis, self.vary)}")
            if label not in self.vary[axis]:
                raise ValueError(f"baseline.{axis}: no label {label!r}; {nearest(label, self.vary[axis])}")

    def combinations(self) -> list[Combination]:
        """Every combination of labels once, the last axis fastest."""
        labels = product(*(variants for variants in self.vary.values()))
        return [Combination(tuple(zip(self.vary, chosen, strict=True))) for chosen in labels]

    def tunings(self) -> list[dict[str, Any]]:
        """Every combination of tuned values; one empty one where nothing is tuned."""
        return [dict(zip(self.tune, values, strict=True)) for values in product(*self.tune.values())]

    def baseline_of(self, combination: Combination) -> Combination:
        """The combination that `combination` is compared with; itself where it is the baseline."""
        chosen = dict(self.baseline) or {axis: next(iter(variants)) for axis, variants in list(self.vary.items())[:1]}
        return Combination(tuple((axis, chosen.get(axis, label)) for axis, label in combination.labels))


@dataclass(frozen=True)
class Combination:
    """One label of every axis, `((axis, label), ...)`: a row of the table."""

    labels: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        return ", ".join(label for _, label in self.labels) or "the recipe"

    @property
    def slug(self) -> str:
        """A directory's name: the labels, and a hash of them where a label cannot be part of a file name."""
        return slug([label for _, label in self.labels]) or "recipe"


def slug(labels: Sequence[str]) -> str:
    """Labels as one file name. Equal only for equal labels."""
    exact = "+".join(labels)
    text = "+".join(_UNSAFE.sub("-", label).strip(".") or "-" for label in labels)[:MAX_SLUG]
    return text if text == exact else f"{text}-{hashlib.sha256(repr(labels).encode()).hexdigest()[:8]}"


def read_grid(
    path: Path | None,
    base: Mapping[str, Any],
    *,
    vary: Sequence[str] = (),
    tune: Sequence[str] = (),
    baseline: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
) -> Grid:
    """The grid of a file, with axes and tuned keys of the command line (`KEY=V1,V2`) added and `changes` put over it.

    Raises RecipeError, naming file, axis or key.
    """
    values = {} if path is None else dict(config.read_yaml(path))
    try:
        axes = {
            axis: {
                label: _mapping(change, f"vary.{axis}.{label}", "train: {lr: 1e-3}")
                for label, change in _mapping(variants, f"vary.{axis}", "small: {train: {lr: 1e-3}}").items()
            }
            for axis, variants in _mapping(values.get("vary"), "vary", "rate: {small: {train: {lr: 1e-3}}}").items()
        }
        tuned = _mapping(values.get("tune"), "tune", "train.lr: [1e-3, 1e-2]")
        chosen = _mapping(values.get("baseline"), "baseline", "method.type: sft")
        for text in vary:
            axis, options = _assignment(text, "--vary", axes)
            axes[axis] = {label: axis_change(axis, value, base) for label, value in options.items()}
        for text in tune:
            key, options = _assignment(text, "--tune", tuned)
            tuned[key] = list(options.values())
        for text in baseline:
            axis, equals, label = text.partition("=")
            if not equals:
                raise RecipeError(f"--baseline {text!r}: write AXIS=LABEL, such as method.type=sft")
            chosen[axis] = label
        for key, listed in tuned.items():
            if not isinstance(listed, list):
                raise RecipeError(f"tune.{key} is {brief(listed)}; it must be a list of values")
        values |= {"vary": axes, "tune": tuned, "baseline": {axis: str(label) for axis, label in chosen.items()}}
        values |= {key: value for key, value in (changes or {}).items() if value is not None}
        return config.parse(Grid, values)
    except RecipeError as error:
        where = "" if path is None else f"{path}: "
        raise RecipeError(f"{where}{str(error).replace('the recipe', 'the grid', 1)}") from error


def _mapping(value: object, where: str, example: str) -> dict[str, Any]:
    """The mapping with its keys as strings: YAML reads `1:` and `on:` as others. Null is an empty one."""
    if value is not None and not isinstance(value, Mapping):
        raise RecipeError(f"{where} is {brief(value)}; it must be a mapping, such as {example}")
    return {str(key): item for key, item in (value or {}).items()}


def _assignment(text: str, option: str, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """`KEY=V1,V2` as the key and `{text: value}`; the key must not be in `given`."""
    key, equals, values = text.partition("=")
    if not equals or not all(key.split(".")) or not values.strip() or values.rstrip().endswith(","):
        raise RecipeError(f"{option} {text!r}: write KEY=V1,V2, such as method.type=opd,gkd")
    if key in given:
        raise RecipeError(f"{option} {key}: given twice; write all its values in one place")
    parts = config.split_values(values, f"{option} {text!r}")
    options = {part: config.load(part, f"{option} {text!r}") for part in parts}
    if len(options) != len(parts):
        raise RecipeError(f"{option} {text!r}: a value stands twice")
    return key, options


def axis_change(axis: str, value: Any, base: Mapping[str, Any]) -> dict[str, Any]:
    """`a.b=value` as a change. `SECTION.type=X`: the section with those of the base's keys that X has."""
    section, _, key = axis.partition(".")
    tables = {item.name: item.metadata["choice"].table for item in fields(Recipe) if "choice" in item.metadata}
    if section in tables and key == "type":
        kind = tables[section].get(str(value))
        known = {item.name for item in fields(kind) if item.init} if kind is not None else set()
        kept = {name: item for name, item in dict(base.get(section) or {}).items() if name in known}
        return {section: {"type": value} | kept}
    return {axis: value}


def apply(base: Mapping[str, Any], changes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The base with every change: a section is merged key by key, or replaced where the change says its `type`.

    A dotted key replaces what stands there, null removes a section. Changes that replace a section come first, whatever
    the order.
    """
    values = dict(base)
    for change in sorted(changes, key=lambda change: not any(map(_has_type, change.values()))):
        for key, item in change.items():
            *parents, last = key.split(".")
            inner = values
            for part in parents:
                inner[part] = dict(inner[part]) if isinstance(inner.get(part), Mapping) else {}
                inner = inner[part]
            if item is None and not parents:
                values.pop(key, None)
            else:
                inner[last] = item if parents or _has_type(item) else _merged(inner.get(last), item)
    return values


def _has_type(item: object) -> bool:
    return isinstance(item, Mapping) and "type" in item


def _merged(base: Any, change: Any) -> Any:
    if not isinstance(change, Mapping):
        return change
    kept = dict(base) if isinstance(base, Mapping) else {}
    return kept | {key: _merged(kept.get(key), item) for key, item in change.items()}
