"""Which charts a run's numbers give. What was not recorded is named, never drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from understudy.format import is_rate
from understudy.report.chart import Chart, Line, draw, summary
from understudy.report.read import EvalRecord, RunRecord, Series
from understudy.report.series import smooth_window
from understudy.report.verdict import main_metric, shown_metrics

MAX_MORE = 36
"""Charts beside the usual ones; the rest stays in metrics.jsonl, so that the page stays small."""


@dataclass(frozen=True)
class Usual:
    """A chart that every report has if its series were recorded: {key in metrics.jsonl: name in the legend}."""

    title: str
    unit: str
    series: Mapping[str, str]
    percent: bool = False


USUAL = (
    Usual("Loss", "as the method defines it", {"loss": "loss"}),
    Usual("Log-ratio", "log T \u2212 log S, nats per token", {"log_ratio": "log-ratio"}),
    Usual("Entropy", "nats per token", {"student_entropy": "student", "teacher_entropy": "teacher"}),
    Usual("Response length", "tokens", {"response_tokens": "response length"}),
    Usual("Truncated responses", "share of responses", {"truncated": "truncated responses"}, percent=True),
    Usual("Gradient norm", "2-norm, before clipping", {"grad_norm": "gradient norm"}),
    Usual("Reward", "mean of the batch", {"reward": "reward"}),
    Usual("Learning rate", "per step", {"lr": "learning rate"}),
    Usual("Throughput", "tokens per second", {"tokens_per_s": "throughput"}),
)
_PHASE_ORDER = ("generate_s", "score_s", "update_s")
_NO_PHASE = ("time_s", "step_s")
MAX_PHASES = 4
"""As many as there are colours."""


@dataclass(frozen=True)
class Figure:
    """A chart and the text around it, as the page shows them."""

    title: str
    legend: Sequence[str]
    svg: Markup
    summary: Sequence[str]
    note: str = ""
    smooth: int = 0
    stacked: bool = False


@dataclass(frozen=True)
class Figures:
    usual: Sequence[Figure]
    more: Sequence[Figure]
    missing: Sequence[str]
    left_out: int
    """Series beyond `MAX_MORE`."""


def figures(run: RunRecord) -> Figures:
    """Every chart of a run, the accuracy first."""
    marks = [event.step for event in run.events if event.step is not None and event.kind != "info"]
    accuracy = accuracy_chart(run.evals)
    found: list[Figure]
    missing: list[str]
    found, missing = ([figure(accuracy)], []) if accuracy else ([], ["accuracy"])
    for usual in USUAL:
        lines = [Line(name, run.series[key]) for key, name in usual.series.items() if _known(run.series.get(key))]
        absent = [name for key, name in usual.series.items() if not _known(run.series.get(key))]
        if lines:
            note = f"{usual.title} of the {' and '.join(absent)}: not recorded." if absent else ""
            found.append(figure(Chart(usual.title, usual.unit, lines, usual.percent, note, marks)))
        else:
            missing.append(usual.title.lower())
    phases = phase_chart(run.series, marks)
    if phases:
        found.append(figure(phases))
    else:
        missing.append("seconds by phase")
    shown = {key for usual in USUAL for key in usual.series} | set(_phases(run.series)) | {"time_s"}
    rest = [name for name in sorted(run.series) if name not in shown and _known(run.series[name])]
    more = [
        figure(Chart(name, "", [Line(name, run.series[name])], is_rate(name), marks=marks)) for name in rest[:MAX_MORE]
    ]
    return Figures(found, more, missing, max(0, len(rest) - MAX_MORE))


def figure(chart: Chart) -> Figure:
    """The chart drawn, with its legend and its summary in words."""
    longest = max(len(line.series.steps) for line in chart.lines)
    window = 1 if chart.stacked else smooth_window(longest)
    words = [summary(line.series, chart.percent, chart.point) for line in chart.lines]
    if len(words) > 1:
        words = [f"{line.name}: {text}" for line, text in zip(chart.lines, words, strict=True)]
    return Figure(
        title=chart.title,
        legend=[line.name for line in chart.lines],
        svg=draw(chart),
        summary=words,
        note=chart.note,
        smooth=window if window > 1 else 0,
        stacked=chart.stacked,
    )


def accuracy_chart(evals: Sequence[EvalRecord]) -> Chart | None:
    """The main metric with its interval over steps, pass@k and maj@k as plain lines."""
    name = main_metric(evals[-1]) if evals else None
    if name is None:
        return None
    names = [name] + [item for item in shown_metrics(evals[-1]) if item != name and item.startswith(("pass@", "maj@"))]
    lines = [line for line in (_eval_line(item, evals, band=item == name) for item in names) if line]
    title = "Accuracy" if name.startswith("avg@") else name
    split = f" on {evals[-1].split}" if evals[-1].split else ""
    return Chart(title, f"held-out evaluation{split}", lines, is_rate(name), note="Band: 95 % interval over problems.")


def phase_chart(series: Mapping[str, Series], marks: Sequence[int] = ()) -> Chart | None:
    """Seconds of each phase, stacked; phases that fewer than half of the steps have are not phases of a step.

    None where there is no step at which every phase is known: nothing could be stacked.
    """
    lines = [Line(name.removesuffix("_s"), series[name]) for name in _phases(series)]
    known = [set(line.series.steps[np.isfinite(line.series.values)].tolist()) for line in lines]
    if not known or not set.intersection(*known):
        return None
    absent = [name.removesuffix("_s") for name in _PHASE_ORDER if name not in series]
    totals = {line.name: float(np.nansum(line.series.values)) for line in lines}
    whole = sum(totals.values()) or 1.0
    note = "In all: " + ", ".join(f"{name} {100 * total / whole:.0f} %" for name, total in totals.items()) + "."
    if absent:
        note += f" Not recorded: {', '.join(absent)}."
    return Chart("Seconds by phase", "seconds per step", lines, note=note, marks=marks, stacked=True)


def _phases(series: Mapping[str, Series]) -> list[str]:
    steps = max((len(item.steps) for item in series.values()), default=0)
    names = [
        name
        for name, item in series.items()
        if name.endswith("_s") and not name.endswith("_per_s") and name not in _NO_PHASE
        if _known(item) and 2 * len(item.steps) >= steps
    ]
    known = [name for name in _PHASE_ORDER if name in names]
    return (known + sorted(set(names) - set(known)))[:MAX_PHASES]


def _eval_line(name: str, evals: Sequence[EvalRecord], band: bool) -> Line | None:
    items = [(record.step, record.metrics[name]) for record in evals if name in record.metrics]
    known = [(step, item) for step, item in items if item.value is not None]
    if not known:
        return None
    array = [
        np.array([np.nan if bound is None else bound for bound in column], dtype=np.float64)
        for column in zip(*((item.value, item.low, item.high) for _, item in known), strict=True)
    ]
    line = Series(np.array([step for step, _ in known], dtype=np.int64), array[0])
    return Line(name, line, array[1], array[2]) if band else Line(name, line)


def _known(series: Series | None) -> bool:
    return series is not None and bool(np.isfinite(series.values).any())
