"""Line, band and stacked charts as SVG text: no library, no script needed to read them.

Sizes are in SVG units; a chart is drawn at about one unit per CSS pixel on every screen (`page.css` sets the columns).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from understudy.format import number
from understudy.report.read import Series
from understudy.report.series import smooth_window, smoothed, thin, thinned

WIDTH, HEIGHT = 380, 224
LEFT, RIGHT, TOP, BOTTOM = 50, 368, 22, 186
LOG_FROM = 30.0
"""A positive curve whose maximum is this many times its median is drawn on a logarithmic axis."""
MAX_MARKS = 60

_Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Line:
    name: str
    series: Series
    low: _Floats | None = None
    high: _Floats | None = None
    """Bounds of an interval, drawn as a band; as long as the series."""


@dataclass(frozen=True, eq=False)
class Chart:
    """What one figure shows. `marks` are steps with a warning, ticked at the lower edge."""

    title: str
    unit: str
    lines: Sequence[Line]
    percent: bool = False
    note: str = ""
    marks: Sequence[int] = field(default_factory=tuple)
    stacked: bool = False
    over: str = "optimizer step"
    """What one unit of the horizontal axis is; its last word alone is used beside numbers."""

    @property
    def point(self) -> str:
        """As "step" in "at step 5"."""
        return self.over.rpartition(" ")[2]


@dataclass(frozen=True)
class Scale:
    """From values to SVG units, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        at = math.log10(value) if self.log else value
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def draw(chart: Chart) -> Markup:
    """The chart as one `<svg>`. Every line needs at least one finite value; raises ValueError otherwise."""
    for line in chart.lines:
        if not np.isfinite(line.series.values).any():
            raise ValueError(f"chart {chart.title!r}: the line {line.name!r} has no finite value to draw")
    steps = np.concatenate([line.series.steps for line in chart.lines])
    x = _step_scale(float(steps.min()), float(steps.max()))
    if chart.stacked:
        y, body, readout = _stacked(chart, x)
    else:
        y = _value_scale(chart)
        drawn = [thinned(line.series) for line in chart.lines]
        body = "".join(_line(line, index, x, y) for index, line in enumerate(chart.lines, 1))
        readout = [(line.name, short) for line, short in zip(chart.lines, drawn, strict=True)]
    data = {
        "x": [x.low, x.high, x.start, x.end],
        "y": [y.low, y.high, y.start, y.end],
        "log": y.log,
        "percent": chart.percent,
        "stacked": chart.stacked,
        "point": chart.point,
        "series": [{"name": name, "step": _ints(item.steps), "value": _compact(item.values)} for name, item in readout],
    }
    return Markup(  # noqa: S704 numbers, and texts that are escaped here
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" class="chart" '
        f'aria-label="{escape(describe(chart))}" data-chart="{escape(json.dumps(data, separators=(",", ":")))}">'
        f"{_axes(chart, x, y)}{body}{_marks(chart.marks, x, chart.point)}"
        f'<g class="cursor" visibility="hidden"><line y1="{TOP}" y2="{BOTTOM}"/></g></svg>'
    )


def describe(chart: Chart) -> str:
    """The chart in words: what a screen reader says."""
    parts = [f"{chart.title}, {chart.unit or 'no unit'}, over {chart.over}s."]
    parts += [f"{line.name}: {summary(line.series, chart.percent, chart.point)}." for line in chart.lines]
    return " ".join(parts)


