"""The engine that writes the student's samples, and how it gets the student's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from understudy.engines import HF, CopyEngine, Engine
from understudy.models import row_style
from understudy.models.save import merged_state_dict
from understudy.recipe.load import Loaded
from understudy.recipe.schema import Recipe
from understudy.trainer.distributed import Ranks
from understudy.trainer.publish import NUM_PROBED, Publisher
from understudy.trainer.update import StudentModel
from understudy.types import Sample

Weights = Callable[[], Iterable[tuple[str, Tensor]]]


def open_engine(recipe: Recipe, loaded: Loaded) -> tuple[Engine, Weights | None]:
    """The engine of a run and what is pushed to it; None where it shares the live model. Raises RecipeError, EngineError."""
    section = recipe.engine
    if isinstance(section, HF):
        if not section.copy:
            return loaded.engine(recipe.seed), None
        twin = copy.deepcopy(loaded.model).requires_grad_(False)
        return CopyEngine(twin, lambda model: loaded.engine(recipe.seed, model)), loaded.model.state_dict().items
    from understudy.engines.vllm.engine import VLLMEngine

    held_out = None if recipe.eval is None else recipe.eval.sampling
    longest = max(sampling.max_new_tokens for sampling in (recipe.sampling, held_out) if sampling is not None)
    engine = VLLMEngine(
        section.for_responses(longest),
        loaded.model,
        loaded.renderer.tokenizer,
        seed=recipe.seed,
        stop_ids=loaded.renderer.stop_ids,
        vocab_size=loaded.vocab_size,
        sampling=recipe.sampling,
        run_dir=Path(recipe.run_dir),
        autocast=loaded.compute_dtype,
    )
    return engine, lambda: merged_state_dict(loaded.model).items()


@contextmanager
def sampling_with(recipe: Recipe, loaded: Loaded) -> Iterator[Engine]:
    """An engine of the weights as they are, compared before and after where it is remote, and closed at the end."""
    engine, weights = open_engine(recipe, loaded)
    student = StudentModel(
        loaded.model, loaded.device, loaded.vocab_size, 1.0, loaded.compute_dtype, style=row_style(loaded.model)
    )
    try:
        first = to_compare(recipe, loaded) if engine.remote else ()
        Publisher(engine, student, weights, Ranks(), first)(0, ())
        yield engine
        engine.verify()
    finally:
        engine.close()


def to_compare(recipe: Recipe, loaded: Loaded) -> list[Sample]:
    """Some prompts of the task, for an engine that is compared before there are samples."""
    prompts = islice(recipe.task.prompts("train"), NUM_PROBED)
    rendered = [(prompt, loaded.renderer.start(prompt)) for prompt in prompts]
    return [
        Sample(prompt, 0, ids, torch.zeros(ids.numel(), dtype=torch.uint8), 1, "data", "") for prompt, ids in rendered
    ]
