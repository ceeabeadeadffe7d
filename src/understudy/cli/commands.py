"""The commands `train` and `eval`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from understudy import run
from understudy.errors import RecipeError
from understudy.eval.summary import EvalSummary
from understudy.format import interval, metric_note
from understudy.methods import SFT
from understudy.recipe import Recipe, load_recipe
from understudy.recipe.checks import check
from understudy.recipe.load import choose_device, load_student, load_teachers, sampling_with
from understudy.trainer.console import Console
from understudy.trainer.distributed import Ranks
from understudy.trainer.rundir import RunDir
from understudy.trainer.settings import Eval
from understudy.trainer.signals import terminable


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
        _show_result(console, result)
    return result.ending


def _show_result(console: Console, result: run.Result) -> None:
    if result.summaries:
        console.table(*_table("before and after" if len(result.summaries) > 1 else "evaluation", result.summaries))
    path = result.run_dir.path
    if result.ending == "stopped by a signal":
        console.note(f"stopped by a signal; the checkpoint is saved, continue with --resume ({path})")
        return
    console.note(f"student  {result.run_dir.student}")
    console.note(f"report   {result.report}")


def _table(title: str, summaries: Sequence[EvalSummary]) -> tuple[str, list[str], list[list[str]]]:
    """First and last evaluation, metric by metric."""
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
