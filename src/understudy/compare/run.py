"""A comparison from its grid to its table: check, tune, run, measure, write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from understudy import config
from understudy.compare.cells import Cell, Cells, budgets
from understudy.compare.grid import Combination
from understudy.compare.measure import Measured, measure
from understudy.compare.on_ray import check_ray, run_on_ray
from understudy.compare.processes import Ended, Job, prepare, run_processes
from understudy.compare.table import Table, budget_warning, caption, rows, table
from understudy.errors import RecipeError
from understudy.format import quantity
from understudy.trainer.console import Console
from understudy.trainer.signals import StopSignal

Ending = Literal["finished", "failed", "stopped by a signal"]


@dataclass(frozen=True)
class Outcome:
    """How a run of the comparison ended; `measured` is None for one that did not finish."""

    cell: Cell
    status: Literal["finished", "failed", "not run"]
    error: str | None = None
    measured: Measured | None = None


@dataclass(frozen=True)
class Comparison:
    """Everything that the outputs show."""

    cells: Cells
    outcomes: Sequence[Outcome]
    tuning: Sequence[Outcome]
    tuned: Mapping[Combination, Mapping[str, Any]]
    table: Table
    command: str = ""

    @property
    def ending(self) -> Ending:
        """Failed if any run did; stopped if any was not run otherwise."""
        statuses = {outcome.status for outcome in (*self.tuning, *self.outcomes)}
        if "failed" in statuses:
            return "failed"
        return "stopped by a signal" if "not run" in statuses else "finished"


@dataclass
class Runner:
    """Makes runs. `stopped` says whether a signal came."""

    console: Console
    num_at_once: int = 1
    use_ray: bool = False
    stopped: Callable[[], bool] = field(default=lambda: False)

    def run(self, cells: Sequence[Cell], title: str) -> list[Outcome]:
        """Runs what is not finished, and measures everything that is."""
        states = [cell.state() for cell in cells]
        todo = [(cell, state) for cell, state in zip(cells, states, strict=True) if state != "finished"]
        if len(todo) < len(cells):
            self.console.note(f"{title}: {len(cells) - len(todo)} of {len(cells)} are finished already")
        ended: dict[str, Ended] = {}
        if todo and not self.stopped():
            jobs = [Job(config.dump(cell.recipe), state == "started", str(cell.log)) for cell, state in todo]
            for job in jobs:
                prepare(job)
            run = run_on_ray if self.use_ray else run_processes
            with self.console.progress(title, len(todo)) as advance:
                for item in run(jobs, self.num_at_once, self.stopped):
                    cell = todo[item.index][0]
                    ended[str(cell.path)] = item
                    self._tell(cell, item)
                    advance(1)
        return [_outcome(cell, ended.get(str(cell.path))) for cell in cells]

    def _tell(self, cell: Cell, ended: Ended) -> None:
        if ended.error is None:
            measured = measure(cell)
            found = (
                "" if measured.final is None else f": {measured.metric} {quantity('accuracy', measured.final.value)}"
            )
            self.console.note(f"{cell.name}{found}")
        elif not ended.stopped:
            self.console.warn(f"{cell.name} failed: {ended.error} (log: {cell.log})")


def compare(cells: Cells, runner: Runner, *, command: str = "") -> Comparison:
    """Makes every run that is not finished. Raises RecipeError, DataError or VocabularyError before any of them starts."""
    if runner.use_ray:
        check_ray()
    cells.check()
    with StopSignal() as signal:
        runner.stopped = lambda: signal.received
        tuning = runner.run(cells.tuning, "tuning runs") if cells.tuning else []
        tuned = choose(cells, tuning)
        compared = cells.compared(tuned)
        warning = budget_warning(budgets(compared))
        if warning:
            runner.console.warn(warning)
        outcomes = runner.run(compared, "runs") if compared else []
    return summarise(cells, outcomes, tuning, tuned, command)


def choose(cells: Cells, tuning: Sequence[Outcome]) -> dict[Combination, dict[str, Any]]:
    """The tuned values with the highest final avg@k, the first among equals; a combination without any is left out.

    Runs that have not ended leave their combination open, so that a comparison that goes on chooses among all.
    """
    if not cells.grid.tune:
        return {combination: {} for combination in cells.grid.combinations()}
    chosen = {}
    for combination in cells.grid.combinations():
        mine = [outcome for outcome in tuning if outcome.cell.combination == combination]
        graded = [(score, outcome) for outcome in mine if (score := tuning_score(outcome)) is not None]
        if graded and all(outcome.status != "not run" for outcome in mine):
            chosen[combination] = dict(max(graded, key=lambda pair: pair[0])[1].cell.tuned)
    return chosen


def tuning_score(outcome: Outcome) -> float | None:
    """The final avg@k on the validation split. Raises RecipeError if it is of another split."""
    measured = outcome.measured
    if measured is None or measured.final is None:
        return None
    if measured.split != "validation":
        raise RecipeError(f"the tuning run {outcome.cell.path} was evaluated on {measured.split!r}, not on validation")
    return measured.final.value


def summarise(
    cells: Cells,
    outcomes: Sequence[Outcome],
    tuning: Sequence[Outcome],
    tuned: Mapping[Combination, Mapping[str, Any]],
    command: str = "",
) -> Comparison:
    """The table of runs, whatever their order."""
    measured: dict[Combination, dict[int, Measured]] = {}
    failed: dict[Combination, int] = {}
    for outcome in outcomes:
        combination = outcome.cell.combination
        if outcome.measured is not None:
            measured.setdefault(combination, {})[outcome.cell.recipe.seed] = outcome.measured
        failed[combination] = failed.get(combination, 0) + (outcome.status == "failed")
    grid = cells.grid
    found = rows(grid, measured, failed, tuned)
    shown = table(grid, found, caption(grid, found, budgets(outcome.cell for outcome in outcomes)))
    return Comparison(cells, outcomes, tuning, tuned, shown, command)


def _outcome(cell: Cell, ended: Ended | None) -> Outcome:
    if ended is not None and ended.error is not None:
        return Outcome(cell, "not run" if ended.stopped else "failed", None if ended.stopped else ended.error)
    if cell.state() != "finished":
        return Outcome(cell, "not run")
    return Outcome(cell, "finished", measured=measure(cell))


def default_out(base: Mapping[str, Any]) -> Path:
    """Beside the recipe's own run directory."""
    return Path(f"{base['run_dir']}-compare")
