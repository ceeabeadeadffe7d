"""The numbers of a comparison: of each run, read from its directory, and of each row of the table, with what they rest on.

A number that was not recorded is None.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from understudy.compare.cells import Cell, budgets
from understudy.compare.grid import Combination, Grid
from understudy.eval.estimators import SHARE, Ends, Estimate, crossed_mean
from understudy.format import MISSING, Interval, change, count, interval, number, quantity
from understudy.report.read import Series, read_run
from understudy.report.verdict import problem_value
from understudy.trainer.rollouts import MAX_ROUNDS

END_SHARE = 0.1
"""Share of the steps, the last ones, that a value "at the end" is the mean of."""
MAX_REASON_CHARS = 300
"""Characters of a failed run's error in the caption."""
CURVES = ("grad_norm", "student_entropy")
NOT_REACHED = "not reached"
BASELINE = "baseline"
NO_PAIRS = "no common problems"
UNLEARNT = "did not learn"


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
    curves: Mapping[str, Series]
    """The main metric as "accuracy" and what was recorded of `CURVES`, over the samples used until then."""
    tokens_per_s: float | None
    peak_memory_gib: float | None
    grad_norm: float | None
    """Mean over the steps that were not skipped."""
    entropy_at_end: float | None
    unlearnt: str = ""
    """Why the run did not learn, by run.json; empty where nothing speaks against it."""


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
    points = {name: dict(run.series[name].points()) for name in CURVES if name in run.series} | {"accuracy": {}}
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
            known = ((record.step, record.metrics[name].value) for record in run.evals if name in record.metrics)
            points["accuracy"] = {step: value for step, value in known if value is not None}
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
        curves={
            name: Series.of({used[step]: value for step, value in by_step.items() if step in used})
            for name, by_step in points.items()
        },
        tokens_per_s=_tokens_per_s(run.series),
        peak_memory_gib=_reduced(np.max, memory.values),
        grad_norm=_reduced(np.mean, grad_norm.values),
        entropy_at_end=_reduced(np.mean, entropy.values[-num_last:]),
        unlearnt=str(run.facts.get("error") or UNLEARNT) if run.facts.get("status") == UNLEARNT else "",
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


