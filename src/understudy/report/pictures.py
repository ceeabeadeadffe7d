"""Pictures of a whole run from `pictures.jsonl`: log T - log S as a heat map over steps, and numbers by where in the response a
token stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from understudy.format import number
from understudy.report.read import MAX_NAME_CHARS, Series
from understudy.report.svg import BOTTOM, HEIGHT, LEFT, MAX_LINES, RIGHT, TOP, WIDTH, Chart, Line
from understudy.report.tokens import FLAGS
from understudy.text import printable

LOG_RATIO_EDGES = (-10.0, -3.0, -1.0, -0.3, -0.1, -0.03, -0.01, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Nats. Between them and beyond the outer ones lie the bins of log T - log S."""
MAX_COLUMNS = 60
SHADES = (0.02, 0.06, 0.15, 0.3)
"""Shares of a column's tokens from which a cell is darker."""
_FLAG_TITLES = {
    "outliers": "Outliers",
    "trusted": "Trusted tokens",
    "kept": "Kept tokens",
    "gated": "Gated tokens",
    "uncertain": "Uncertain teacher",
}


@dataclass(frozen=True, eq=False)
class Heat:
    """Shares of a step's tokens in the bins of log T - log S."""

    title: str
    steps: NDArray[np.int64]
    """[N] the last step of each column."""
    shares: NDArray[np.float64]
    """[bins, N], each column sums to 1."""

    @property
    def text(self) -> str:
        """The last column in words."""
        near, below, above = (
            float(self.shares[rows, -1].sum()) for rows in (slice(5, 10), slice(0, 3), slice(12, None))
        )
        return (
            f"At step {int(self.steps[-1]):,}: {100 * near:.0f} % of the tokens within \u00b10.1 nats, "
            f"{100 * below:.1f} % below \u22121, {100 * above:.1f} % above 1."
        )

    def draw(self) -> Markup:
        """The map as one `<svg>`."""
        num_rows, num_columns = self.shares.shape
        width, height = (RIGHT - LEFT) / num_columns, (BOTTOM - TOP) / num_rows
        out = [
            f'<svg class="heat" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{self.title}. {self.text}")}">'
        ]
        shade = np.digitize(self.shares, SHADES)
        for level in range(1, len(SHADES) + 1):
            rows, columns = np.nonzero(shade == level)
            cells = "".join(
                f"M{LEFT + width * x:.1f} {BOTTOM - height * (y + 1):.1f}h{width:.2f}v{height:.2f}h-{width:.2f}z"
                for y, x in zip(rows.tolist(), columns.tolist(), strict=True)
            )
            out.append(f'<path class="h{level}" d="{cells}"/>')
        named = {at: number(edge) for at, edge in enumerate(LOG_RATIO_EDGES, 1) if abs(edge) in (10.0, 1.0, 0.1)}
        for at, text in {**named, num_rows / 2: "0"}.items():
            y = BOTTOM - height * at + 3.5
            text = text.replace("-", "\u2212")
            out.append(f'<text class="tick" x="{LEFT - 6}" y="{y:.1f}" text-anchor="end">{text}</text>')
        for at in sorted({0, num_columns // 2, num_columns - 1}):
            x = LEFT + width * (at + 0.5)
            out.append(
                f'<text class="tick" x="{x:.1f}" y="{BOTTOM + 16}" text-anchor="middle">{self.steps[at]:,}</text>'
            )
        out.append(f'<text class="label" x="{LEFT}" y="{TOP - 8}">nats</text>')
        out.append(f'<text class="label" x="{RIGHT}" y="{HEIGHT - 6}" text-anchor="end">optimizer step</text>')
        out.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/></svg>')
        return Markup("".join(out))  # noqa: S704 numbers, and an escaped title


@dataclass(frozen=True)
class Pictures:
    heats: Sequence[Heat]
    charts: Sequence[Chart]
    left_out: int
    """Teachers beyond `MAX_LINES`, whose pictures are not drawn."""


def pictures(rows: Sequence[Mapping[str, Any]]) -> Pictures:
    """All pictures that the rows of `pictures.jsonl` give, of all tokens and for each of several teachers."""
    names = sorted(
        {name.split("/")[1] for row in rows for name in row.get("parts") or () if name.startswith("teacher/")}
    )
    teachers = names[:MAX_LINES] if len(names) > 1 else []
    heats = [heat for name in ("", *teachers) if (heat := _heat(rows, name)) is not None]
    charts = []
    for teacher in ("", *teachers):
        before = f"teacher/{teacher}/" if teacher else ""
        behind = f", teacher {_shown(teacher)}" if teacher else ""
        size = "mean |log T \u2212 log S|, nats"
        charts.append(_by_part(rows, f"{before}log_ratio_size", f"Where they differ{behind}", size, percent=False))
        for name, title in _FLAG_TITLES.items():
            unit = f"share of tokens: {FLAGS[name][1]}"
            charts.append(_by_part(rows, before + name, title + behind, unit, percent=True))
    charts.append(_shared(rows, "Overlap", {"shared": "top_shared"}))
    by_teacher = {_shown(teacher): f"teacher/{teacher}/top_shared" for teacher in teachers}
    charts.append(_shared(rows, "Overlap by teacher", by_teacher))
    return Pictures(heats, [chart for chart in charts if chart is not None], max(0, len(names) - MAX_LINES))


def _shown(teacher: str) -> str:
    return printable(teacher[:MAX_NAME_CHARS])


def _heat(rows: Sequence[Mapping[str, Any]], name: str) -> Heat | None:
    known = [row for row in rows if sum((row.get("log_ratio") or {}).get(name) or ()) > 0]
    if not known:
        return None
    columns = np.array_split(np.arange(len(known)), min(MAX_COLUMNS, len(known)))
    counts = np.array([row["log_ratio"][name] for row in known], dtype=np.float64)
    sums = np.array([counts[column].sum(axis=0) for column in columns])
    title = f"log T \u2212 log S{f', teacher {_shown(name)}' if name else ''}"
    steps = np.array([known[column[-1]]["step"] for column in columns], dtype=np.int64)
    return Heat(title, steps, (sums / sums.sum(axis=1, keepdims=True)).T)


def _by_part(rows: Sequence[Mapping[str, Any]], name: str, title: str, unit: str, *, percent: bool) -> Chart | None:
    """A number over the tenths of a response, in the first and in the last third of the run."""
    known = [row for row in rows if name in (row.get("parts") or {})]
    thirds = dict(zip(("first", "middle", "last"), np.array_split(np.array(known), 3), strict=True))
    lines = []
    for label in ("first", "last") if len(known) >= 3 else ():
        sums, counts = np.nansum(np.array([row["parts"][name] for row in thirds[label]], dtype=np.float64), axis=0)
        values = {at: total / count for at, (total, count) in enumerate(zip(sums, counts, strict=True), 1) if count}
        if values:
            lines.append(Line(f"{label} third of the run", Series.of(values)))
    return Chart(title, unit, lines, percent, over="position in the response, tenth") if lines else None


def _shared(rows: Sequence[Mapping[str, Any]], title: str, names: Mapping[str, str]) -> Chart | None:
    """The share of the five most likely tokens that both sides have, over steps; `names`: of lines, and of their numbers."""
    lines = []
    for label, name in names.items():
        known = {row["step"]: row["parts"][name] for row in rows if name in (row.get("parts") or {})}
        sums = {step: np.nansum(np.array(pair, dtype=np.float64), axis=1) for step, pair in known.items()}
        shares = {step: total / count for step, (total, count) in sums.items() if count}
        if shares:
            lines.append(Line(label, Series.of(shares)))
    note = "Of the samples that were kept token by token."
    return Chart(title, "five most likely tokens of both sides", lines, percent=True, note=note) if lines else None
