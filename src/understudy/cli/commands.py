"""The commands `train`, `doctor`, `eval`, `sample` and `compare`."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from understudy import api, config, run
from understudy.compare.cells import Cells, budgets
from understudy.compare.grid import Grid
from understudy.compare.outputs import write_outputs
from understudy.compare.processes import check_ray
from understudy.compare.run import Ending, Runner
from understudy.compare.run import compare as make
from understudy.compare.table import budget_warning
from understudy.errors import RecipeError, TrainingError
from understudy.eval.summary import sample_row
from understudy.files import check_writable, locked, write_json_lines
from understudy.format import count, number
from understudy.recipe import load_recipe
from understudy.recipe.checks import Files, Parts, check
from understudy.recipe.doctor import errors_of, examine, show
from understudy.trainer.checkpoint import RunDir
from understudy.trainer.console import Console
from understudy.trainer.distributed import Ranks
from understudy.trainer.signals import terminable

LAUNCHED_ENDINGS = {0: "finished", 130: "stopped by a signal"}
"""By the exit code of the ranks."""


def train(path: Path, overrides: Sequence[str], *, dry_run: bool, resume: bool, examine: bool = True) -> str:
    """Returns how the run ended; "checked" for a dry run."""
    recipe = load_recipe(path, overrides)
    if dry_run:
        with Console() as console:
            run_dir = RunDir(Path(recipe.run_dir))
            if resume:
                recipe = run.resumed_recipe(recipe, run_dir)
            else:
                run_dir.check_new()
            if recipe.launcher is not None:
                load_recipe(path, [*overrides, *recipe.launcher.check(recipe.roles)])
            for line in check(recipe):
                console.note(line)
            console.note(f"{path} is fine; nothing was loaded or written")
        return "checked"
    if recipe.launcher is not None:
        with Console() as console:
            # what the ranks will read is refused here, before anything is started
            load_recipe(path, [*overrides, *recipe.launcher.check(recipe.roles)])
            options = ["--resume"] * resume + ["--no-doctor"] * (not examine)
            command = [sys.executable, "-m", "understudy", "train", str(path), *overrides, *options]
            code = recipe.launcher.run(recipe.roles, command, console)
        if code not in LAUNCHED_ENDINGS:
            raise TrainingError(f"the ranks ended with status {code}; see rank_*.log in {recipe.run_dir}")
        return LAUNCHED_ENDINGS[code]
    return api.train_and_show(recipe, resume=resume, examine=examine).ending


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
    """Prints samples, or writes them to a file. Raises RecipeError for a file that exists."""
    if out is not None:
        check_writable(out.parent, "--out")
        if out.exists():
            raise RecipeError(f"--out {out} exists; choose another file")
    samples = api.sample(path, prompts, overrides=overrides, model=model, num=num, split=split, num_samples=num_samples)
    with Console() as console:
        if out is not None:
            kept = ("prompt", "response", "reference", "finish", "num_tokens")
            write_json_lines(out, [{key: row[key] for key in kept} for row in map(sample_row, samples)])
            console.note(f"{count(len(samples), 'sample')} in {out}")
            return
        console.table(
            model or str(path),
            ["prompt", "response", "ended by"],
            [[item.prompt.conversation, item.text, item.finish] for item in samples],
        )


def doctor(path: Path, overrides: Sequence[str]) -> int:
    """Prints every finding and returns the number of errors. Nothing is written.

    A model directory is examined as the student of a run that learns from rewards, which needs no other model.
    """
    if api.is_model(path):
        recipe = api.model_recipe(path, overrides, task={"type": "arithmetic"}, method={"type": "grpo"})
    else:
        recipe = load_recipe(RunDir(path).recipe if path.is_dir() else path, overrides)
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
        with locked(cells.out, "--out", console.warn):
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