@dataclass(frozen=True)
class Reached:
    """Samples until the target, over seeds. `median` is None where half of the seeds or more did not reach it."""

    median: float | None
    num_reached: int
    num_seeds: int

    def __str__(self) -> str:
        share = f"{self.num_reached} of {self.num_seeds} seeds"
        if self.median is None:
            return NOT_REACHED if not self.num_reached else f"{NOT_REACHED} ({share} did)"
        return number(self.median) if self.num_reached == self.num_seeds else f"{number(self.median)} ({share})"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A combination in numbers; None: not recorded."""

    combination: Combination
    tuned: Mapping[str, Any]
    num_finished: int
    num_failed: int
    num_seeds: int
    error: str = ""
    """Why the first of the failed seeds failed."""
    num_unlearnt: int = 0
    """Seeds that finished without learning; every number of the row includes them."""
    unlearnt: str = ""
    """Why the first of them did not."""
    metric: str | None = None
    accuracy: Estimate | None = None
    difference: Estimate | None = None
    num_paired: int = 0
    """Seeds behind `difference`."""
    is_baseline: bool = False
    greedy: float | None = None
    reached: Reached | None = None
    tokens_per_s: float | None = None
    peak_memory_gib: float | None = None
    grad_norm: float | None = None
    entropy_at_end: float | None = None


@dataclass(frozen=True)
class Table:
    """The result of a comparison, as rows and as the words around them."""

    rows: Sequence[Row]
    caption: Sequence[str]
    columns: Sequence[str]
    texts: Sequence[Sequence[str]]
    """The rows as they are shown, under `columns`."""


def make_table(grid: Grid, outcomes: Sequence[Outcome], tuned: Mapping[Combination, Mapping[str, Any]]) -> Table:
    """A row for every combination of the grid, in its order, whatever the order of the runs."""
    runs: dict[Combination, dict[int, Measured]] = {combination: {} for combination in grid.combinations()}
    failed: dict[Combination, list[str]] = {combination: [] for combination in runs}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.cell.recipe.seed):
        combination = outcome.cell.combination
        if outcome.status == "failed":
            failed[combination].append(outcome.error or "")
        if outcome.measured is not None:
            runs[combination][outcome.cell.recipe.seed] = outcome.measured
    rows = []
    for combination, mine in runs.items():
        base = grid.baseline_of(combination)
        pairs = [(runs[base][seed].scores, run.scores) for seed, run in mine.items() if seed in runs[base]]
        pairs = [(old, new) for old, new in pairs if old and new]
        names = {run.metric for run in mine.values()}
        rows.append(
            Row(
                combination=combination,
                tuned=tuned.get(combination, {}),
                num_finished=len(mine),
                num_failed=len(failed[combination]),
                num_seeds=grid.seeds,
                error=next(iter(failed[combination]), ""),
                num_unlearnt=sum(bool(run.unlearnt) for run in mine.values()),
                unlearnt=next((run.unlearnt for run in mine.values() if run.unlearnt), ""),
                metric=names.pop() if len(names) == 1 else None,
                accuracy=_mean_over([run.scores for run in mine.values()], SHARE),
                difference=_mean_over(
                    [{key: new[key] - old[key] for key in new if key in old} for old, new in pairs], (-1.0, 1.0)
                ),
                num_paired=len(pairs),
                is_baseline=base == combination,
                reached=None if grid.target is None else samples_to_target(mine, grid.target),
                greedy=_over_seeds(mine, "greedy"),
                tokens_per_s=_over_seeds(mine, "tokens_per_s"),
                peak_memory_gib=_over_seeds(mine, "peak_memory_gib", max),
                grad_norm=_over_seeds(mine, "grad_norm"),
                entropy_at_end=_over_seeds(mine, "entropy_at_end"),
            )
        )
    caption = _caption(grid, rows, budgets(outcome.cell for outcome in outcomes))
    return Table(rows, caption, *_texts(grid, rows))


def _mean_over(seeds: Sequence[Mapping[str, float]], ends: Ends) -> Estimate | None:
    """Mean over seeds and the problems that all of them have; None where there are none."""
    problems = sorted(set.intersection(*map(set, seeds))) if seeds else []
    return crossed_mean([[values[problem] for problem in problems] for values in seeds], ends) if problems else None


def _over_seeds(
    runs: Mapping[int, Measured], name: str, reduce: Callable[[Sequence[float]], float] = statistics.fmean
) -> float | None:
    """None unless every seed recorded it: a mean over some would be of other runs than its row's."""
    values = [getattr(run, name) for run in runs.values()]
    return reduce(values) if values and None not in values else None


def samples_to_target(runs: Mapping[int, Measured], target: float) -> Reached | None:
    """Over seeds; None where no seed was evaluated with scores."""
    curves = [run.curves["accuracy"] for run in runs.values()]
    found = [
        next((samples for samples, value in curve.points() if value >= target), math.inf)
        for curve in curves
        if len(curve.steps)
    ]
    if not found:
        return None
    middle = statistics.median(found)
    num_reached = sum(map(math.isfinite, found))
    return Reached(middle if math.isfinite(middle) else None, num_reached, len(found))


