"""The table of a comparison: one row for each combination, each number with the runs that it rests on."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from understudy.compare.grid import Combination, Grid
from understudy.compare.measure import END_SHARE, Measured
from understudy.eval import Estimate, crossed_mean
from understudy.format import MISSING, change, interval, number, quantity
from understudy.trainer.rollouts import MAX_ROUNDS

NOT_REACHED = "not reached"
BASELINE = "baseline"
NO_PAIRS = "no common problems"

Runs = Mapping[int, Measured]
"""Finished runs of one combination, by seed."""


@dataclass(frozen=True)
class Reached:
    """Samples until the target, over seeds. `median` is None where half of the seeds or more did not reach it."""

    median: float | None
    num_reached: int
    num_seeds: int

    def __str__(self) -> str:
        count = f"{self.num_reached} of {self.num_seeds} seeds"
        if self.median is None:
            return NOT_REACHED if not self.num_reached else f"{NOT_REACHED} ({count} did)"
        return number(self.median) if self.num_reached == self.num_seeds else f"{number(self.median)} ({count})"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A combination in numbers; None: not recorded."""

    combination: Combination
    tuned: Mapping[str, Any]
    num_finished: int
    num_failed: int
    num_seeds: int
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


def rows(
    grid: Grid,
    measured: Mapping[Combination, Runs],
    failed: Mapping[Combination, int],
    tuned: Mapping[Combination, Mapping[str, Any]],
) -> list[Row]:
    """A row for every combination of the grid, in its order, whatever the order of the runs."""
    found = []
    for combination in grid.combinations():
        runs = dict(sorted(measured.get(combination, {}).items()))
        base = grid.baseline_of(combination)
        others = measured.get(base, {})
        pairs = {
            seed: (others[seed], run)
            for seed, run in runs.items()
            if seed in others and others[seed].scores and run.scores
        }
        names = {run.metric for run in runs.values()}
        found.append(
            Row(
                combination=combination,
                tuned=tuned.get(combination, {}),
                num_finished=len(runs),
                num_failed=failed.get(combination, 0),
                num_seeds=grid.seeds,
                metric=names.pop() if len(names) == 1 else None,
                accuracy=mean_accuracy(runs),
                difference=paired_accuracy(pairs),
                num_paired=len(pairs),
                is_baseline=base == combination,
                greedy=_over_seeds(statistics.fmean, [run.greedy for run in runs.values()]),
                reached=None if grid.target is None else samples_to_target(runs, grid.target),
                tokens_per_s=_over_seeds(statistics.fmean, [run.tokens_per_s for run in runs.values()]),
                peak_memory_gib=_over_seeds(max, [run.peak_memory_gib for run in runs.values()]),
                grad_norm=_over_seeds(statistics.fmean, [run.grad_norm for run in runs.values()]),
                entropy_at_end=_over_seeds(statistics.fmean, [run.entropy_at_end for run in runs.values()]),
            )
        )
    return found


def mean_accuracy(runs: Runs) -> Estimate | None:
    """Mean over seeds and the problems that all of them have scores for; None where there are none."""
    problems = _common([run.scores for run in runs.values()])
    if not problems:
        return None
    found = crossed_mean([[run.scores[problem] for problem in problems] for run in runs.values()])
    # scores are shares: an interval does not go beyond what they can be
    return Estimate(found.value, max(0.0, found.low), min(1.0, found.high), found.num_problems)


def paired_accuracy(pairs: Mapping[int, tuple[Measured, Measured]]) -> Estimate | None:
    """Mean of (second - first), each pair of the same seed and problem; None without a common problem."""
    problems = _common([run.scores for pair in pairs.values() for run in pair])
    if not problems:
        return None
    return crossed_mean([[new.scores[key] - old.scores[key] for key in problems] for old, new in pairs.values()])


def samples_to_target(runs: Runs, target: float) -> Reached | None:
    """Over seeds; None where no seed was evaluated with scores."""
    found = [run.samples_until(target) for run in runs.values() if len(run.accuracy.steps)]
    if not found:
        return None
    middle = statistics.median([math.inf if samples is None else samples for samples in found])
    num_reached = sum(samples is not None for samples in found)
    return Reached(middle if math.isfinite(middle) else None, num_reached, len(found))


