"""`compare`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy import config
from understudy.cli.commands import quieten_libraries
from understudy.compare.cells import Cells, budgets
from understudy.compare.grid import Grid, read_grid
from understudy.compare.on_ray import check_ray
from understudy.compare.outputs import write_outputs
from understudy.compare.run import Ending, Runner, default_out
from understudy.compare.run import compare as make
from understudy.compare.table import Table, budget_warning
from understudy.format import number
from understudy.trainer.console import Console


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line says beside the recipe."""

    vary: Sequence[str] = ()
    grid: Path | None = None
    seeds: int | None = None
    tune: Sequence[str] = ()
    target: float | None = None
    baseline: Sequence[str] = ()
    out: Path | None = None
    jobs: int = 1
    ray: bool = False
    dry_run: bool = False


def compare(path: Path, overrides: Sequence[str], asked: Asked) -> Ending:
    """How the comparison ended. Raises RecipeError, DataError or VocabularyError before a run starts."""
    base = config.override(config.read_yaml(path), overrides)
    base.setdefault("run_dir", f"runs/{path.stem}")
    cells = Cells(_grid(base, asked), base, asked.out or default_out(base))
    quieten_libraries()
    with Console() as console:
        if asked.dry_run:
            _describe(cells, asked, console)
            return "finished"
        runner = Runner(console, asked.jobs, asked.ray)
        found = make(cells, runner, command=shlex.join(["understudy", *sys.argv[1:]]), save=write_outputs)
        page = write_outputs(found)
        _show(found.table, cells.grid, console)
        if found.ending != "finished":
            console.warn(f"{_unfinished(found.ending)}; the same command goes on with what is missing")
        console.note(f"page     {page}")
    return found.ending


def _grid(base: Mapping[str, Any], asked: Asked) -> Grid:
    changes = {"seeds": asked.seeds, "target": asked.target}
    return read_grid(asked.grid, base, vary=asked.vary, tune=asked.tune, baseline=asked.baseline, changes=changes)


def _describe(cells: Cells, asked: Asked, console: Console) -> None:
    """What would be run."""
    if asked.ray:
        check_ray()
    cells.check()
    planned = cells.compared({combination: cells.grid.tunings()[0] for combination in cells.grid.combinations()})
    rows = []
    for combination, tokens in budgets(planned).items():
        dropped = next(cell.dropped for cell in planned if cell.combination == combination)
        rows.append([combination.name, number(tokens), " and ".join(dropped)])
    console.table("combinations", ["labels", "token budget", "left out, as the method has no use for it"], rows)
    warning = budget_warning(budgets(planned))
    if warning:
        console.warn(warning)
    tuning = f"{len(cells.tuning)} tuning runs, then " if cells.tuning else ""
    console.note(f"{tuning}{len(planned)} runs into {cells.out}; nothing was run or written")


def _show(table: Table, grid: Grid, console: Console) -> None:
    """The columns that fit a terminal; the rest is on the page."""
    num_labels = max(1, len(grid.vary)) + len(grid.tune)
    shown = [index for index, name in enumerate(table.columns) if index < num_labels + 2 or name.startswith("samples")]
    shown.append(len(table.columns) - 1)
    columns = [table.columns[index] for index in shown]
    console.table("comparison", columns, [[texts[index] for index in shown] for texts in table.texts])
    for line in table.caption:
        console.note(line)


def _unfinished(ending: Ending) -> str:
    return "runs failed" if ending == "failed" else ending
