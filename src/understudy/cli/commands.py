"""The commands `train`, `doctor`, `eval`, `sample` and `compare`."""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast, get_args

from understudy import config, run
from understudy.compare.cells import Cells, budgets
from understudy.compare.grid import Grid
from understudy.compare.outputs import write_outputs
from understudy.compare.processes import check_ray
from understudy.compare.run import Ending, Runner
from understudy.compare.run import compare as make
from understudy.compare.table import budget_warning
from understudy.environments import single_turn
from understudy.environments.play import play
from understudy.errors import RecipeError
from understudy.eval.summary import EvalSummary, sample_row
from understudy.files import write_json_lines
from understudy.format import count, interval, metric_note, number
from understudy.methods import SFT
from understudy.recipe import Recipe, load_recipe
from understudy.recipe.checks import Files, Parts, check
from understudy.recipe.doctor import errors_of, examine, show
from understudy.recipe.load import choose_device, load_student, load_teachers, sampling_with
from understudy.tasks import Split
from understudy.trainer.checkpoint import RunDir
from understudy.trainer.console import Console
from understudy.trainer.distributed import Ranks
from understudy.trainer.settings import Eval
from understudy.trainer.signals import terminable
from understudy.types import Prompt, Request, Sample

BLOCK_REQUESTS = 256
"""Requests between two updates of the progress bar."""


def train(path: Path, overrides: Sequence[str], *, dry_run: bool, resume: bool, examine: bool = True) -> str:
    """Returns how the run ended; "checked" for a dry run."""
    recipe = load_recipe(path, overrides)
    ranks = Ranks() if dry_run else Ranks.from_environment(partial(choose_device, recipe.device))
    with terminable(), Console(quiet=not ranks.is_main) as console, closing(ranks):
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
            _show(console, title, result.summaries)
        if result.ending == "stopped by a signal":
            path = result.run_dir.path
            console.note(f"stopped by a signal; the checkpoint is saved, continue with --resume ({path})")
        else:
            console.note(f"student  {result.run_dir.student}")
            console.note(f"report   {result.report}")
    return result.ending


def _show(console: Console, title: str, summaries: Sequence[EvalSummary]) -> None:
    """Prints a table of the first and the last evaluation, metric by metric."""
    shown = summaries if len(summaries) < 2 else [summaries[0], summaries[-1]]
    last = shown[-1]
    rows = [
        [name, metric_note(name), *(interval(name, one.metrics.get(name)) for one in shown)] for name in last.metrics
    ]
    described = f"{title}: {count(last.num_problems, f'{last.split} problem')}, 95 % intervals over problems"
    console.table(described, ["metric", "", *(f"step {one.step:,}" for one in shown)], rows)


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
    check(recipe, training=False)
    with terminable(), Console() as console:
        loaded = load_student(recipe)
        started = time.perf_counter()
        with closing(load_teachers(recipe, loaded)) as teachers, sampling_with(recipe, loaded) as engine:
            summary = run.evaluator(recipe, loaded, engine, teachers.judge, Ranks(), out, console)(0)
        _show(console, recipe.student.model or "random weights", [summary])
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
    if split not in get_args(Split):
        raise RecipeError(f"--split is {split!r}; it must be one of {', '.join(get_args(Split))}")
    if out is not None and out.exists():
        raise RecipeError(f"--out {out} exists; choose another file")
    recipe = load_for_use(path, overrides, model)
    check(recipe, training=False)
    chosen, environment_of = list(islice(recipe.task.prompts(cast(Split, split)), num)), recipe.task.environment
    if prompts:
        # in the form that the task's prompts have
        is_chat, environment_of = next(iter(recipe.task.prompts("train"))).messages is not None, single_turn
        chosen = [
            Prompt(f"cli/{text}", messages=({"role": "user", "content": text},))
            if is_chat
            else Prompt(f"cli/{text}", text=text)
            for text in prompts
        ]
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
            console.note(f"{count(len(samples), 'sample')} in {out}")
            return
        console.table(
            recipe.student.model or "random weights",
            ["prompt", "response", "ended by"],
            [[item.prompt.conversation, item.text, item.finish] for item in samples],
        )


