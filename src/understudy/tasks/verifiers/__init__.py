"""Verifiers: pure functions (text, reference) -> Grade. They know nothing of tasks, prompts or models."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from understudy.errors import RecipeError, nearest
from understudy.tasks.verifiers.exact import grade_exact
from understudy.tasks.verifiers.math import grade_math
from understudy.types import Grade

Verifier = Callable[[str, str], Grade]

VERIFIERS: Mapping[str, Verifier] = {"exact": grade_exact, "math": grade_math}


def find_verifier(name: str) -> Verifier:
    """The verifier of that name. Raises RecipeError with the nearest name."""
    if name not in VERIFIERS:
        raise RecipeError(f"there is no verifier {name!r}; {nearest(name, VERIFIERS)}")
    return VERIFIERS[name]


__all__ = ["VERIFIERS", "Verifier", "find_verifier", "grade_exact", "grade_math"]
