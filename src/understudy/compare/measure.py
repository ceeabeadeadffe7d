"""What one run says, read from its directory. What was not recorded is None, never a number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from understudy.compare.cells import Cell
from understudy.format import Interval
from understudy.report.read import EvalRecord, RunRecord, Series, read_run

END_SHARE = 0.1
"""Of the steps, the last ones: what "at the end" is a mean over."""
CURVES = ("grad_norm", "student_entropy")


@dataclass(frozen=True, eq=False)
class Measured:
    """Numbers of one finished run."""

    steps: int | None
    samples: int | None
    metric: str | None
    """Name of the main metric, such as "avg@4"; None: no evaluation gave scores."""
    final: Interval | None
    """The main metric at the end, with its interval over problems."""
    greedy: float | None
    split: str
    scores: Mapping[str, float]
    """The final evaluation's mean score by problem; empty where its samples were not saved or not scored."""
    accuracy: Series
    """The main metric over the samples used until then."""
    curves: Mapping[str, Series]
    """`CURVES` over samples."""
    tokens_per_s: float | None
    peak_memory_gib: float | None
    grad_norm: float | None
    """Mean over the steps that were not skipped."""
    entropy_at_end: float | None

    def samples_until(self, target: float) -> int | None:
        """Training samples when an evaluation first was at `target` or above; None: none was."""
        reached = np.flatnonzero(self.accuracy.values >= target)
        return int(self.accuracy.steps[reached[0]]) if len(reached) else None


def measure(cell: Cell) -> Measured:
    """Raises CheckpointError or DataError, naming the file, for a directory that cannot be read."""
    run = read_run(cell.path)
    final = run.evals[-1] if run.evals else None
    metric = _main_metric(final)
    used = _samples_by_step(run)
    series = run.series
    return Measured(
        steps=run.last_step,
        samples=max(used.values(), default=None),
        metric=metric,
        final=None if final is None or metric is None else final.metrics[metric],
        greedy=_greedy(cell, final, metric),
        split="" if final is None else final.split,
        scores={} if final is None else _scores(final),
        accuracy=_accuracy(run, metric, used),
        curves={name: _over_samples(series[name], used) for name in CURVES if name in series},
        tokens_per_s=_tokens_per_s(series),
        peak_memory_gib=_of(np.max, series.get("peak_memory_gib")),
        grad_norm=_of(np.mean, _updated(series.get("grad_norm"), series.get("loss"))),
        entropy_at_end=_of(np.mean, _end(series.get("student_entropy"))),
    )


def _main_metric(record: EvalRecord | None) -> str | None:
    name = None if record is None else f"avg@{record.samples_per_prompt}"
    return name if record is not None and name in record.metrics else None


def _greedy(cell: Cell, final: EvalRecord | None, metric: str | None) -> float | None:
    """A metric called greedy, or the main one where evaluation draws at temperature 0."""
    if final is None:
        return None
    named = next((item.value for name, item in final.metrics.items() if name.startswith("greedy")), None)
    if named is not None or metric is None or cell.recipe.eval is None:
        return named
    sampling = cell.recipe.eval.sampling or cell.recipe.sampling
    return final.metrics[metric].value if sampling.temperature == 0 else None


def _samples_by_step(run: RunRecord) -> dict[int, int]:
    """Training samples used when a step was done; {0: 0} alone where they were not recorded."""
    used = run.series.get("num_samples")
    return {0: 0} | (
        {} if used is None else dict(zip(used.steps.tolist(), map(int, used.values.tolist()), strict=True))
    )


def _scores(record: EvalRecord) -> dict[str, float]:
    """Mean score of each problem whose attempts are all scored."""
    found = {}
    for problem, attempts in record.problems().items():
        scores = [attempt.score for attempt in attempts if attempt.score is not None]
        if len(scores) == len(attempts):
            found[problem] = math.fsum(scores) / len(scores)
    return found


def _accuracy(run: RunRecord, metric: str | None, used: Mapping[int, int]) -> Series:
    known = {record.step: record.metrics[metric].value for record in run.evals if metric and metric in record.metrics}
    return Series.of({used[step]: value for step, value in known.items() if step in used and value is not None})


def _over_samples(series: Series, used: Mapping[int, int]) -> Series:
    steps, values = series.steps.tolist(), series.values.tolist()
    return Series.of({used[step]: value for step, value in zip(steps, values, strict=True) if step in used})


def _tokens_per_s(series: Mapping[str, Series]) -> float | None:
    """Tokens that the student wrote in all steps by their seconds; where they were not recorded, all response tokens.

    None unless tokens and seconds were recorded at the same steps.
    """
    seconds, written, rate = (series.get(name) for name in ("step_s", "student_tokens", "tokens_per_s"))
    if seconds is None:
        return None
    if written is not None and np.array_equal(written.steps, seconds.steps):
        tokens = written.values
    elif rate is not None and np.array_equal(rate.steps, seconds.steps):
        tokens = rate.values * seconds.values
    else:
        return None
    total = float(seconds.values.sum())
    found = float(tokens.sum()) / total if total > 0 else math.nan
    return found if math.isfinite(found) else None


def _updated(series: Series | None, loss: Series | None) -> Series | None:
    """Without the steps that were skipped: those without a loss, or with one that is not finite."""
    if series is None or loss is None:
        return series
    kept = np.isin(series.steps, loss.steps[np.isfinite(loss.values)])
    return Series(series.steps[kept], series.values[kept])


def _end(series: Series | None) -> Series | None:
    if series is None:
        return None
    num = max(1, round(END_SHARE * len(series.steps)))
    return Series(series.steps[-num:], series.values[-num:])


def _of(reduce: object, series: Series | None) -> float | None:
    """A number of the finite values; None where there is none."""
    known = np.array([]) if series is None else series.values[np.isfinite(series.values)]
    return float(reduce(known)) if len(known) else None  # type: ignore[operator]
