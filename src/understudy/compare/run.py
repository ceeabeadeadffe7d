"""A comparison from its grid to its table: check, tune, run, measure, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from understudy import config
from understudy.compare.cells import Cell, Cells, budgets
from understudy.compare.grid import Combination
from understudy.compare.processes import Job, check_ray, run_on_ray, run_processes
from understudy.compare.table import Outcome, Table, budget_warning, make_table, measure
from understudy.errors import RecipeError, UnderstudyError
from understudy.files import write_atomically
from understudy.format import count, quantity
from understudy.trainer.console import Console
from understudy.trainer.signals import StopSignal

Ending = Literal["finished", "failed", "stopped by a signal"]
SAVE_EVERY_S = 60.0
"""Seconds between writes of outputs while runs are in progress."""


@dataclass(frozen=True)
class Comparison:
    """Everything that the outputs show."""

    cells: Cells
    outcomes: Sequence[Outcome]
    tuning: Sequence[Outcome]
    tuned: Mapping[Combination, Mapping[str, Any]]
    command: str = ""
    running: bool = False
    """Whether runs are still in progress."""

    @cached_property
    def table(self) -> Table:
        """The same whatever the order of the runs."""
        return make_table(self.cells.grid, self.outcomes, self.tuned)

    @property
    def ending(self) -> Ending:
        """Failed if any run did; stopped if any was not run otherwise."""
        statuses = {outcome.status for outcome in (*self.tuning, *self.outcomes)}
        if "failed" in statuses:
            return "failed"
        return "stopped by a signal" if "not run" in statuses else "finished"

    @property
    def unfinished(self) -> str:
        """Describes how many runs remain; empty if none."""
        if not self.running and all(outcome.status != "not run" for outcome in (*self.tuning, *self.outcomes)):
            return ""
        grid = self.cells.grid
        num_ended, num_tuned = (sum(o.status != "not run" for o in found) for found in (self.outcomes, self.tuning))
        ended = f"{num_ended} of {count(len(grid.combinations()) * grid.seeds, 'run')}"
        if grid.tune:
            ended = f"{num_tuned} of {count(len(self.cells.tuning), 'tuning run')} and {ended}"
        when = "This was written while it ran; if it no longer runs, the" if self.running else "The"
        return f"Unfinished: {ended} have ended. {when} same command continues it."


@dataclass
class Runner:
    """Makes runs. `stopped` says whether a signal came."""

    console: Console
    num_at_once: int = 1
    use_ray: bool = False
    stopped: Callable[[], bool] = field(default=lambda: False)

    def run(self, cells: Sequence[Cell], title: str, on_end: Callable[[list[Outcome]], None]) -> list[Outcome]:
        """Runs every unfinished cell and measures every finished one, once. `on_end` gets all outcomes after each run."""
        states = [cell.state() for cell in cells]
        found = [
            Outcome(cell, "finished", measured=measure(cell)) if state == "finished" else Outcome(cell, "not run")
            for cell, state in zip(cells, states, strict=True)
        ]
        todo = [index for index, state in enumerate(states) if state != "finished"]
        if len(todo) < len(cells):
            self.console.note(f"{title}: {len(cells) - len(todo)} of {len(cells)} are finished already")
        if not todo or self.stopped():
            return found
        jobs = [Job(config.dump(cells[at].recipe), states[at] == "started", str(cells[at].log)) for at in todo]
        for job in jobs:
            if not job.resume:  # a resumed run writes on
                write_atomically(Path(job.log), "")
        run = run_on_ray if self.use_ray else run_processes
        with self.console.progress(title, len(todo)) as advance:
            for ended in run(jobs, self.num_at_once, self.stopped):
                at = todo[ended.index]
                cell = cells[at]
                if ended.error is not None and not ended.stopped:
                    found[at] = Outcome(cell, "failed", ended.error)
                    self.console.warn(f"{cell.name} failed: {ended.error} (log: {cell.log})")
                elif ended.error is None and cell.state() == "finished":
                    measured = measure(cell)
                    found[at] = Outcome(cell, "finished", measured=measured)
                    value = measured.final and f": {measured.metric} {quantity('accuracy', measured.final.value)}"
                    self.console.note(f"{cell.name}{value or ''}")
                    if measured.unlearnt:
                        self.console.warn(f"{cell.name}: {measured.unlearnt}")
                advance(1)
                on_end(list(found))
        return found


@dataclass
class Drafts:
    """Saves a comparison periodically during its runs, so that results survive a crash of the machine."""

    save: Callable[[Comparison], object]
    console: Console
    clock: Callable[[], float] = time.monotonic
    _last: float | None = None

    def __call__(self, make: Callable[[], Comparison]) -> None:
        """Does nothing within `SAVE_EVERY_S` of the last time. A draft that cannot be written warns and stops no run."""
        if self._last is not None and self.clock() - self._last < SAVE_EVERY_S:
            return
        try:
            self.save(make())
        except UnderstudyError as error:
            self.console.warn(f"the outputs so far were not written: {error}")
        self._last = self.clock()


def compare(
    cells: Cells, runner: Runner, *, command: str = "", save: Callable[[Comparison], object] = lambda _: None
) -> Comparison:
    """Makes every run that is not finished; `save` gets what is known so far, once a minute at most.

    Raises RecipeError, DataError or VocabularyError before any of them starts.
    """
    if runner.use_ray:
        check_ray()
    cells.check()
    with StopSignal() as signal:
        runner.stopped = lambda: signal.received
        drafts = Drafts(save, runner.console)
        tuning = runner.run(
            cells.tuning,
            "tuning runs",
            lambda found: drafts(lambda: Comparison(cells, (), found, choose(cells, found), command, running=True)),
        )
        tuned = choose(cells, tuning)
        compared = cells.compared(tuned)
        warning = budget_warning(budgets(compared))
        if warning:
            runner.console.warn(warning)
        outcomes = runner.run(
            compared,
            "runs",
            lambda found: drafts(lambda: Comparison(cells, found, tuning, tuned, command, running=True)),
        )
    return Comparison(cells, outcomes, tuning, tuned, command)


def choose(cells: Cells, tuning: Sequence[Outcome]) -> dict[Combination, dict[str, Any]]:
    """The tuned values with the highest final avg@k, the first among equals; a combination without any is left out.

    A combination with runs that have not ended stays open, so that a comparison that is continued chooses among all.
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
