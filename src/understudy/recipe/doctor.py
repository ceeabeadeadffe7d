"""Every check of a recipe, one stage after the other, and the report of what they find."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

from understudy.errors import RecipeError, UnderstudyError
from understudy.files import write_json
from understudy.recipe.checks import Files, Finding, Parts, Stage, of_stage
from understudy.recipe.checks.parts import AS_SAID
from understudy.recipe.schema import Recipe
from understudy.text import plain_tree
from understudy.trainer.console import Console

Build = Callable[[Files], AbstractContextManager[Parts]]
"""Loads everything as for training; inside, nothing has been written, and after it nothing is left."""


def examine(recipe: Recipe, build: Build) -> list[Finding]:
    """The findings of all stages. An error in one ends it: the next would fail for the same reason."""
    files = Files(recipe)
    found: list[Finding] = []
    for check in of_stage("files"):
        found += check.attempt(files)
        if errors_of(found):
            return found
    found += attempt_all("room", files)
    if errors_of(found):
        return found
    try:
        with build(files) as parts:
            return each_once([*found, *examine_parts(parts), *attempt_all("advice", parts)])
    except (UnderstudyError, RuntimeError, MemoryError, OSError) as error:
        return [
            *found,
            Finding(str(error), "error", AS_SAID, name="loading", checked="models, data and the first prompts"),
        ]


def each_once(findings: Iterable[Finding]) -> list[Finding]:
    """The last of each name: room is looked at twice, and what is loaded says more."""
    return list({finding.name: finding for finding in findings}.values())


def examine_parts(parts: Parts) -> list[Finding]:
    """The findings about what is loaded, before its first step. Every rank calls it; the first examines for all."""
    ranks = parts.trainer.ranks
    return ranks.gather(attempt_all("loaded", parts) + attempt_all("rehearsed", parts) if ranks.is_main else [])[0]


def attempt_all(stage: Stage, parts: Files) -> list[Finding]:
    """The findings of one stage; a check that fails is a finding too."""
    return [item for check in of_stage(stage) for item in check.attempt(parts)]


def errors_of(findings: Iterable[Finding]) -> list[Finding]:
    """The errors among the findings."""
    return [finding for finding in findings if finding.level == "error"]


def refuse(findings: Iterable[Finding]) -> None:
    """Raises RecipeError that lists the errors, if there are any."""
    if errors := errors_of(findings):
        head = f"{verdict(errors)} (--no-doctor, or examine=False from Python, trains all the same)"
        raise RecipeError("\n  ".join([head, *map(_line, errors)]))


def verdict(errors: Sequence[Finding]) -> str:
    """The last line of a report that has errors."""
    count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
    return f"{count}: the run would stop, or learn something else than the recipe says"


def _line(item: Finding) -> str:
    advice = "" if item.advice in ("", AS_SAID) else f"; {item.advice}"
    return f"{item.name}: {item.found}{advice}"


def write_findings(path: Path, findings: Iterable[Finding]) -> None:
    """Writes JSON: `{"findings": [{name, level, checked, found, advice}]}`. Raises CheckpointError."""
    write_json(path, {"findings": [plain_tree(asdict(finding)) for finding in findings]})


def show(console: Console, findings: Sequence[Finding]) -> None:
    """Prints every finding: what was checked, what was found, what to do."""
    rows = [[item.name, item.level, item.checked, item.found, item.advice] for item in findings]
    console.table("doctor", ["check", "", "what was checked", "what was found", "what to do"], rows)
    errors, warnings = errors_of(findings), [item for item in findings if item.level == "warning"]
    if errors:
        console.warn(verdict(errors))
    elif warnings:
        console.note(f"{count_fine(findings)}; the run may start")
    else:
        console.note(f"{count_fine(findings)}; nothing is wrong")


def warn_of(findings: Iterable[Finding], warn: Callable[[str], None]) -> None:
    """Calls `warn` with a line for each finding that is not fine."""
    for item in findings:
        if item.level != "ok":
            warn(_line(item))


def count_fine(findings: Sequence[Finding]) -> str:
    """As "14 of 15 checks are fine"."""
    return f"{sum(item.level == 'ok' for item in findings)} of {len(findings)} checks are fine"