def summary(series: Series, percent: bool, point: str = "step") -> str:
    """First, last and extreme values, and where they are: "at step 5" for the point "step"."""
    known = np.flatnonzero(np.isfinite(series.values))
    values, steps = series.values[known], series.steps[known]
    low, high = int(values.argmin()), int(values.argmax())
    show = _percent if percent else number
    if len(values) == 1:
        return f"{show(values[0])} at {point} {steps[0]:,}"
    return (
        f"{show(values[0])} \u2192 {show(values[-1])} "
        f"(min {show(values[low])} at {point} {steps[low]:,}, max {show(values[high])} at {point} {steps[high]:,})"
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _step_scale(low: float, high: float) -> Scale:
    if low == high:
        low, high = low - 1, high + 1
    return Scale(low, high, LEFT, RIGHT)


def _value_scale(chart: Chart) -> Scale:
    parts: Iterable[_Floats] = (
        part for line in chart.lines for part in (line.series.values, line.low, line.high) if part is not None
    )
    values = np.concatenate(list(parts))
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    if not chart.percent and low > 0 and high > LOG_FROM * float(np.median(values)):
        return Scale(low / 1.3, high * 1.3, BOTTOM, TOP, log=True)
    pad = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    bottom, top = low - pad, high + pad
    if low >= 0 > bottom:
        bottom = 0.0
    if chart.percent and low >= 0 and high <= 1:
        bottom, top = max(0.0, bottom), min(1.0, top)
    return Scale(bottom, top, BOTTOM, TOP)


def _axes(chart: Chart, x: Scale, y: Scale) -> str:
    show: Callable[[float], str] = _percent_tick if chart.percent else number
    out = []
    for value in _log_ticks(y) if y.log else ticks(y.low, y.high, 4):
        at = y(value)
        out.append(f'<line class="{_grid_class(value, y)}" x1="{LEFT}" x2="{RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{show(value)}</text>')
    for value in (step for step in ticks(x.low, x.high, 5) if step == int(step)):
        at = x(value)
        out.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>')
        out.append(f'<text class="tick" x="{at:.1f}" y="{BOTTOM + 16}" text-anchor="middle">{int(value):,}</text>')
    unit = f"{chart.unit}, log scale" if y.log else chart.unit
    out.append(f'<text class="label" x="{LEFT}" y="{TOP - 8}">{escape(unit.strip(", "))}</text>')
    out.append(f'<text class="label" x="{RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(chart.over)}</text>')
    out.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    return "".join(out)


def _grid_class(value: float, y: Scale) -> str:
    return "zero" if value == 0 and y.low < 0 else "grid"


def _log_ticks(y: Scale) -> list[float]:
    powers = range(math.ceil(math.log10(y.low)), math.floor(math.log10(y.high)) + 1)
    if len(powers) >= 2:
        every = math.ceil(len(powers) / 6)
        return [10.0**power for power in powers if power % every == 0]
    decade = 10.0 ** math.floor(math.log10(y.low))
    return [factor * decade for factor in (1, 2, 5, 10, 20, 50, 100) if y.low <= factor * decade <= y.high]


def _line(line: Line, index: int, x: Scale, y: Scale) -> str:
    out = [] if line.low is None or line.high is None else [_band(line, line.low, line.high, index, x, y)]
    window = smooth_window(len(line.series.values))
    raw = "raw" if window > 1 else "curve"
    out.append(f'<path class="{raw} s{index}" d="{_path(thinned(line.series), x, y)}"/>')
    if window > 1:
        out.append(f'<path class="curve s{index}" d="{_path(smoothed(line.series), x, y)}"/>')
    elif len(line.series.values) <= 40:
        known = np.isfinite(line.series.values)
        points = zip(line.series.steps[known], line.series.values[known], strict=True)
        out += [
            f'<circle class="dot s{index}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.6"/>' for step, value in points
        ]
    return "".join(out)


def _path(series: Series, x: Scale, y: Scale) -> str:
    """Straight lines between known values; a NaN lifts the pen, and a value between two NaN is a dot."""
    out, down = [], False
    for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
        if math.isnan(value):
            down = False
            continue
        out.append(f"{'L' if down else 'M'}{x(step):.1f} {y(value):.1f}" + ("" if down else "h0"))
        down = True
    return "".join(out)


def _band(line: Line, low: _Floats, high: _Floats, index: int, x: Scale, y: Scale) -> str:
    known = np.isfinite(low) & np.isfinite(high)
    steps = line.series.steps[known].tolist()
    if len(steps) < 2:
        return "".join(
            f'<line class="whisker s{index}" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{y(a):.1f}" y2="{y(b):.1f}"/>'
            for step, a, b in zip(steps, low[known].tolist(), high[known].tolist(), strict=True)
        )
    there = [f"{x(step):.1f} {y(value):.1f}" for step, value in zip(steps, high[known].tolist(), strict=True)]
    back = [f"{x(step):.1f} {y(value):.1f}" for step, value in zip(steps, low[known].tolist(), strict=True)]
    return f'<path class="band s{index}" d="M{"L".join(there + back[::-1])}Z"/>'


def _stacked(chart: Chart, x: Scale) -> tuple[Scale, str, list[tuple[str, Series]]]:
    """Areas on top of each other, over the steps that all lines have; elsewhere a gap."""
    steps = np.array(sorted(set.union(*(set(line.series.steps.tolist()) for line in chart.lines))), dtype=np.int64)
    values = np.full((len(chart.lines), len(steps)), np.nan)
    for row, line in enumerate(chart.lines):
        values[row, np.searchsorted(steps, line.series.steps)] = line.series.values
    index = thin(values.sum(axis=0))
    steps, values = steps[index], values[:, index]
    tops = np.cumsum(values, axis=0)
    if not np.isfinite(tops[-1]).any():
        raise ValueError(f"chart {chart.title!r}: there is no step at which every line is known")
    y = Scale(0.0, 1.06 * float(np.nanmax(tops[-1])) or 1.0, BOTTOM, TOP)
    out = []
    for row in range(len(chart.lines)):
        below = tops[row - 1] if row else np.zeros(len(steps))
        out.append(f'<path class="area s{row + 1}" d="{_areas(steps, below, tops[row], x, y)}"/>')
    names = [line.name for line in chart.lines]
    return y, "".join(out), [(name, Series(steps, row)) for name, row in zip(names, values, strict=True)]


def _areas(steps: NDArray[np.int64], below: _Floats, above: _Floats, x: Scale, y: Scale) -> str:
    out = []
    known = np.isfinite(above) & np.isfinite(below)
    for run in np.split(np.arange(len(steps)), np.flatnonzero(np.diff(known.astype(int))) + 1):
        if len(run) == 0 or not known[run[0]]:
            continue
        there = [f"{x(steps[i]):.1f} {y(above[i]):.1f}" for i in run]
        back = [f"{x(steps[i]):.1f} {y(below[i]):.1f}" for i in run[::-1]]
        out.append(f"M{'L'.join(there + back)}Z")
    return "".join(out)


def _marks(steps: Sequence[int], x: Scale, point: str) -> str:
    inside = sorted({step for step in steps if x.low <= step <= x.high})[:MAX_MARKS]
    return "".join(
        f'<path class="mark" d="M{x(step):.1f} {BOTTOM - 7}l4 7h-8z"><title>warning at {point} {step:,}</title></path>'
        for step in inside
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _percent_tick(value: float) -> str:
    return f"{number(round(100 * value, 6))} %"


def _ints(steps: NDArray[np.int64]) -> list[int]:
    return [int(step) for step in steps]


def _compact(values: _Floats) -> list[float | None]:
    return [None if math.isnan(value) else float(f"{value:.5g}") for value in values.tolist()]
