"""Line, band and stacked charts as SVG text: no library, and no script needed to read them.

Sizes are in SVG units; a chart is drawn at about one unit per CSS pixel on every screen (`page.css` sets the columns).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from understudy.format import number
from understudy.report.read import Series

WIDTH, HEIGHT = 380, 224
LEFT, RIGHT, TOP, BOTTOM = 50, 368, 22, 186
LOG_FROM = 30.0
"""A positive curve whose maximum is this many times its median is drawn on a logarithmic axis."""
MAX_MARKS = 60
MAX_POINTS = 600
"""Points of one drawn curve: about two per pixel of a chart's width."""
SMOOTH_FROM = 100
"""Shorter curves are drawn as they are; longer ones get a running mean over 1/40 of their length."""
SMOOTH_SHARE = 40

_Floats = NDArray[np.float64]


MAX_LINES = 8
"""Lines in one chart: as many as there are colours."""
LEGEND_COLUMNS, LEGEND_ROW = 3, 15


@dataclass(frozen=True, eq=False)
class Line:
    name: str
    series: Series
    low: _Floats | None = None
    high: _Floats | None = None
    """Bounds of an interval, drawn as a band; as long as the series."""


@dataclass(frozen=True, eq=False)
class Chart:
    """The content of one figure. `marks` are steps with a warning, ticked at the lower edge; `spans` alarms by name, first and
    last step, shaded behind the curves."""

    title: str
    unit: str
    lines: Sequence[Line]
    percent: bool = False
    note: str = ""
    marks: Sequence[int] = field(default_factory=tuple)
    spans: Sequence[tuple[str, int, int]] = field(default_factory=tuple)
    stacked: bool = False
    over: str = "optimizer step"
    """One unit of the horizontal axis."""
    log_steps: bool = False
    """Whether the horizontal axis is logarithmic; its steps, all above 0, are then the ticks."""

    @property
    def point(self) -> str:
        """The last word of `over`, as "step" in "at step 5"."""
        return self.over.rpartition(" ")[2]

    @property
    def smooth(self) -> int:
        """Points of the running mean drawn over the longest line; 0 where none is drawn."""
        window = smooth_window(max(len(line.series.steps) for line in self.lines))
        return window if window > 1 and not self.stacked else 0

    def describe(self, series: Series) -> str:
        """First, last and extreme values, and where they are: "at step 5" for the point "step"."""
        known = series.at(np.isfinite(series.values))
        ends = [0, -1, int(known.values.argmin()), int(known.values.argmax())]
        first, last, low, high = (
            f"{100 * value:.1f} %" if self.percent else number(value) for value in known.values[ends]
        )
        at_first, _, at_low, at_high = (f"at {self.point} {step:,}" for step in known.steps[ends])
        if len(known.values) == 1:
            return f"{first} {at_first}"
        return f"{first} \u2192 {last} (min {low} {at_low}, max {high} {at_high})"


