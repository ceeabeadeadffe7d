"""The commands `train`, `eval` and `sample`."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import cast

from understudy import run
from understudy.environments import single_turn
from understudy.environments.play import play
from understudy.errors import RecipeError
from understudy.eval.summary import EvalSummary, prompt_text, sample_row
from understudy.files import write_json_lines
from understudy.format import interval, metric_note
from understudy.methods import SFT
from understudy.recipe import Recipe, load_recipe
from understudy.recipe.checks import check
from understudy.recipe.load import choose_device, load_student, load_teachers, sampling_with
from understudy.trainer.console import Console
from understudy.trainer.distributed import Ranks
from understudy.trainer.rundir import RunDir
from understudy.trainer.settings import Eval, Split
from understudy.trainer.signals import terminable
from understudy.types import Prompt, Request, Sample

SPLITS = ("train", "validation", "test")
BLOCK_REQUESTS = 256
"""Requests between two updates of the progress bar."""


def quieten_libraries() -> None:
    """Turns off progress bars and notes of transformers and datasets, which would tear the display."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # not datasets.disable_progress_bars(): most recipes need no data set, and the import takes a second
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def train(path: Path, overrides: Sequence[str], *, dry_run: bool, resume: bool, examine: bool = True) -> str:
    """Returns how the run ended; "checked" for a dry run."""
    recipe = load_recipe(path, overrides)
    quieten_libraries()
    ranks = Ranks.from_environment(choose_device(recipe.device)) if not dry_run else Ranks()
    with terminable(), Console(quiet=not ranks.is_main) as console, contextlib.closing(ranks):
        if dry_run:
            if not resume:
                RunDir(Path(recipe.run_dir)).check_new()
            for line in check(recipe):
                console.note(line)
            console.note(f"{path} is fine; nothing was loaded or written")
            return "checked"
        result = run.train(recipe, resume=resume, examine=examine, console=console)
        if result.summaries:
            title = "before and after" if len(result.summaries) > 1 else "evaluation"
            console.table(*_table(title, result.summaries))
        if result.ending == "stopped by a signal":
            path = result.run_dir.path
            console.note(f"stopped by a signal; the checkpoint is saved, continue with --resume ({path})")
        else:
            console.note(f"student  {result.run_dir.student}")
            console.note(f"report   {result.report}")
    return result.ending


def _table(title: str, summaries: Sequence[EvalSummary]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows of a table of the first and the last evaluation, metric by metric."""
    shown = [summaries[0], summaries[-1]] if len(summaries) > 1 else [summaries[0]]
    last = shown[-1]
    rows = [
        [name, metric_note(name), *(interval(name, summary.metrics.get(name)) for summary in shown)]
        for name in last.metrics
    ]
    columns = ["metric", "", *(f"step {summary.step:,}" for summary in shown)]
    described = f"{title}: {last.num_problems:,} {last.split} problems, 95 % intervals over problems"
    return described, columns, rows


def load_for_use(path: Path, overrides: Sequence[str], model: str | None) -> Recipe:
    """The recipe with `model` as its student, or with the final student of a run directory.

    It keeps no teacher but the judge that evaluations ask.
    """
    if path.is_dir():
        run_dir = RunDir(path)
        run_dir.check_started()
        recipe = load_recipe(run_dir.recipe, overrides)
        if model is None and not run_dir.student.is_dir():
            raise RecipeError(f"{path} has no final student yet; name a checkpoint's student with --model")
        model = model or str(run_dir.student)
    else:
        recipe = load_recipe(path, overrides)
    rejects = recipe.eval is not None and recipe.eval.reject_below is not None
    teacher = recipe.teacher if rejects else None
    recipe = replace(recipe, teacher=teacher, teachers={}, reference=None, responses=None, method=SFT())
    if model is None:
        return recipe
    student = replace(
        recipe.student, model=model, starts={}, start=None, build=None, tokenizer=None, lora=None, revision=None
    )
    return replace(recipe, student=student)


def evaluate(path: Path, overrides: Sequence[str], *, model: str | None, out: Path | None) -> EvalSummary:
    """Prints the table of one evaluation."""
    recipe = load_for_use(path, overrides, model)
    if recipe.eval is None:
        recipe = replace(recipe, eval=Eval())
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"--out {out} exists and is not empty; choose another directory")
    quieten_libraries()
    check(recipe, training=False)
    with terminable(), Console() as console:
        loaded = load_student(recipe)
        started = time.perf_counter()
        with contextlib.closing(load_teachers(recipe, loaded)) as teachers, sampling_with(recipe, loaded) as engine:
            summary = run.evaluator(recipe, loaded, engine, teachers.judge, Ranks(), out, console)(0)
        console.table(*_table(recipe.student.model or "random weights", [summary]))
        console.note(f"{time.perf_counter() - started:.1f} s" + (f", samples in {out}" if out is not None else ""))
    return summary


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