def table(grid: Grid, found: Sequence[Row], caption: Sequence[str]) -> Table:
    """The rows as text."""
    metrics = {row.metric for row in found if row.metric}
    show_greedy = any(row.greedy is not None for row in found)
    columns = [*(list(grid.vary) or ["recipe"]), *(f"tuned {key}" for key in grid.tune)]
    columns += [metrics.pop() if len(metrics) == 1 else "avg@k", "difference", *(["greedy"] if show_greedy else [])]
    columns += [] if grid.target is None else [f"samples to {number(100 * grid.target)} %"]
    columns += ["tokens/s", "peak GiB", "gradient norm", "entropy at end", "seeds"]
    texts = []
    for row in found:
        cells = [label for _, label in row.combination.labels] or [row.combination.name]
        cells += [str(row.tuned[key]) if key in row.tuned else MISSING for key in grid.tune]
        cells += [interval("accuracy", row.accuracy), _difference(row)]
        cells += [quantity("accuracy", row.greedy)] if show_greedy else []
        cells += [] if grid.target is None else [MISSING if row.reached is None else str(row.reached)]
        numbers = (row.tokens_per_s, row.peak_memory_gib, row.grad_norm, row.entropy_at_end)
        cells += [quantity("", value) for value in numbers]
        failed = f", {row.num_failed} failed" if row.num_failed else ""
        all_ended_well = row.num_finished == row.num_seeds
        cells.append(str(row.num_seeds) if all_ended_well else f"{row.num_finished} of {row.num_seeds}{failed}")
        texts.append(cells)
    return Table(found, caption, columns, texts)


def _difference(row: Row) -> str:
    """Signed, in points; "baseline" in the row that others are compared with."""
    if row.is_baseline:
        return BASELINE
    if row.difference is None:
        return NO_PAIRS if row.num_paired else MISSING
    text = change("accuracy", row.difference)
    return text if row.num_paired == row.num_seeds else f"{text} ({row.num_paired} pairs of seeds)"


def caption(grid: Grid, found: Sequence[Row], budgets: Mapping[Combination, int]) -> list[str]:
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
        lines.append(
            f"{', '.join(grid.tune)} tuned for each row by avg@k on the validation split with seed {grid.tune_seed}."
        )
    if len(found) > 2:
        lines.append(
            "Each interval is for its row alone. There is no correction for many rows: of twenty rows without a true "
            "difference, one is expected to show one."
        )
    if any(row.num_finished < grid.seeds for row in found):
        failed = [f"{row.combination.name} ({row.num_failed} of {grid.seeds})" for row in found if row.num_failed]
        told = f" Runs failed in {'; '.join(failed)}." if failed else ""
        lines.append(
            "Not every run finished: means, differences and samples to the target rest on the seeds that did, and say "
            f"nothing about the others.{told}"
        )
    return lines + ([warning] if (warning := budget_warning(budgets)) else [])


def budget_warning(budgets: Mapping[Combination, int]) -> str:
    """Empty where every combination may take equally many tokens."""
    if len(set(budgets.values())) <= 1:
        return ""
    usual = Counter(budgets.values()).most_common(1)[0][0]
    others = [(combination.name, tokens) for combination, tokens in budgets.items() if tokens != usual]
    listed = "; ".join(f"{name}: {number(tokens)}" for name, tokens in others)
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


def _common(scores: Sequence[Mapping[str, float]]) -> list[str]:
    """Problems in all of them, in a fixed order."""
    return sorted(set.intersection(*(set(item) for item in scores))) if scores else []


def _over_seeds(reduce: Callable[[Sequence[float]], float], values: Sequence[float | None]) -> float | None:
    """None unless every seed recorded it: a mean over some would be of other runs than its row's."""
    known = [value for value in values if value is not None]
    return reduce(known) if known and len(known) == len(values) else None