@dataclass(frozen=True)
class Scale:
    """Maps values to SVG units, linearly or logarithmically."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        at = math.log10(value) if self.log else value
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def save(chart: Chart, path: Path) -> None:
    """Writes the chart as a file that stands alone, with the styles of a report and a legend of its lines in it."""
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8") + "svg { font-family: sans-serif }"
    legend, height = [], HEIGHT
    if len(chart.lines) > 1:
        for index, line in enumerate(chart.lines):
            row, column = divmod(index, LEGEND_COLUMNS)
            left, height = LEFT + column * (RIGHT - LEFT) / LEGEND_COLUMNS, HEIGHT + LEGEND_ROW * (row + 1)
            legend.append(
                f'<path class="curve s{index + 1}" d="M{left:.1f} {height - 10}h16"/>'
                f'<text class="tick" x="{left + 21:.1f}" y="{height - 6}">{escape(line.name)}</text>'
            )
    # without what only a report's script reads
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" class="chart">'
    inside = draw(chart).partition(">")[2].removesuffix("</svg>")
    text = f"{opening}<style>{style}</style>{inside}{''.join(legend)}</svg>\n"
    path.write_text(text, encoding="utf-8")


def draw(chart: Chart) -> Markup:
    """The chart as one `<svg>`. Every line needs at least one finite value."""
    steps = np.concatenate([line.series.steps for line in chart.lines])
    first, last = float(steps.min()), float(steps.max())
    x = Scale(first, last, LEFT, RIGHT, chart.log_steps) if first < last else Scale(first - 1, last + 1, LEFT, RIGHT)
    if chart.stacked:
        y, body, shown = _stacked(chart, x)
    else:
        y, shown = _value_scale(chart), [line.series.at(thin(line.series.values)) for line in chart.lines]
        body = "".join(_line(line, index, x, y) for index, line in enumerate(chart.lines, 1))
    # for the script's cursor; five digits, because the script shows four
    series = [
        {
            "name": line.name,
            "step": item.steps.tolist(),
            "value": [None if math.isnan(value) else float(f"{value:.5g}") for value in item.values.tolist()],
        }
        for line, item in zip(chart.lines, shown, strict=True)
    ]
    data = {
        "x": [x.low, x.high, x.start, x.end],
        "y": [y.low, y.high, y.start, y.end],
        "log": y.log,
        "log_steps": x.log,
        "percent": chart.percent,
        "stacked": chart.stacked,
        "point": chart.point,
        "series": series,
    }
    words = [f"{chart.title}, {chart.unit or 'no unit'}, over {chart.over}s."]
    words += [f"{line.name}: {chart.describe(line.series)}." for line in chart.lines]
    marks = "".join(
        f'<path class="mark" d="M{x(step):.1f} {BOTTOM - 7}l4 7h-8z">'
        f"<title>warning at {chart.point} {step:,}</title></path>"
        for step in sorted({step for step in chart.marks if x.low <= step <= x.high})[:MAX_MARKS]
    )
    shaded = "".join(
        f'<rect class="span" x="{x(start):.1f}" width="{max(2.0, x(end) - x(start)):.1f}" y="{TOP}" height="{BOTTOM - TOP}">'
        f"<title>alarm {escape(name)}, from {chart.point} {start:,} to {end:,}</title></rect>"
        for name, start, end in ((name, max(first, x.low), min(last, x.high)) for name, first, last in chart.spans)
        if start <= end
    )
    return Markup(  # noqa: S704 numbers, and texts that are escaped here
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" class="chart" '
        f'aria-label="{escape(" ".join(words))}" data-chart="{escape(json.dumps(data, separators=(",", ":")))}">'
        f"{shaded}{_axes(chart, x, y)}{body}{marks}"
        f'<g class="cursor" visibility="hidden"><line y1="{TOP}" y2="{BOTTOM}"/></g></svg>'
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(values: _Floats) -> NDArray[np.int64]:
    """Ascending indices of at most `MAX_POINTS` + 2 values that keep every peak, dip and gap.

    Kept are both ends, and of each bucket the minimum, the maximum and a NaN.
    """
    indices = np.arange(len(values))
    if len(values) <= MAX_POINTS:
        return indices
    keep = {0, len(values) - 1}
    for bucket in np.array_split(indices, MAX_POINTS // 3):
        known = bucket[~np.isnan(values[bucket])]
        keep.update(np.setdiff1d(bucket, known)[:1].tolist())
        if len(known):
            keep.update((int(known[values[known].argmin()]), int(known[values[known].argmax()])))
    return np.array(sorted(keep), dtype=np.int64)


def smooth_window(size: int) -> int:
    """Points that a running mean takes, an odd number; 1 for a curve too short to need one."""
    return size // SMOOTH_SHARE | 1 if size >= SMOOTH_FROM else 1


def smoothed(series: Series) -> Series:
    """Centred means over `smooth_window` points, over fewer at both ends, at most `MAX_POINTS` of them.

    A NaN is left out of its neighbours' means and stays a gap itself.
    """
    size = len(series.values)
    window = np.ones(smooth_window(size))
    known = ~np.isnan(series.values)
    sums = np.convolve(np.where(known, series.values, 0.0), window, "same")
    means = np.full(size, np.nan)
    means[known] = sums[known] / np.convolve(known, window, "same")[known]
    index = np.unique(np.linspace(0, size - 1, min(size, MAX_POINTS)).round().astype(np.int64))
    return Series(series.steps, means).at(index)


def _value_scale(chart: Chart) -> Scale:
    parts = [part for line in chart.lines for part in (line.series.values, line.low, line.high) if part is not None]
    values = np.concatenate(parts)
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    if not chart.percent and low > 0 and high > LOG_FROM * float(np.median(values)):
        return Scale(low / 1.3, high * 1.3, BOTTOM, TOP, log=True)
    pad = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    bottom, top = max(low - pad, 0.0) if low >= 0 else low - pad, high + pad
    if chart.percent and low >= 0 and high <= 1:
        top = min(1.0, top)
    return Scale(bottom, top, BOTTOM, TOP)


def _axes(chart: Chart, x: Scale, y: Scale) -> str:
    at_y = ticks(y.low, y.high, 4)
    if y.log:
        powers = range(math.ceil(math.log10(y.low)), math.floor(math.log10(y.high)) + 1)
        at_y = [10.0**power for power in powers if power % math.ceil(len(powers) / 6) == 0]
        if len(powers) < 2:
            decade = 10.0 ** math.floor(math.log10(y.low))
            at_y = [factor * decade for factor in (1, 2, 5, 10, 20, 50, 100) if y.low <= factor * decade <= y.high]
    out = []
    for value in at_y:
        at, kind = y(value), "zero" if value == 0 and y.low < 0 else "grid"
        text = f"{number(round(100 * value, 6))} %" if chart.percent else number(value)
        out.append(f'<line class="{kind}" x1="{LEFT}" x2="{RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{text}</text>')
    at_x = [step for step in ticks(x.low, x.high, 5) if step == int(step)]
    if x.log:
        at_x = sorted({float(step) for line in chart.lines for step in line.series.steps})
        at_x = at_x[:: math.ceil(len(at_x) / 6)]
    for value in at_x:
        at = x(value)
        out.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>')
        anchor = "end" if x.log and at == RIGHT else "middle"
        out.append(f'<text class="tick" x="{at:.1f}" y="{BOTTOM + 16}" text-anchor="{anchor}">{int(value):,}</text>')
    unit = f"{chart.unit}, log scale" if y.log else chart.unit
    out.append(f'<text class="label" x="{LEFT}" y="{TOP - 8}">{escape(unit.strip(", "))}</text>')
    out.append(f'<text class="label" x="{RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(chart.over)}</text>')
    out.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    return "".join(out)


def _line(line: Line, index: int, x: Scale, y: Scale) -> str:
    """The curve, its band or whisker below it, and a smooth curve over a long one or dots on a short one."""
    out = []
    series = line.series
    if line.low is not None and line.high is not None:
        known = np.isfinite(line.low) & np.isfinite(line.high)
        steps, low, high = series.steps[known], line.low[known], line.high[known]
        if len(steps) >= 2:
            out.append(f'<path class="band s{index}" d="{_area(steps, low, high, x, y)}"/>')
        elif len(steps):
            at = f'x1="{x(steps[0]):.1f}" x2="{x(steps[0]):.1f}" y1="{y(low[0]):.1f}" y2="{y(high[0]):.1f}"'
            out.append(f'<line class="whisker s{index}" {at}/>')
    size = len(series.values)
    is_long = smooth_window(size) > 1
    curves = [series.at(thin(series.values)), *([smoothed(series)] if is_long else [])]
    for kind, curve in zip(("raw", "curve") if is_long else ("curve",), curves, strict=True):
        out.append(f'<path class="{kind} s{index}" d="{_path(curve, x, y)}"/>')
    if size <= 40:
        out += [
            f'<circle class="dot s{index}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.6"/>'
            for step, value in series.points()
            if math.isfinite(value)
        ]
    return "".join(out)


def _path(series: Series, x: Scale, y: Scale) -> str:
    """Straight lines between known values; a NaN lifts the pen, and a value between two NaN is a dot."""
    out, down = [], False
    for step, value in series.points():
        if not math.isnan(value):
            out.append(f"{'L' if down else 'M'}{x(step):.1f} {y(value):.1f}" + ("" if down else "h0"))
        down = not math.isnan(value)
    return "".join(out)


def _area(steps: NDArray[np.int64], below: _Floats, above: _Floats, x: Scale, y: Scale) -> str:
    """Between two curves: along the upper one and back along the lower one."""
    around = [*zip(steps, above, strict=True), *reversed([*zip(steps, below, strict=True)])]
    return f"M{'L'.join(f'{x(step):.1f} {y(value):.1f}' for step, value in around)}Z"


def _stacked(chart: Chart, x: Scale) -> tuple[Scale, str, list[Series]]:
    """Areas on top of each other, over the steps that all lines have, of which there is one; elsewhere a gap."""
    steps = np.unique(np.concatenate([line.series.steps for line in chart.lines]))
    values = np.full((len(chart.lines), len(steps)), np.nan)
    for row, line in enumerate(chart.lines):
        values[row, np.searchsorted(steps, line.series.steps)] = line.series.values
    index = thin(values.sum(axis=0))
    steps, values = steps[index], values[:, index]
    tops = np.vstack([np.zeros(len(steps)), np.cumsum(values, axis=0)])
    known = np.isfinite(tops[-1])
    y = Scale(0.0, 1.06 * float(np.nanmax(tops[-1])) or 1.0, BOTTOM, TOP)
    runs = np.split(np.arange(len(steps)), np.flatnonzero(np.diff(known)) + 1)
    runs = [run for run in runs if known[run[0]]]
    out = []
    for row, (below, above) in enumerate(pairwise(tops), 1):
        areas = "".join(_area(steps[run], below[run], above[run], x, y) for run in runs)
        out.append(f'<path class="area s{row}" d="{areas}"/>')
    return y, "".join(out), [Series(steps, row) for row in values]
