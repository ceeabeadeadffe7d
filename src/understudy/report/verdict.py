"""Before against after: differences paired by problem, and the one sentence that says whether training helped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from understudy.eval import estimators
from understudy.eval.estimators import LENGTH, RIGHT, SHARE, Estimate, majority_score, pass_at_k
from understudy.format import MISSING, Bounded, Interval, change, count, interval, is_rate
from understudy.report.read import Attempt, EvalRecord

MIN_PROBLEMS = 6
"""With fewer, no outcome is significant: an exact two-sided sign test reaches 2 * 0.5**6 = 0.031 at the earliest."""
_HELD_OUT = ("test", "validation", "valid", "dev", "eval", "heldout", "held-out", "held_out")


@dataclass(frozen=True)
class Comparison:
    """Two evaluations and the attempts at the problems that both have, with equal prompts."""

    before: EvalRecord
    after: EvalRecord
    problems: Mapping[str, tuple[Sequence[Attempt], Sequence[Attempt]]]
    """Attempts before and after, by prompt id."""
    unmatched: int
    """Problems that only one of the two has, or whose prompts differ."""


@dataclass(frozen=True)
class Verdict:
    text: str
    kind: Literal["better", "worse", "same", "unknown"] = "unknown"


@dataclass(frozen=True)
class Row:
    """One metric of the before/after table. `paired`: `change` pairs the attempts by problem."""

    name: str
    before: Interval | None
    after: Interval
    change: Bounded | None
    paired: bool


def compare(before: EvalRecord, after: EvalRecord) -> Comparison:
    """Reads the samples of both evaluations and pairs them by problem."""
    first, last = before.problems(), after.problems()
    shared = [key for key in first if key in last and first[key][0].prompt == last[key][0].prompt]
    problems = {key: (first[key], last[key]) for key in shared}
    return Comparison(before, after, problems, len(first.keys() | last.keys()) - len(shared))


def paired_difference(comparison: Comparison, metric: str) -> Estimate | None:
    """Paired by problem, with an interval over problems.

    A problem that neither side grades is left out, as in the metric itself. None where the samples do not determine the
    metric (a score that only one side has, avg@k or maj@k of another number of attempts).
    """
    pairs = []
    for first, last in comparison.problems.values():
        old, new = problem_value(metric, first), problem_value(metric, last)
        if old is None and new is None:
            continue
        if old is None or new is None:
            return None
        pairs.append((old, new))
    if not pairs:
        return None
    before, after = zip(*pairs, strict=True)
    return estimators.paired_difference(before, after, SHARE if is_rate(metric) else LENGTH)


def problem_value(metric: str, attempts: Sequence[Attempt]) -> float | None:
    """A metric of the attempts at one problem; None where they do not determine it."""
    kind, _, count = metric.partition("@")
    num, k = len(attempts), int(count) if count.isdecimal() else 0
    values: list[float | None] = [attempt.score for attempt in attempts]
    if kind == "mean_tokens":
        values = [attempt.num_tokens for attempt in attempts]
    elif kind == "truncated":
        values = [attempt.finish == "length" if attempt.finish else None for attempt in attempts]
    known = [value for value in values if value is not None]
    if len(known) < num:
        return None
    if kind in ("mean_tokens", "truncated") or (kind == "avg" and k == num):
        return float(np.mean(known))
    if kind == "pass" and 1 <= k <= num:
        return float(pass_at_k([sum(score >= RIGHT for score in known)], num, k)[0])
    if kind == "maj" and k == num:
        return majority_score([attempt.answer for attempt in attempts], known)
    return None


def main_metric(record: EvalRecord) -> str | None:
    """The metric that the verdict is about: avg@k where there is one, else the first that has a value."""
    known = [name for name, item in record.metrics.items() if item.value is not None]
    return next((name for name in known if name.startswith("avg@")), known[0] if known else None)


def shown_metrics(record: EvalRecord) -> list[str]:
    """All but pass@1 and maj@1 beside avg@1: with one attempt they are the same number."""
    same = ("pass@1", "maj@1") if "avg@1" in record.metrics else ()
    return [name for name in record.metrics if name not in same]


def conclude(after: EvalRecord | None, comparison: Comparison | None) -> Verdict:
    """The sentence at the top of the report."""
    if after is None:
        return Verdict("No evaluation was recorded, so this run does not say whether the student got better.")
    name = main_metric(after)
    if name is None:
        return Verdict("The evaluation recorded no metric, so this run does not say what the student can do.")
    is_accuracy = name.startswith("avg@")
    subject = f"Accuracy ({name})" if is_accuracy else name
    noun = "held-out problem" if after.split.lower() in _HELD_OUT else "problem"
    where = (
        f"on an unknown number of {noun}s" if after.num_problems is None else f"on {count(after.num_problems, noun)}"
    )
    if after.split and noun == "problem":
        where += f" of split {after.split!r}"
    new = interval(name, after.metrics[name])
    alone = f"{subject} is {new} {where}"
    if comparison is None:
        return Verdict(f"{alone}, at step {after.step:,}; there is no second evaluation to compare with.")
    before = comparison.before
    old = interval(name, before.metrics.get(name))
    if old == MISSING:
        return Verdict(f"{alone}; the evaluation before did not record {name}, so nothing is compared.")
    if before.split != after.split:
        other = f"before, on another split ({before.split!r}), it was {old}"
        return Verdict(f"{alone}; {other}: the two cannot be compared.")
    paired = paired_difference(comparison, name)
    if paired is None:
        return Verdict(f"{subject} went from {old} to {new} {where}; without the samples of both it cannot be tested.")
    if before.step > 0 and before.path.parent == after.path.parent:
        old += f" at step {before.step:,}, the first evaluation,"
    part = "" if paired.num_problems == after.num_problems else f" over {count(paired.num_problems, 'problem')}"
    says = f"paired difference {change(name, paired)}{part}"
    if paired.num_problems < MIN_PROBLEMS or paired.low is None or paired.high is None:
        reason = "too few problems to tell" if paired.num_problems < MIN_PROBLEMS else "every problem changed alike"
        return Verdict(f"{subject}: {old} before, {new} after {where}; {reason} ({says}).")
    if paired.low <= 0 <= paired.high:
        inside = f"accuracy ({name})" if is_accuracy else name
        text = f"No significant change in {inside}: {old} before, {new} after {where}; the {says} contains 0."
        return Verdict(text, "same")
    rose = paired.value > 0
    text = f"{subject} {'rose' if rose else 'fell'} from {old} to {new} {where}; {says}."
    # only of accuracy is it known which direction is better
    return Verdict(text, "unknown" if not is_accuracy else "better" if rose else "worse")


def rows(before: EvalRecord | None, after: EvalRecord, comparison: Comparison | None) -> list[Row]:
    """Every metric of `after`, with the paired difference where the samples give one and the plain one elsewhere."""
    table = []
    for name in shown_metrics(after):
        new = after.metrics[name]
        old = before.metrics.get(name) if before else None
        paired = paired_difference(comparison, name) if comparison else None
        difference: Bounded | None = paired
        if paired is None and old is not None and old.value is not None and new.value is not None:
            difference = Interval(new.value - old.value)
        table.append(Row(name, old, new, difference, paired is not None))
    return table
