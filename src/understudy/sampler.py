"""The engine that writes the student's samples, and how it gets the student's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from .assemble import Loaded
from .models.saving import merged_state_dict
from .recipe import Recipe
from .rollout import HF, CopySampler, Sampler

Weights = Callable[[], Iterable[tuple[str, Tensor]]]


def open_sampler(recipe: Recipe, loaded: Loaded) -> tuple[Sampler, Weights | None]:
    """The sampler of a run and what is pushed to it; None where it shares the live model. Raises RecipeError, EngineError."""
    engine = recipe.engine
    if isinstance(engine, HF):
        if not engine.copy:
            return loaded.sampler(recipe.seed), None
        twin = copy.deepcopy(loaded.model).requires_grad_(False)
        return CopySampler(twin, lambda model: loaded.sampler(recipe.seed, model)), loaded.model.state_dict().items
    from .rollout.vllm import VLLMSampler

    sampler = VLLMSampler(
        engine,
        loaded.model,
        loaded.tokenizer,
        seed=recipe.seed,
        stop_ids=loaded.stop_ids,
        vocab_size=loaded.vocab_size,
        sampling=recipe.sampling,
        run_dir=Path(recipe.run_dir),
        autocast=loaded.compute_dtype,
    )
    return sampler, lambda: merged_state_dict(loaded.model).items()


@contextmanager
def sampling_with(recipe: Recipe, loaded: Loaded) -> Iterator[Sampler]:
    """A sampler of the weights as they are, closed at the end."""
    sampler, weights = open_sampler(recipe, loaded)
    try:
        sampler.push(None if weights is None else weights(), 0)
        yield sampler
    finally:
        sampler.close()
