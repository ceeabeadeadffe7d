"""The files of a comparison: table.md, cells.csv, compare.json and compare.html."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

from understudy.compare.cells import Cell, budgets
from understudy.compare.page import page
from understudy.compare.run import Comparison, Outcome, tuning_score
from understudy.compare.table import NOT_REACHED, Row, estimate_json, markdown
from understudy.files import write_atomically, write_json
from understudy.format import MISSING, Interval
from understudy.text import without_secrets

NUMBERS = ("steps", "samples", "greedy", "tokens_per_s", "peak_memory_gib", "grad_norm", "entropy_at_end")


def write_outputs(comparison: Comparison) -> Path:
    """Writes them all; the page's path. Raises CheckpointError where a file cannot be written."""
    out = comparison.cells.out
    write_atomically(out / "table.md", markdown(comparison.table, comparison.unfinished))
    write_atomically(out / "cells.csv", cells_csv(comparison))
    write_json(out / "compare.json", to_json(comparison))
    write_atomically(out / "compare.html", page(comparison))
    return out / "compare.html"


def cells_csv(comparison: Comparison) -> str:
    """One row a run; "not recorded" and "not reached" are written out, a run that failed has neither."""
    grid = comparison.cells.grid
    columns = [*grid.vary, "seed", *(f"tuned {key}" for key in grid.tune), "status", "avg@k", "low", "high", "metric"]
    columns += [*NUMBERS, "samples_to_target", "run_dir", "log", "error"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(_csv_row(outcome, grid.target) for outcome in comparison.outcomes)
    return text.getvalue()


def _csv_row(outcome: Outcome, target: float | None) -> list[object]:
    cell, run = outcome.cell, outcome.measured
    first = [*(label for _, label in cell.combination.labels), cell.recipe.seed, *cell.tuned.values(), outcome.status]
    last = [cell.path, cell.log, outcome.error or ""]
    if run is None:
        return [*first, *([""] * (5 + len(NUMBERS))), *last]
    final = run.final or Interval(None)
    numbers = [final.value, final.low, final.high, run.metric, *(getattr(run, name) for name in NUMBERS)]
    reached: object = run.samples_until(target) if target is not None and len(run.accuracy.steps) else MISSING
    known = [MISSING if value is None else value for value in numbers]
    return [*first, *known, NOT_REACHED if reached is None else reached, *last]


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Everything in numbers; null: not recorded."""
    cells = comparison.cells
    return {
        "status": comparison.status,
        "unfinished": comparison.unfinished,
        "command": without_secrets(comparison.command),
        "grid": cells.grid.to_json(),
        "recipe": dict(cells.base),
        "caption": list(comparison.table.caption),
        "budget_tokens": [
            {"labels": dict(combination.labels), "tokens": tokens}
            for combination, tokens in budgets(outcome.cell for outcome in comparison.outcomes).items()
        ],
        "rows": [_row_json(row) for row in comparison.table.rows],
        "cells": [_outcome_json(outcome) | {"seed": outcome.cell.recipe.seed} for outcome in comparison.outcomes],
        "tuning": [_outcome_json(outcome) | {"avg@k": tuning_score(outcome)} for outcome in comparison.tuning],
    }


def _row_json(row: Row) -> dict[str, Any]:
    estimates = {"accuracy": estimate_json(row.accuracy), "difference": estimate_json(row.difference)}
    rest = {key: value for key, value in asdict(row).items() if key not in ("combination", "accuracy", "difference")}
    return {"labels": dict(row.combination.labels)} | estimates | rest


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    cell: Cell = outcome.cell
    values: dict[str, Any] = {
        "labels": dict(cell.combination.labels),
        "tuned": dict(cell.tuned),
        "status": outcome.status,
        "error": outcome.error,
        "run_dir": str(cell.path),
        "log": str(cell.log),
        "left_out": list(cell.dropped),
    }
    run = outcome.measured
    if run is None:
        return values
    final = run.final or Interval(None)
    return values | {"metric": run.metric, "final": asdict(final)} | {name: getattr(run, name) for name in NUMBERS}
