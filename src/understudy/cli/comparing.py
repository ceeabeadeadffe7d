"""The command `compare`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from understudy import config
from understudy.cli.commands import quieten_libraries
from understudy.compare.cells import Cells, budgets
from understudy.compare.grid import Grid
from understudy.compare.outputs import write_outputs
from understudy.compare.processes import check_ray
from understudy.compare.run import Comparison, Ending, Runner
from understudy.compare.run import compare as make
from understudy.compare.table import budget_warning
from understudy.format import number
from understudy.trainer.console import Console


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
    quieten_libraries()
    with Console() as console:
        if dry_run:
            if ray:
                check_ray()
            cells.check()
            _show_plan(cells, console)
            return "finished"
        command = shlex.join(["understudy", *sys.argv[1:]])
        found = make(cells, Runner(console, jobs, ray), command=command, save=write_outputs)
        page = write_outputs(found)
        _show_table(found, console)
        if found.ending != "finished":
            reason = "runs failed" if found.ending == "failed" else found.ending
            console.warn(f"{reason}; the same command continues with what is missing")
        console.note(f"page     {page}")
    return found.ending


def _show_plan(cells: Cells, console: Console) -> None:
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


def _show_table(found: Comparison, console: Console) -> None:
    """The columns that fit a terminal; the rest is on the page."""
    table, grid = found.table, found.cells.grid
    num_first = max(1, len(grid.vary)) + len(grid.tune) + 2
    last = len(table.columns) - 1
    shown = [at for at, name in enumerate(table.columns) if at < num_first or at == last or name.startswith("samples")]
    columns = [table.columns[at] for at in shown]
    console.table("comparison", columns, [[texts[at] for at in shown] for texts in table.texts])
    for line in table.caption:
        console.note(line)
