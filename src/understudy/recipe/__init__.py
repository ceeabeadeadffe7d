"""A recipe: its sections, what is checked about them, and the parts of a run that they open."""

from __future__ import annotations

from understudy.recipe.schema import Lora, Recipe, Student, check_same_recipe, load_recipe

__all__ = ["Lora", "Recipe", "Student", "check_same_recipe", "load_recipe"]
