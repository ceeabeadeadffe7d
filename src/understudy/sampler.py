"""The engine that writes the student's samples, and how it gets the student's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

from torch import Tensor

from .assemble import Loaded
from .recipe import Recipe
from .rollout import HF, CopySampler, Sampler

Weights = Callable[[], Iterable[tuple[str, Tensor]]]


def open_sampler(recipe: Recipe, loaded: Loaded) -> tuple[Sampler, Weights | None]:
    """The sampler of a run and what to push to it; None where it shares the live model. Raises RecipeError, EngineError."""
    engine = recipe.engine
    if isinstance(engine, HF):
        if not engine.copy:
            return loaded.sampler(recipe.seed), None
        twin = copy.deepcopy(loaded.model).requires_grad_(False)
        return CopySampler(twin, lambda model: loaded.sampler(recipe.seed, model)), loaded.model.state_dict().items
    raise NotImplementedError
