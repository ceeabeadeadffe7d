"""A recipe: its sections, what is checked about them, and the parts of a run that they open."""

from __future__ import annotations

from understudy.recipe.schema import Recipe, check_same_recipe, load_recipe

__all__ = ["Recipe", "check_same_recipe", "load_recipe"]
