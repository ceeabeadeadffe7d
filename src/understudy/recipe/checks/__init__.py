"""All checks of a run, by the stage in which they can be made. Rules about the recipe alone are `rules.RULES`."""

from __future__ import annotations

from understudy.recipe.checks import files, probes, room, sides
from understudy.recipe.checks.parts import Check, Files, Finding, Parts, Stage
from understudy.recipe.schema import Recipe

CHECKS: tuple[Check, ...] = (*files.CHECKS, *room.CHECKS, *sides.CHECKS, *probes.CHECKS)


def of_stage(stage: Stage) -> list[Check]:
    """The checks of a stage, in their order."""
    return [check for check in CHECKS if check.stage == stage]


def check(recipe: Recipe, *, training: bool = True, fetch: bool = False) -> list[str]:
    """Everything that can be found wrong without loading a model. Returns what was found, a line each.

    `training`, `fetch`: as in `Files`. Raises RecipeError, DataError or VocabularyError.
    """
    given = Files(recipe, training=training, fetch=fetch)
    return [item.found for one in of_stage("files") for item in one(given)]


__all__ = ["CHECKS", "Check", "Files", "Finding", "Parts", "Stage", "check", "of_stage"]