def _texts(grid: Grid, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Columns, and the rows as they are shown under them."""
    metrics = {row.metric for row in rows if row.metric}
    show_greedy = any(row.greedy is not None for row in rows)
    columns = [*(list(grid.vary) or ["recipe"]), *(f"tuned {key}" for key in grid.tune)]
    columns += [metrics.pop() if len(metrics) == 1 else "avg@k", "difference", *(["greedy"] if show_greedy else [])]
    columns += [] if grid.target is None else [f"samples to {number(100 * grid.target)} %"]
    columns += ["tokens/s", "peak GiB", "gradient norm", "entropy at end", "seeds"]
    texts = []
    for row in rows:
        cells = [label for _, label in row.combination.labels] or [row.combination.name]
        cells += [str(row.tuned[key]) if key in row.tuned else MISSING for key in grid.tune]
        difference = change("accuracy", row.difference)
        if row.is_baseline:
            difference = BASELINE
        elif row.difference is None and row.num_paired:
            difference = NO_PAIRS
        elif row.difference is not None and row.num_paired < row.num_seeds:
            difference += f" ({count(row.num_paired, 'pair of seeds', 'pairs of seeds')})"
        cells += [interval("accuracy", row.accuracy), difference]
        cells += [quantity("accuracy", row.greedy)] if show_greedy else []
        cells += [] if grid.target is None else [MISSING if row.reached is None else str(row.reached)]
        numbers = (row.tokens_per_s, row.peak_memory_gib, row.grad_norm, row.entropy_at_end)
        cells += [quantity("", value) for value in numbers]
        all_finished = row.num_finished == row.num_seeds
        seeds = str(row.num_seeds) if all_finished else f"{row.num_finished} of {row.num_seeds}"
        seeds += f", {row.num_failed} failed" if row.num_failed else ""
        cells.append(seeds + (f", {row.num_unlearnt} {UNLEARNT}" if row.num_unlearnt else ""))
        texts.append(cells)
    return columns, texts


def _caption(grid: Grid, rows: Sequence[Row], tokens: Mapping[Combination, int]) -> list[str]:
    """Explains the numbers of the table, and names every inequality between its rows."""
    lines = [
        "Accuracy is the mean over seeds and problems of the final evaluation. [95 % intervals]: t intervals for seeds and "
        "problems both drawn at random (crossed random effects)."
        if grid.seeds > 1
        else "Accuracy is the mean over problems of the final evaluation. [95 % intervals] are over problems alone: one seed "
        "says nothing about others."
    ]
    base = dict(grid.baseline_of(grid.combinations()[0]).labels)
    chosen = ", ".join(f"{axis}={base[axis]}" for axis in list(grid.baseline) or list(grid.vary)[:1])
    if chosen:
        lines.append(f"Difference: to the row with {chosen} and otherwise the same labels, paired by seed and problem.")
    if grid.target is not None:
        lines.append(
            f"Samples to {number(100 * grid.target)} %: training samples when an evaluation first reached it, median over "
            "finished seeds; evaluations are eval.every steps apart."
        )
    lines.append(
        "Tokens/s: response tokens that the student wrote (of runs that did not record them: all response tokens) by seconds "
        "of training steps, peak GiB: the highest of the seeds, gradient norm: mean over steps that were not skipped, before "
        f"clipping, entropy: of the student, mean over the last {100 * END_SHARE:g} % of the steps."
    )
    if grid.tune:
        tuned = ", ".join(grid.tune)
        lines.append(f"{tuned} tuned for each row by avg@k on the validation split with seed {grid.tune_seed}.")
    if len(rows) > 2:
        lines.append(
            "Each interval is for its row alone. There is no correction for many rows: of twenty rows without a true "
            "difference, one is expected to show one."
        )

    def told(named: Sequence[tuple[Row, int, str]]) -> str:
        """As "gkd (1 of 5: why the first)"."""
        return "; ".join(
            f"{row.combination.name} ({num} of {grid.seeds}: {why[:MAX_REASON_CHARS]})"
            for row, num, why in named
            if num
        )

    if unlearnt := told([(row, row.num_unlearnt, row.unlearnt) for row in rows]):
        lines.append(f"Some runs {UNLEARNT}, and are in the numbers of their rows all the same: {unlearnt}.")
    if any(row.num_finished < grid.seeds for row in rows):
        failed = told([(row, row.num_failed, row.error) for row in rows])
        lines.append(
            "Not every run finished: means, differences and samples to the target rest on the seeds that did, and say "
            f"nothing about the others.{f' Runs failed in {failed}.' if failed else ''}"
        )
    return [*lines, *filter(None, [budget_warning(tokens)])]


def budget_warning(tokens: Mapping[Combination, int]) -> str:
    """Empty if all combinations have the same token budget."""
    if len(set(tokens.values())) <= 1:
        return ""
    usual = Counter(tokens.values()).most_common(1)[0][0]
    listed = "; ".join(f"{combination.name}: {number(each)}" for combination, each in tokens.items() if each != usual)
    return (
        "The token budgets are not equal, so this does not compare equal amounts of training. They are "
        f"{number(usual)}, but {listed}. (Steps x prompts x samples x max_new_tokens, the most that training may take: with "
        f"guided samples beside the others, {MAX_ROUNDS} rounds of prompts under dynamic sampling, and two attempts under "
        "on_reject: resample.)"
    )


def markdown(shown: Table, unfinished: str = "") -> str:
    """A pipe table with its caption above; `unfinished` says at the top what is still to be made."""
    first = [f"**{unfinished}**", ""] if unfinished else []
    table_rows = [shown.columns, ["---"] * len(shown.columns), *shown.texts]
    lines = ("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |" for row in table_rows)
    return "\n".join([*first, *shown.caption, "", *lines]) + "\n"
