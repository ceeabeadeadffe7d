"""The command `sample`: prints a model's responses or writes them as a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import cast

from understudy.cli.commands import load_for_use, quieten_libraries
from understudy.environments import single_turn
from understudy.environments.play import play
from understudy.errors import RecipeError
from understudy.eval.summary import prompt_text, sample_row
from understudy.files import write_json_lines
from understudy.recipe import Recipe
from understudy.recipe.checks import check
from understudy.recipe.load import load_student, sampling_with
from understudy.trainer.console import Console
from understudy.trainer.settings import Split
from understudy.trainer.signals import terminable
from understudy.types import Prompt, Request, Sample

SPLITS = ("train", "validation", "test")
BLOCK_REQUESTS = 256
"""Requests between two updates of the progress bar."""


def sample(
    path: Path,
    overrides: Sequence[str],
    *,
    model: str | None,
    prompts: Sequence[str],
    num: int,
    split: str,
    num_samples: int,
    out: Path | None,
) -> None:
    """Samples the given prompts or those of the task. Raises RecipeError for an unknown split or a file that exists."""
    if split not in SPLITS:
        raise RecipeError(f"--split is {split!r}; it must be one of {', '.join(SPLITS)}")
    if out is not None and out.exists():
        raise RecipeError(f"--out {out} exists; choose another file")
    recipe = load_for_use(path, overrides, model)
    quieten_libraries()
    check(recipe, training=False)
    chosen = _own(recipe, prompts) if prompts else list(islice(recipe.task.prompts(cast(Split, split)), num))
    environment_of = single_turn if prompts else recipe.task.environment
    with terminable(), Console() as console:
        loaded = load_student(recipe)
        rendered = [loaded.renderer.start(prompt) for prompt in chosen]
        requests = [
            Request(prompt, index, ids)
            for prompt, ids in zip(_distinct(chosen), rendered, strict=True)
            for index in range(num_samples)
        ]
        samples: list[Sample] = []
        with sampling_with(recipe, loaded) as engine, console.progress("sample", len(requests)) as advance:
            for start in range(0, len(requests), BLOCK_REQUESTS):
                block = requests[start : start + BLOCK_REQUESTS]
                parts = (engine, loaded.renderer, environment_of)
                samples += play(*parts, block, recipe.sampling, step=0, stream="sample/cli")
                advance(len(block))
        if out is not None:
            kept = ("prompt", "response", "reference", "finish", "num_tokens")
            write_json_lines(out, [{key: row[key] for key in kept} for row in map(sample_row, samples)])
            console.note(f"{len(samples)} samples in {out}")
            return
        console.table(
            recipe.student.model or "random weights",
            ["prompt", "response", "ended by"],
            [[prompt_text(item.prompt), item.text, item.finish] for item in samples],
        )


def _own(recipe: Recipe, texts: Sequence[str]) -> list[Prompt]:
    """Prompts from the command line, in the form that the task's prompts have."""
    pattern = next(iter(recipe.task.prompts("train")))
    if pattern.messages is None:
        return [Prompt(f"cli/{text}", text=text) for text in texts]
    return [Prompt(f"cli/{text}", messages=({"role": "user", "content": text},)) for text in texts]


def _distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Numbers prompts that are given twice, because draws are keyed by id: they would get the same sample twice."""
    seen: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        seen[prompt.id] += 1
        count = seen[prompt.id]
        found.append(prompt if count == 1 else replace(prompt, id=f"{prompt.id}~{count}"))
    return found
