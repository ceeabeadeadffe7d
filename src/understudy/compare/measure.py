"""Reads the numbers of one run from its directory. A number that was not recorded is None."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from understudy.compare.cells import Cell
from understudy.format import Interval
from understudy.report.read import Series, read_run
from understudy.report.verdict import problem_value

END_SHARE = 0.1
"""Share of the steps, the last ones, that a value "at the end" is the mean of."""
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
    """Accuracy at temperature 0: the metric `greedy`, or the main one of an evaluation that draws so."""
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


@dataclass(frozen=True)
class Outcome:
    """The ending of a run; `measured` is None for one that did not finish."""

    cell: Cell
    status: Literal["finished", "failed", "not run"]
    error: str | None = None
    measured: Measured | None = None


def measure(cell: Cell) -> Measured:
    """Raises CheckpointError or DataError, naming the file, for a directory that cannot be read."""
    run = read_run(cell.path)
    empty = Series.of({})
    counted, grad_norm, entropy, memory = (
        run.series.get(name, empty) for name in ("num_samples", "grad_norm", "student_entropy", "peak_memory_gib")
    )
    used = {0: 0} | dict(zip(counted.steps.tolist(), map(int, counted.values.tolist()), strict=True))
    metric, final, greedy, split = None, None, None, ""
    scores: dict[str, float] = {}
    accuracy: dict[int, float | None] = {}
    if run.evals:
        last = run.evals[-1]
        split = last.split
        greedy = next((item.value for name, item in last.metrics.items() if name.startswith("greedy")), None)
        name = f"avg@{last.samples_per_prompt}"
        if name in last.metrics:
            metric, final = name, last.metrics[name]
            section = cell.recipe.eval
            if greedy is None and section and (section.sampling or cell.recipe.sampling).temperature == 0:
                greedy = final.value
            known = {record.step: record.metrics[name].value for record in run.evals if name in record.metrics}
            accuracy = {used[step]: value for step, value in known.items() if step in used and value is not None}
        for problem, attempts in last.problems().items():
            score = problem_value(f"avg@{len(attempts)}", attempts)
            if score is not None:
                scores[problem] = score
    if "loss" in run.series:  # a skipped step has no loss, or one that is not finite
        loss = run.series["loss"]
        grad_norm = grad_norm.at(np.isin(grad_norm.steps, loss.steps[np.isfinite(loss.values)]))
    num_last = max(1, round(END_SHARE * len(entropy.steps)))
    return Measured(
        steps=run.last_step,
        samples=max(used.values()),
        metric=metric,
        final=final,
        greedy=greedy,
        split=split,
        scores=scores,
        accuracy=Series.of(accuracy),
        curves={
            name: Series.of({used[step]: value for step, value in run.series[name].points() if step in used})
            for name in CURVES
            if name in run.series
        },
        tokens_per_s=_tokens_per_s(run.series),
        peak_memory_gib=_reduced(np.max, memory.values),
        grad_norm=_reduced(np.mean, grad_norm.values),
        entropy_at_end=_reduced(np.mean, entropy.values[-num_last:]),
    )


def _tokens_per_s(series: Mapping[str, Series]) -> float | None:
    """Tokens that the student wrote in all steps by their seconds; where they were not recorded, all response tokens.

    None unless tokens and seconds were recorded at the same steps.
    """
    empty = Series.of({})
    seconds, written, rate = (series.get(name, empty) for name in ("step_s", "student_tokens", "tokens_per_s"))
    if np.array_equal(written.steps, seconds.steps):
        tokens = written.values
    elif np.array_equal(rate.steps, seconds.steps):
        tokens = rate.values * seconds.values
    else:
        return None
    total = float(seconds.values.sum())
    found = float(tokens.sum()) / total if total > 0 else math.nan
    return found if math.isfinite(found) else None


def _reduced(reduce: Callable[[NDArray[np.float64]], np.float64], values: NDArray[np.float64]) -> float | None:
    """A number of the finite values; None where there is none."""
    known = values[np.isfinite(values)]
    return float(reduce(known)) if len(known) else None
