"""compare.html: the table, its curves and everything needed to make it again, in one file that works offline.

Charts, styles and the script are those of a run's report; the axis counts training samples, which methods share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from understudy.compare.measure import Measured
from understudy.compare.run import Comparison, Outcome, tuning_score
from understudy.config import write_yaml
from understudy.files import write_atomically
from understudy.format import quantity
from understudy.report.chart import Chart, Line
from understudy.report.charts import Figure, figure
from understudy.report.page import csp_hash, finalize
from understudy.report.read import Series
from understudy.text import encodable, without_secrets

MAX_LINES = 8
"""In one chart: as many as there are colours. More combinations are drawn in further charts."""
OVER = "training sample"
BAND = "Line: mean over seeds, as far as every seed went. Band: lowest to highest seed."


@dataclass(frozen=True)
class Page:
    """Everything that the template shows, as text."""

    title: str
    alert: tuple[str, str] | None
    chips: Sequence[tuple[str, str]]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: Sequence[str]
    charts: Sequence[Figure]
    missing: Sequence[str]
    tune_seed: int
    tuning_columns: Sequence[str]
    tuning: Sequence[Sequence[str]]
    failed: Sequence[Sequence[str]]
    command: str
    left_out: str
    grid: str
    recipe: str


def write_page(comparison: Comparison, path: Path) -> Path:
    """Writes the page and returns its path. Raises CheckpointError if it cannot be written."""
    write_atomically(path, render(build_page(comparison)))
    return path


def build_page(comparison: Comparison) -> Page:
    """What the page says."""
    cells = comparison.cells
    charts, missing = _charts(comparison)
    columns, tuning = tuning_rows(comparison)
    everything = [*comparison.tuning, *comparison.outcomes]
    failed = [outcome for outcome in everything if outcome.status == "failed"]
    finished = sum(outcome.status == "finished" for outcome in comparison.outcomes)
    return Page(
        title=cells.out.resolve().name,
        alert=_alert(len(failed), comparison.unfinished),
        chips=[("runs", f"{finished} of {len(comparison.outcomes)} finished"), ("seeds", str(cells.grid.seeds))],
        columns=comparison.table.columns,
        rows=comparison.table.texts,
        caption=comparison.table.caption,
        charts=charts,
        missing=missing,
        tune_seed=cells.grid.tune_seed,
        tuning_columns=columns,
        tuning=tuning,
        failed=[(outcome.cell.name, outcome.error or "", str(outcome.cell.log)) for outcome in failed],
        command=without_secrets(comparison.command),
        left_out=_left_out(comparison.outcomes),
        grid=without_secrets(write_yaml(cells.grid.to_json())),
        recipe=without_secrets(write_yaml(cells.base)),
    )


def render(page: Page) -> str:
    """The page as HTML. Scripts and styles other than its own are forbidden by hash, network by default-src."""
    report, here = files("understudy.report"), files("understudy.compare")
    style = "\n".join(folder.joinpath("page.css").read_text(encoding="utf-8") for folder in (report, here))
    script = report.joinpath("page.js").read_text(encoding="utf-8")
    sources = f"style-src {csp_hash(style)}; script-src {csp_hash(script)}"
    policy = f"default-src 'none'; {sources}; base-uri 'none'; form-action 'none'"
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=finalize
    )
    template = environment.from_string(here.joinpath("page.html").read_text(encoding="utf-8"))
    html = template.render(page=page, policy=policy, style=Markup(style), script=Markup(script))  # noqa: S704 our own files
    return encodable(html)


def tuning_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of tuning runs."""
    grid, found = comparison.cells.grid, []
    for outcome in comparison.tuning:
        cell = outcome.cell
        score = quantity("accuracy", tuning_score(outcome)) if outcome.status == "finished" else outcome.status
        chosen = "yes" if comparison.tuned.get(cell.combination) == dict(cell.tuned) else ""
        labels = [label for _, label in cell.combination.labels] or [cell.combination.name]
        found.append([*labels, *map(str, cell.tuned.values()), score, chosen])
    return [*(list(grid.vary) or ["recipe"]), *grid.tune, "avg@k on validation", "chosen"], found


def _charts(comparison: Comparison) -> tuple[list[Figure], list[str]]:
    """The figures, and the titles of those that no run recorded."""
    runs: dict[str, list[Measured]] = {row.combination.name: [] for row in comparison.table.rows}
    for outcome in comparison.outcomes:
        if outcome.measured is not None:
            runs[outcome.cell.combination.name].append(outcome.measured)
    found, missing = [], []
    for chart, read in _KINDS:
        lines = [line for name, seeds in runs.items() if (line := mean_line(name, [read(run) for run in seeds]))]
        parts = [lines[start : start + MAX_LINES] for start in range(0, len(lines), MAX_LINES)]
        for index, part in enumerate(parts, 1):
            title = chart.title if len(parts) == 1 else f"{chart.title} ({index} of {len(parts)})"
            found.append(figure(replace(chart, title=title, lines=part, note=BAND)))
        if not lines:
            missing.append(chart.title.lower())
    return found, missing


def mean_line(name: str, seeds: Sequence[Series | None]) -> Line | None:
    """Mean, lowest and highest over seeds, where every seed has a finite value; None where there is no such point."""
    points = [
        {at: value for at, value in zip(item.steps.tolist(), item.values.tolist(), strict=True) if np.isfinite(value)}
        for item in seeds
        if item is not None
    ]
    common = sorted(set.intersection(*map(set, points))) if points else []
    if not common:
        return None
    values = np.array([[seed[at] for at in common] for seed in points], dtype=np.float64)
    line = Series(np.array(common, dtype=np.int64), values.mean(axis=0))
    return Line(name, line, values.min(axis=0), values.max(axis=0)) if len(points) > 1 else Line(name, line)


def _accuracy(run: Measured) -> Series:
    return run.accuracy


def _curve(name: str, run: Measured) -> Series | None:
    return run.curves.get(name)


_KINDS: Sequence[tuple[Chart, Callable[[Measured], Series | None]]] = (
    (Chart("Accuracy", "held-out avg@k", (), percent=True, over=OVER), _accuracy),
    (Chart("Gradient norm", "2-norm, before clipping", (), over=OVER), partial(_curve, "grad_norm")),
    (Chart("Entropy", "of the student, nats per token", (), over=OVER), partial(_curve, "student_entropy")),
)


def _alert(num_failed: int, unfinished: str) -> tuple[str, str] | None:
    failed = f"{num_failed} {'run' if num_failed == 1 else 'runs'} failed." if num_failed else ""
    if unfinished:
        return unfinished, failed
    return (failed, "They are listed below; the same command tries them again.") if failed else None


def _left_out(outcomes: Sequence[Outcome]) -> str:
    found: Mapping[str, str] = {
        outcome.cell.combination.name: " and ".join(outcome.cell.dropped)
        for outcome in outcomes
        if outcome.cell.dropped
    }
    if not found:
        return ""
    listed = "; ".join(f"{name}: {sections}" for name, sections in found.items())
    return f"Sections of the recipe that a method has no use for were left out. {listed}."
