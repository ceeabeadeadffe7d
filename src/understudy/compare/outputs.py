"""The files of a comparison: table.md, cells.csv, compare.json and compare.html, which shares its frame with a run's report."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from understudy.compare.cells import Cell, budgets
from understudy.compare.run import Comparison, tuning_score
from understudy.compare.table import NOT_REACHED, UNLEARNT, Measured, Outcome, markdown, samples_to_target
from understudy.config import dump, write_yaml
from understudy.files import write_atomically, write_json
from understudy.format import MISSING, Interval, quantity
from understudy.report.page import render
from understudy.report.read import Series
from understudy.report.svg import MAX_LINES, Chart, Line
from understudy.report.tokens import Place, find_tokens, viewer
from understudy.text import plain_tree, printable

NUMBERS = ("steps", "samples", "greedy", "tokens_per_s", "peak_memory_gib", "grad_norm", "entropy_at_end")
BAND = "Line: mean over seeds, as far as every seed went. Band: lowest to highest seed."
_CHARTS = {
    "accuracy": Chart("Accuracy", "held-out avg@k", (), percent=True, over="training sample"),
    "grad_norm": Chart("Gradient norm", "2-norm, before clipping", (), over="training sample"),
    "student_entropy": Chart("Entropy", "of the student, nats per token", (), over="training sample"),
}
"""By the name of the curve."""


def write_outputs(comparison: Comparison) -> Path:
    """Writes all files and returns the page's path. Raises CheckpointError where a file cannot be written."""
    out = comparison.cells.out
    write_atomically(out / "table.md", printable(markdown(comparison.table, comparison.unfinished)))
    write_atomically(out / "cells.csv", printable(cells_csv(comparison)))
    write_json(out / "compare.json", {name: plain_tree(value, name) for name, value in to_json(comparison).items()})
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
    for outcome in comparison.outcomes:
        cell, run = outcome.cell, outcome.measured
        row = [*(label for _, label in cell.combination.labels), cell.recipe.seed, *cell.tuned.values()]
        row.append(UNLEARNT if run is not None and run.unlearnt else outcome.status)
        numbers: list[object] = [""] * (5 + len(NUMBERS))
        if run is not None:
            final = run.final or Interval(None)
            numbers = [final.value, final.low, final.high, run.metric, *(getattr(run, name) for name in NUMBERS)]
            reached = None if grid.target is None else samples_to_target({0: run}, grid.target)
            numbers.append(reached and (NOT_REACHED if reached.median is None else reached.median))
            numbers = [MISSING if value is None else value for value in numbers]
        why = outcome.error or (run.unlearnt if run is not None else "")
        writer.writerow([*row, *numbers, cell.path, cell.log, why])
    return text.getvalue()


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Everything in numbers; null: not recorded."""
    cells = comparison.cells
    rows = []
    for row in comparison.table.rows:
        values = asdict(row) | {"labels": dict(row.combination.labels)}
        del values["combination"]
        for name in ("accuracy", "difference"):
            if values[name] is not None:
                del values[name]["num_problems"]
        rows.append(values)
    return {
        "status": "running" if comparison.running else comparison.ending,
        "unfinished": comparison.unfinished,
        "command": comparison.command,
        "grid": dump(cells.grid),
        "recipe": dict(cells.base),
        "caption": list(comparison.table.caption),
        "budget_tokens": [
            {"labels": dict(combination.labels), "tokens": tokens}
            for combination, tokens in budgets(outcome.cell for outcome in comparison.outcomes).items()
        ],
        "rows": rows,
        "cells": [_outcome_json(outcome) | {"seed": outcome.cell.recipe.seed} for outcome in comparison.outcomes],
        "tuning": [_outcome_json(outcome) | {"avg@k": tuning_score(outcome)} for outcome in comparison.tuning],
    }


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    cell, run = outcome.cell, outcome.measured
    values = {
        "labels": dict(cell.combination.labels),
        "tuned": dict(cell.tuned),
        "status": outcome.status,
        "error": outcome.error,
        "run_dir": str(cell.path),
        "log": str(cell.log),
        "left_out": list(cell.dropped),
    }
    if run is not None:
        values |= {"metric": run.metric, "final": asdict(run.final or Interval(None))}
        values |= {name: getattr(run, name) for name in (*NUMBERS, "unlearnt")}
    return values


def page(comparison: Comparison) -> str:
    return render("compare/page.html", kind="compare", **page_values(comparison))


def page_values(comparison: Comparison) -> dict[str, Any]:
    """Everything that the template shows."""
    cells, outcomes = comparison.cells, comparison.outcomes
    drawn, missing = _charts(comparison)
    failed = [outcome for outcome in (*comparison.tuning, *outcomes) if outcome.status == "failed"]
    left_out = {item.cell.combination.name: " and ".join(item.cell.dropped) for item in outcomes if item.cell.dropped}
    return {
        "title": cells.out.resolve().name,
        "unfinished": comparison.unfinished,
        "finished": sum(outcome.status == "finished" for outcome in outcomes),
        "unlearnt": sum(row.num_unlearnt for row in comparison.table.rows),
        "num_runs": len(outcomes),
        "result": comparison.table,
        "drawn": drawn,
        "kept": None if comparison.running else viewer(_places(comparison)),
        "missing": missing,
        "grid": cells.grid,
        "tuning": _tuning_rows(comparison),
        "failed": [(outcome.cell.name, outcome.error or "", str(outcome.cell.log)) for outcome in failed],
        "command": comparison.command,
        "left_out": left_out,
        "grid_yaml": write_yaml(plain_tree(dump(cells.grid))),
        "recipe": write_yaml(plain_tree(cells.base)),
    }


def _places(comparison: Comparison) -> list[Place]:
    """Kept tokens of the first finished seed of each combination."""
    first: dict[str, Cell] = {}
    for outcome in comparison.outcomes:
        if outcome.status == "finished":
            first.setdefault(outcome.cell.combination.name, outcome.cell)
    return [place for name, cell in first.items() for place in find_tokens(cell.path, name)]


def _tuning_rows(comparison: Comparison) -> list[list[str]]:
    rows = []
    for outcome in comparison.tuning:
        cell = outcome.cell
        score = quantity("accuracy", tuning_score(outcome)) if outcome.status == "finished" else outcome.status
        score += f", {UNLEARNT}" if outcome.measured is not None and outcome.measured.unlearnt else ""
        chosen = "yes" if comparison.tuned.get(cell.combination) == dict(cell.tuned) else ""
        labels = [label for _, label in cell.combination.labels] or [cell.combination.name]
        rows.append([*labels, *map(str, cell.tuned.values()), score, chosen])
    return rows


def _charts(comparison: Comparison) -> tuple[list[Chart], list[str]]:
    """The charts, and the titles of those that no run recorded."""
    runs: dict[str, list[Measured]] = {row.combination.name: [] for row in comparison.table.rows}
    for outcome in comparison.outcomes:
        if outcome.measured is not None:
            runs[outcome.cell.combination.name].append(outcome.measured)
    found, missing = [], []
    for key, chart in _CHARTS.items():
        curves = {name: [run.curves[key] for run in seeds if key in run.curves] for name, seeds in runs.items()}
        lines = [line for name, seeds in curves.items() if seeds and (line := _mean_line(name, seeds))]
        if not lines:
            missing.append(chart.title.lower())
        parts = [lines[start : start + MAX_LINES] for start in range(0, len(lines), MAX_LINES)]
        for index, part in enumerate(parts, 1):
            title = chart.title if len(parts) == 1 else f"{chart.title} ({index} of {len(parts)})"
            found.append(replace(chart, title=title, lines=part, note=BAND))
    return found, missing


def _mean_line(name: str, seeds: Sequence[Series]) -> Line | None:
    """Mean, lowest and highest over seeds, where every seed has a finite value; None where there is no such point."""
    known = [series.at(np.isfinite(series.values)) for series in seeds]
    common = reduce(np.intersect1d, [series.steps for series in known])
    values = np.array([series.values[np.isin(series.steps, common)] for series in known])
    if not len(common):
        return None
    line = Series(common, values.mean(axis=0))
    name = printable(name)
    return Line(name, line, values.min(axis=0), values.max(axis=0)) if len(known) > 1 else Line(name, line)
