"""Before against after: differences paired by problem, and the one sentence that says whether training helped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from understudy.eval.estimators import RIGHT, Estimate, majority_score, pass_at_k
from understudy.eval.estimators import paired_difference as bootstrap_difference
from understudy.format import Interval, change, interval, is_rate, metric_note
from understudy.report.read import Attempt, EvalRecord

MIN_PROBLEMS = 6
"""With fewer, no outcome is significant: an exact two-sided sign test reaches 2 * 0.5**6 = 0.031 at the earliest."""
_HELD_OUT = ("test", "validation", "valid", "dev", "eval", "heldout", "held-out", "held_out")

Problems = Mapping[str, Sequence[Attempt]]
"""The attempts at each problem, by prompt id."""


@dataclass(frozen=True)
class Comparison:
    """Two evaluations and the problems that both have, with equal prompts."""

    before: EvalRecord
    after: EvalRecord
    first: Problems
    last: Problems
    """Attempts before and after; the same keys."""
    unmatched: int
    """Problems that only one of the two has, or whose prompts differ."""


@dataclass(frozen=True)
class Verdict:
    kind: Literal["better", "worse", "same", "unknown"]
    text: str


def compare(before: EvalRecord, after: EvalRecord) -> Comparison:
    """Reads the samples of both evaluations and pairs them by problem."""
    first, last = by_problem(before.attempts()), by_problem(after.attempts())
    shared = [key for key in first if key in last and first[key][0].prompt == last[key][0].prompt]
    return Comparison(
        before,
        after,
        {key: first[key] for key in shared},
        {key: last[key] for key in shared},
        len(first.keys() | last.keys()) - len(shared),
    )


def by_problem(attempts: Sequence[Attempt]) -> dict[str, list[Attempt]]:
    problems: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        problems.setdefault(attempt.prompt_id, []).append(attempt)
    return problems


def paired_difference(comparison: Comparison, metric: str) -> Estimate | None:
    """Paired by problem, with a bootstrap interval over problems.

    A problem that neither side grades is left out, as in the metric itself. None where the samples do not determine the
    metric (a score that only one side has, avg@k or maj@k of another number of attempts).
    """
    pairs = []
    for key, first in comparison.first.items():
        old, new = problem_value(metric, first), problem_value(metric, comparison.last[key])
        if old is None and new is None:
            continue
        if old is None or new is None:
            return None
        pairs.append((old, new))
    if not pairs:
        return None
    before, after = zip(*pairs, strict=True)
    return bootstrap_difference(before, after, metric)


def problem_value(metric: str, attempts: Sequence[Attempt]) -> float | None:
    """A metric of the attempts at one problem; None where they do not determine it."""
    kind, _, count = metric.partition("@")
    scores = [attempt.score for attempt in attempts if attempt.score is not None]
    if kind in ("avg", "pass", "maj") and (len(scores) < len(attempts) or not count.isdecimal()):
        return None
    if kind == "pass":
        return _pass_value(scores, int(count))
    if kind in ("avg", "maj") and int(count) != len(attempts):
        return None
    if kind == "maj":
        return majority_score([attempt.answer for attempt in attempts], scores)
    per_attempt: dict[str, Callable[[Attempt], float | None]] = {
        "avg": lambda attempt: attempt.score,
        "mean_tokens": lambda attempt: attempt.num_tokens,
        "truncated": lambda attempt: float(attempt.finish == "length") if attempt.finish else None,
    }
    values = [value for value in map(per_attempt.get(kind, lambda _: None), attempts) if value is not None]
    return None if len(values) < len(attempts) else float(np.mean(values))


def _pass_value(scores: Sequence[float], k: int) -> float | None:
    if not 1 <= k <= len(scores):
        return None
    return float(pass_at_k([sum(score >= RIGHT for score in scores)], len(scores), k)[0])


def main_metric(record: EvalRecord) -> str | None:
    """The metric that the verdict is about: avg@k where there is one, else the first that has a value."""
    known = [name for name, item in record.metrics.items() if item.value is not None]
    return next((name for name in known if name.startswith("avg@")), known[0] if known else None)


def shown_metrics(record: EvalRecord) -> list[str]:
    """All but pass@1 and maj@1 beside avg@1: with one attempt they are the same number."""
    same = ("pass@1", "maj@1") if "avg@1" in record.metrics else ()
    return [name for name in record.metrics if name not in same]


def judge(evals: Sequence[EvalRecord], comparison: Comparison | None) -> Verdict:
    """The sentence at the top of the report."""
    if not evals:
        return Verdict(
            "unknown", "No evaluation was recorded, so this run does not say whether the student got better."
        )
    name = main_metric(evals[-1])
    if name is None:
        return Verdict(
            "unknown", "The evaluation recorded no metric, so this run does not say what the student can do."
        )
    after = f"{_subject(name)} is {interval(name, evals[-1].metrics[name])} {_where(evals[-1])}"
    if comparison is None:
        return Verdict(
            "unknown", f"{after}, at step {evals[-1].step:,}; there is no second evaluation to compare with."
        )
    old = comparison.before.metrics.get(name)
    if old is None or old.value is None:
        return Verdict("unknown", f"{after}; the evaluation before did not record {name}, so nothing is compared.")
    if comparison.before.split != comparison.after.split:
        return Verdict(
            "unknown",
            f"{after}; before, on another split ({comparison.before.split!r}), it was {interval(name, old)}: "
            "the two cannot be compared.",
        )
    return _judge_pair(name, comparison)


def _judge_pair(name: str, comparison: Comparison) -> Verdict:
    old, new = (interval(name, record.metrics[name]) for record in (comparison.before, comparison.after))
    where = _where(comparison.after)
    paired = paired_difference(comparison, name)
    if paired is None:
        text = f"{_subject(name)} went from {old} to {new} {where}; without the samples of both it cannot be tested."
        return Verdict("unknown", text)
    if comparison.before.step > 0 and comparison.before.path.parent == comparison.after.path.parent:
        old += f" at step {comparison.before.step:,}, the first evaluation,"
    part = "" if paired.num_problems == comparison.after.num_problems else f" over {paired.num_problems:,} problems"
    says = f"paired difference {change(name, Interval(paired.value, paired.low, paired.high))}{part}"
    if paired.num_problems < MIN_PROBLEMS:
        return Verdict(
            "unknown", f"{_subject(name)}: {old} before, {new} after {where}; too few problems to tell ({says})."
        )
    if paired.low <= 0 <= paired.high:
        return Verdict(
            "same",
            f"No significant change in {_subject(name, inside=True)}: {old} before, {new} after {where}; "
            f"the {says} contains 0.",
        )
    verb = "rose" if paired.value > 0 else "fell"
    good = name.startswith("avg@")
    kind: Literal["better", "worse", "unknown"] = "unknown" if not good else "better" if paired.value > 0 else "worse"
    return Verdict(kind, f"{_subject(name)} {verb} from {old} to {new} {where}; {says}.")


def _subject(name: str, inside: bool = False) -> str:
    if name.startswith("avg@"):
        return f"{'a' if inside else 'A'}ccuracy ({name})"
    return name


def _where(record: EvalRecord) -> str:
    count = "an unknown number of" if record.num_problems is None else f"{record.num_problems:,}"
    if record.split.lower() in _HELD_OUT:
        return f"on {count} held-out problems"
    return f"on {count} problems" + (f" of split {record.split!r}" if record.split else "")


@dataclass(frozen=True)
class Row:
    """One line of the before/after table; every field is text."""

    name: str
    note: str
    before: str
    after: str
    change: str
    paired: bool
    before_interval: Interval | None = None
    after_interval: Interval | None = None
    rate: bool = False


def rows(before: EvalRecord | None, after: EvalRecord, comparison: Comparison | None) -> list[Row]:
    """Every metric of `after`, with the paired difference where the samples give one and the plain one elsewhere."""
    table = []
    for name in shown_metrics(after):
        new = after.metrics[name]
        old = before.metrics.get(name) if before else None
        paired = paired_difference(comparison, name) if comparison else None
        if paired:
            difference = change(name, Interval(paired.value, paired.low, paired.high))
        elif old is not None and old.value is not None and new.value is not None:
            difference = change(name, Interval(new.value - old.value))
        else:
            difference = "\u2013"
        table.append(
            Row(
                name=name,
                note=metric_note(name),
                before=interval(name, old),
                after=interval(name, new),
                change=difference,
                paired=paired is not None,
                before_interval=old,
                after_interval=new,
                rate=is_rate(name),
            )
        )
    return table


def tally(attempts: Sequence[Attempt]) -> str:
    """As "3 of 4 right"."""
    graded = [attempt.score for attempt in attempts if attempt.score is not None]
    if not graded:
        return "not graded"
    return f"{sum(score >= RIGHT for score in graded)} of {len(graded)} right"
