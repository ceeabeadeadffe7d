"""Which charts a run's numbers give. A number that was not recorded is named as missing, never drawn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from understudy.format import is_rate, metric_note, number
from understudy.report.read import EvalRecord, RunRecord, Series
from understudy.report.svg import MAX_LINES, Chart, Line
from understudy.report.verdict import main_metric, shown_metrics

MAX_MORE = 36
"""Charts beside the usual ones; the rest stays in metrics.jsonl, so that the page stays small."""
USUAL: Sequence[tuple[str, str, Mapping[str, str]]] = (
    ("Loss", "as the method defines it", {"loss": "loss"}),
    ("Log-ratio", "log T \u2212 log S, nats per token", {"log_ratio": "log-ratio"}),
    ("Entropy", "nats per token", {"student_entropy": "student", "teacher_entropy": "teacher"}),
    ("Response length", "tokens", {"response_tokens": "response length"}),
    ("Truncated responses", "share of responses", {"truncated": "truncated responses"}),
    ("Gradient norm", "2-norm, before clipping", {"grad_norm": "gradient norm"}),
    ("Reward", "mean of the batch", {"reward": "reward"}),
    ("Learning rate", "per step", {"lr": "learning rate"}),
    ("Throughput", "tokens per second", {"tokens_per_s": "throughput"}),
)
"""Title, unit and `{key in metrics.jsonl: name in the legend}` of the charts that every report has if they were recorded."""
SOMETIMES: Sequence[tuple[str, str, Mapping[str, str]]] = (
    ("Overlap", "probability that student and teacher have in common", {"overlap": "overlap"}),
    ("Repetition", "share of responses that end in a loop", {"repetition": "repetition"}),
    ("Sampler gap", "|log S of engine \u2212 trainer|, nats per token", {"sampler_gap": "sampler gap"}),
    ("Age", "updates between sampling and learning", {"staleness": "age"}),
    ("Turns", "per episode", {"turns": "turns"}),
    ("Tool calls", "per episode", {"tool_calls": "calls", "tool_errors": "errors"}),
    ("Outliers", "share of the student's tokens: |log T \u2212 log S| above 5 nats", {"outliers": "outliers"}),
    ("Trusted tokens", "share of the student's tokens", {"trusted": "trusted"}),
    ("Excluded tokens", "sampled tokens that the teacher excludes", {"teacher_excluded": "excluded"}),
)
"""The same for charts of what only some runs record."""
BY_TEACHER: Sequence[tuple[str, str, str]] = (
    ("Log-ratio by teacher", "log T \u2212 log S, nats per token", "log_ratio"),
    ("Entropy by teacher", "of the student, nats per token", "student_entropy"),
    ("Teachers' entropy", "nats per token", "teacher_entropy"),
    ("Overlap by teacher", "probability that student and teacher have in common", "overlap"),
    ("Outliers by teacher", "share of the student's tokens", "outliers"),
    ("Trusted tokens by teacher", "share of the student's tokens", "trusted"),
    ("Response length by teacher", "tokens", "response_tokens"),
    ("Truncated responses by teacher", "share of responses", "truncated"),
    ("Repetition by teacher", "share of responses that end in a loop", "repetition"),
    ("Sampler gap by teacher", "|log S of engine \u2212 trainer|, nats per token", "sampler_gap"),
    ("Age by teacher", "updates between sampling and learning", "staleness"),
    ("Turns by teacher", "per episode", "turns"),
    ("Tool calls by teacher", "per episode", "tool_calls"),
    ("Tool errors by teacher", "per episode", "tool_errors"),
    ("Excluded tokens by teacher", "sampled tokens that the teacher excludes", "teacher_excluded"),
)
"""Title, unit and key of charts with a line for each of several teachers."""
_PHASE_ORDER = ("generate_s", "score_s", "update_s")
MAX_PHASES = 4
"""The number of colours of stacked areas."""


@dataclass(frozen=True)
class Charts:
    usual: Sequence[Chart]
    more: Sequence[Chart]
    constant: Sequence[str]
    """Says of each chart whose lines never change what they are, in place of the chart."""
    missing: Sequence[str]
    left_out: int
    """Series beyond `MAX_MORE`."""
    scaling: Sequence[Chart]
    """Test-time scaling of the last evaluation."""


def charts(run: RunRecord) -> Charts:
    """Every chart of a run, the accuracy first."""
    marks = [event.step for event in run.events if event.step is not None and event.kind != "info"]
    # an alarm is a section of its own, and a span in the charts of what it reads
    recorded = {
        name: series for name, series in run.series.items() if len(series.finite) and not name.startswith("alarm/")
    }
    end = run.last_step or 0

    def spans(*names: str) -> list[tuple[str, int, int]]:
        shown = [alarm for alarm in run.alarms if not set(names).isdisjoint(alarm.reads)]
        return [(alarm.name, alarm.first, end if alarm.last is None else alarm.last) for alarm in shown]

    accuracy = accuracy_chart(run.evals)
    if accuracy is not None:
        accuracy = replace(accuracy, spans=spans("accuracy_fall", "accuracy_lost"))
    usual: list[tuple[str, Chart | None]] = [("accuracy", accuracy)]
    for title, unit, names in USUAL:
        lines = [Line(name, recorded[key]) for key, name in names.items() if key in recorded]
        absent = [name for key, name in names.items() if key not in recorded]
        note = f"{title} of the {' and '.join(absent)}: not recorded." if absent else ""
        percent = is_rate(next(iter(names)))
        usual.append((title.lower(), Chart(title, unit, lines, percent, note, marks, spans(*names)) if lines else None))
    usual.append(("seconds by phase", phase_chart(recorded, marks)))
    sometimes = [
        Chart(title, unit, lines, is_rate(next(iter(names))), marks=marks, spans=spans(*names))
        for title, unit, names in SOMETIMES
        if (lines := [Line(name, recorded[key]) for key, name in names.items() if key in recorded])
    ]
    shown = {"time_s", *_phases(recorded), *(key for _, _, names in (*USUAL, *SOMETIMES) for key in names)}
    for title, unit, key in BY_TEACHER:
        own = [name for name in recorded if re.fullmatch(rf"teacher/[^/]+/{key}", name)]
        if len(own) > 1:
            chosen = sorted(own)[:MAX_LINES]
            shown.update(chosen)
            lines = [Line(name.split("/")[1], recorded[name]) for name in chosen]
            sometimes.append(Chart(title, unit, lines, is_rate(key), marks=marks))
    usual += [(chart.title.lower(), chart) for chart in (*sometimes, *_ends_charts(run.evals))]
    rest = sorted(recorded.keys() - shown)
    more = [Chart(name, "", [Line(name, recorded[name])], is_rate(name), "", marks, spans(name)) for name in rest]
    found = [chart for _, chart in usual if chart]
    changing = [chart for chart in more if not _is_constant(chart)]
    return Charts(
        usual=[chart for chart in found if not _is_constant(chart)],
        more=changing[:MAX_MORE],
        constant=[_in_words(chart) for chart in (*found, *more) if _is_constant(chart)],
        missing=[name for name, chart in usual if not chart],
        left_out=max(0, len(changing) - MAX_MORE),
        scaling=scaling_charts(run.evals[-1]) if run.evals else [],
    )


def _is_constant(chart: Chart) -> bool:
    return all(np.ptp(line.series.finite) == 0 for line in chart.lines)


def _in_words(chart: Chart) -> str:
    """The values of lines that never change: "Entropy (nats per token): student 1.2, teacher 0.8"."""
    parts = []
    for line in chart.lines:
        value = line.series.finite[0]
        text = f"{100 * value:.1f} %" if chart.percent else number(value)
        parts.append(text if len(chart.lines) == 1 else f"{line.name} {text}")
    unit = f" ({chart.unit})" if chart.unit else ""
    return f"{chart.title}{unit}: {', '.join(parts)}"


def accuracy_chart(evals: Sequence[EvalRecord]) -> Chart | None:
    """The main metric with its interval over steps, pass@k and maj@k as plain lines."""
    main = main_metric(evals[-1]) if evals else None
    if main is None:
        return None
    lines = []
    beside = [name for name in shown_metrics(evals[-1]) if name.startswith(("pass@", "maj@"))]
    for name in dict.fromkeys([main, *beside]):
        known = {record.step: item for record in evals if (item := record.metrics.get(name)) and item.value is not None}
        if known:
            value, low, high = (
                Series.of({step: getattr(item, bound) for step, item in known.items()})
                for bound in ("value", "low", "high")
            )
            lines.append(Line(name, value, low.values, high.values) if name == main else Line(name, value))
    title = "Accuracy" if main.startswith("avg@") else main
    split = f" on {evals[-1].split}" if evals[-1].split else ""
    return Chart(title, f"held-out evaluation{split}", lines, is_rate(main), note="Band: 95 % interval over problems.")


def _ends_charts(evals: Sequence[EvalRecord]) -> list[Chart]:
    """How evaluated answers ended that did not end by an end token, and for each teacher or part of a mix."""
    names = {name: metric_note(name) for name in ("no_eos", "truncated")}
    parts = sorted({name for one in evals for name in one.metrics if re.fullmatch("[^/]+/no_eos", name)})
    charts = []
    for title, shown in {
        "Missing EOS": names,
        "Missing EOS by part": {name: name.split("/")[0] for name in parts[:MAX_LINES]},
    }.items():
        lines = []
        for name, label in shown.items():
            found = {
                one.step: item.value for one in evals if (item := one.metrics.get(name)) and item.value is not None
            }
            if found:
                lines.append(Line(label, Series.of(dict(found))))
        if lines:
            charts.append(Chart(title, "share of evaluated answers", lines, percent=True))
    return charts


def scaling_charts(record: EvalRecord) -> list[Chart]:
    """Accuracy against samples and against tokens; nothing where there was one sample of each problem.

    Not against tokens where the mean response is shorter than one.
    """
    names = {"avg": "avg", "pass": "pass@k", "maj": "maj@k"}
    axes = {
        "drawn sample": [point.samples for point in record.scaling],
        "generated token": [round(point.tokens.value) for point in record.scaling],
    }
    charts = []
    for over, steps in axes.items():
        if not steps or steps[0] < 1:
            continue
        lines = []
        for key, name in names.items():
            found = [point.metrics[key] for point in record.scaling]
            value, low, high = (
                np.array([getattr(item, bound) for item in found], dtype=np.float64)
                for bound in ("value", "low", "high")
            )
            lines.append(Line(name, Series(np.array(steps, dtype=np.int64), value), low, high))
        title = f"Accuracy against {over.rpartition(' ')[2]}s"
        note = "Of each problem: one sample, the best of k, the majority of k. Logarithmic axis; bands: 95 % intervals."
        charts.append(Chart(title, "held-out evaluation", lines, percent=True, note=note, over=over, log_steps=True))
    return charts


def phase_chart(series: Mapping[str, Series], marks: Sequence[int] = ()) -> Chart | None:
    """Seconds of each phase, stacked; None where there is no step at which every phase is known."""
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
    """At most `MAX_PHASES`. A duration that fewer than half of the steps have is not a phase of a step."""
    steps = max((len(item.steps) for item in series.values()), default=0)
    names = {
        name
        for name, item in series.items()
        if name.endswith("_s") and not name.endswith("_per_s") and name not in ("time_s", "step_s")
        if len(item.finite) and 2 * len(item.steps) >= steps
    }
    return [*(name for name in _PHASE_ORDER if name in names), *sorted(names.difference(_PHASE_ORDER))][:MAX_PHASES]