def _distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Numbers prompts that are given twice, because draws are keyed by id: they would get the same sample twice."""
    seen: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        seen[prompt.id] += 1
        count = seen[prompt.id]
        found.append(prompt if count == 1 else replace(prompt, id=f"{prompt.id}~{count}"))
    return found


def doctor(path: Path, overrides: Sequence[str]) -> int:
    """Prints every finding and returns the number of errors. Nothing is written."""
    recipe = load_recipe(path, overrides)
    with terminable(), Console() as console:
        found = examine(recipe, lambda files: loaded(files, console))
        show(console, found)
    return len(errors_of(found))


@contextmanager
def loaded(files: Files, console: Console) -> Iterator[Parts]:
    """Loads as for a new run, in a directory that is thrown away; it lies beside the run's, where engines on other machines
    see it."""
    console.note("loading as for training")
    beside = Path(files.recipe.run_dir).absolute().parent
    while not beside.is_dir():
        beside = beside.parent
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=beside) as folder, ExitStack() as opened:
        scratch = Files(replace(files.recipe, run_dir=folder, loggers=()))
        scratch.tokenizers = files.tokenizers
        parts = run.assemble(scratch, RunDir(Path(folder)), None, Ranks(), Console(quiet=True), opened)
        opened.callback(parts.trainer.observer.close)
        # what is shown names the run's own directory
        parts.recipe = files.recipe
        yield parts


def compare(
    path: Path,
    overrides: Sequence[str],
    read_grid: Callable[[Mapping[str, Any]], Grid],
    *,
    out: Path | None,
    jobs: int,
    ray: bool,
    dry_run: bool,
) -> Ending:
    """Returns how the comparison ended. Raises RecipeError, DataError or VocabularyError before a run starts."""
    base = config.override(config.read_yaml(path), overrides)
    base.setdefault("run_dir", f"runs/{path.stem}")
    cells = Cells(read_grid(base), base, out or Path(f"{base['run_dir']}-compare"))
    with Console() as console:
        if dry_run:
            if ray:
                check_ray()
            cells.check()
            planned = cells.compared(
                {combination: cells.grid.tunings()[0] for combination in cells.grid.combinations()}
            )
            dropped = {cell.combination: " and ".join(cell.dropped) for cell in planned}
            tokens = budgets(planned)
            rows = [[combination.name, number(tokens[combination]), dropped[combination]] for combination in tokens]
            columns = ["labels", "token budget", "left out, as the method has no use for it"]
            console.table("combinations", columns, rows)
            if warning := budget_warning(tokens):
                console.warn(warning)
            tuning = f"{count(len(cells.tuning), 'tuning run')}, then " if cells.tuning else ""
            console.note(f"{tuning}{count(len(planned), 'run')} into {cells.out}; nothing was run or written")
            return "finished"
        command = shlex.join(["understudy", *sys.argv[1:]])
        found = make(cells, Runner(console, jobs, ray), command=command, save=write_outputs)
        page = write_outputs(found)
        # the columns that fit a terminal; the rest is on the page
        table, grid = found.table, cells.grid
        num_first, last = max(1, len(grid.vary)) + len(grid.tune) + 2, len(table.columns) - 1
        shown = [i for i, name in enumerate(table.columns) if i < num_first or i == last or name.startswith("samples")]
        rows = [[texts[i] for i in shown] for texts in table.texts]
        console.table("comparison", [table.columns[i] for i in shown], rows)
        for line in table.caption:
            console.note(line)
        if found.ending != "finished":
            reason = "runs failed" if found.ending == "failed" else found.ending
            console.warn(f"{reason}; the same command continues with what is missing")
        console.note(f"page     {page}")
    return found.ending
