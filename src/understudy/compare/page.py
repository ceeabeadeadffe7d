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
from understudy.report.page import _finalize, _hash
from understudy.report.read import Series
from understudy.text import encodable, without_secrets

MAX_LINES = 8
"""In one chart: as many as there are colours. More combinations are drawn in further charts."""
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
    waiting = sum(outcome.status == "not run" for outcome in everything)
    finished = sum(outcome.status == "finished" for outcome in comparison.outcomes)
    return Page(
        title=cells.out.resolve().name,
        alert=_alert(len(failed), waiting),
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
    script = over_samples(report.joinpath("page.js").read_text(encoding="utf-8"))
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_finalize
    )
    template = environment.from_string(here.joinpath("page.html").read_text(encoding="utf-8"))
    html = template.render(page=page, policy=policy, style=Markup(style), script=Markup(script))  # noqa: S704 our own files
    return encodable(html)


def over_samples(text: str) -> str:
    """A chart, its words or the script, counting samples where a run's report counts optimizer steps."""
    for old, new in (
        ("over optimizer steps", "over training samples"),
        (">optimizer step<", ">training samples<"),
        ("`step ${", "`sample ${"),
        (" at step ", " at sample "),
    ):
        text = text.replace(old, new)
    return text


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
            drawn = figure(replace(chart, title=title, lines=part, note=BAND))
            words = [over_samples(text) for text in drawn.summary]
            # what is drawn has its names escaped already; as plain text, or the exchanged words would be escaped too
            found.append(replace(drawn, svg=Markup(over_samples(str(drawn.svg))), summary=words))  # noqa: S704
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
    (Chart("Accuracy", "held-out avg@k", (), percent=True), _accuracy),
    (Chart("Gradient norm", "2-norm, before clipping", ()), partial(_curve, "grad_norm")),
    (Chart("Entropy", "of the student, nats per token", ()), partial(_curve, "student_entropy")),
)


def _alert(num_failed: int, num_waiting: int) -> tuple[str, str] | None:
    if num_failed:
        return f"{num_failed} runs failed.", "They are listed below; the same command tries them again."
    if num_waiting:
        return f"{num_waiting} runs are still to be made.", "The same command goes on."
    return None


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
