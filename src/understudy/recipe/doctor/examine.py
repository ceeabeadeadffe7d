"""All checks of a run, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from understudy.errors import UnderstudyError
from understudy.recipe import load
from understudy.recipe.doctor import probes, sides, static
from understudy.recipe.doctor.findings import AS_SAID, Finding, attempt, errors_of, latest
from understudy.recipe.doctor.parts import Check, Parts, rollouts_of
from understudy.recipe.judges import Judges
from understudy.recipe.load import Loaded
from understudy.recipe.schema import Recipe
from understudy.trainer.loop import Trainer

Build = Callable[[Recipe], AbstractContextManager[tuple[Loaded, Trainer]]]
"""Everything loaded as for training; inside, nothing has been written, and after it nothing is left."""


def examine(recipe: Recipe, build: Build) -> list[Finding]:
    """A whole recipe: what can be known without loading, then all of it. One error before loading ends it."""

    def check() -> list[Finding]:
        lines = load.check(recipe, fetch=True)
        return [Finding("recipe", "ok", "sections against each other, files and data", "; ".join(lines))]

    found = attempt("recipe", "sections against each other, files and data", check)
    if errors_of(found):
        return found
    found += static.before_loading(recipe)
    if errors_of(found):
        return found
    try:
        with build(recipe) as (loaded, trainer):
            return latest([*found, *examine_parts(recipe, loaded, judges_of(trainer), trainer)])
    except (UnderstudyError, RuntimeError, MemoryError, OSError) as error:
        return [*found, Finding("loading", "error", "models, data and the first prompts", str(error), AS_SAID)]


def examine_parts(recipe: Recipe, loaded: Loaded, judges: Judges, trainer: Trainer) -> list[Finding]:
    """What is loaded, before its first step. Every rank calls it: the first examines, the others get what it found."""
    found: list[Finding] = []
    if trainer.ranks.is_main:
        parts = Parts(recipe, loaded, judges, trainer)
        # which checks apply is found out by code that may fail too
        found += attempt("room", "which checks apply", lambda: _all(static.checks(parts)))
        found += attempt("sides", "which checks apply", lambda: _all(sides.checks(parts)))
        found += probes.findings(parts)
    return trainer.ranks.gather(found)[0]


def _all(checks: Iterable[Check]) -> list[Finding]:
    return [item for name, checked, check in checks for item in attempt(name, checked, check)]


def judges_of(trainer: Trainer) -> Judges:
    """Who judges in a trainer that is put together."""
    rollouts = rollouts_of(trainer)
    collector = rollouts.collector
    return Judges(collector.teacher, rollouts.rewarder.judge, collector.reference, several=trainer.several_teachers)
