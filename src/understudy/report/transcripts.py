"""Attempts of the student at the same problems, before and after, grouped by what changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from understudy.eval.estimators import RIGHT
from understudy.report.read import Attempt, read_attempts
from understudy.report.verdict import Comparison, tally

PER_GROUP = 4
MAX_CHARS = 3_000
"""Of one shown text, so that long reasoning does not make the page heavy."""

_GROUPS = (
    ((False, True), "Wrong before, right after"),
    ((True, False), "Right before, wrong after"),
    ((False, False), "Wrong both times"),
    ((True, True), "Right both times"),
    ((None, None), "Not graded"),
)


@dataclass(frozen=True)
class Side:
    heading: str
    kind: str
    """Class of the mark: right, wrong, partly, none."""
    mark: str
    tally: str
    text: str
    left_out: int
    facts: str


@dataclass(frozen=True)
class Problem:
    id: str
    prompt: str
    reference: str | None
    sides: Sequence[Side]


@dataclass(frozen=True)
class Group:
    title: str
    count: str
    problems: Sequence[Problem]


def transcript_groups(comparison: Comparison) -> tuple[list[Group], str]:
    """The first attempts at `PER_GROUP` problems of each group, and what they are in a sentence."""
    members: dict[tuple[bool | None, bool | None], list[str]] = {key: [] for key, _ in _GROUPS}
    for key in comparison.first:
        verdicts = (_right(comparison.first[key][0]), _right(comparison.last[key][0]))
        members[(None, None) if None in verdicts else verdicts].append(key)
    total = len(comparison.first)
    groups = [
        Group(
            title,
            f"{len(members[kind]):,} of {total:,} problems",
            [_pair(key, comparison) for key in members[kind][:PER_GROUP]],
        )
        for kind, title in _GROUPS
        if members[kind]
    ]
    note = (
        "First attempts at the same problems, before and after; the first few of each group, in the order of the "
        "evaluation. All others are in the files under eval/."
    )
    return groups, note if groups else ""


def training_groups(samples: Sequence[tuple[int, Path]]) -> tuple[list[Group], str]:
    """Without two evaluations: responses from training, from the first and the last step that saved any."""
    if not samples:
        return [], "No attempts were recorded."
    groups = []
    for step, path in dict((samples[0], samples[-1])).items():
        attempts = read_attempts(path)[:PER_GROUP]
        problems = [Problem(item.prompt_id, *_cut_head(item), (_side("attempt", [item]),)) for item in attempts]
        groups.append(Group(f"Training samples of step {step:,}", f"{len(problems)} shown", problems))
    return groups, "There are no two evaluations with samples, so these are attempts from training."


def _right(attempt: Attempt) -> bool | None:
    return None if attempt.score is None else attempt.score >= RIGHT


def _pair(key: str, comparison: Comparison) -> Problem:
    first, last = comparison.first[key], comparison.last[key]
    sides = (
        _side(f"before, step {comparison.before.step:,}", first),
        _side(f"after, step {comparison.after.step:,}", last),
    )
    return Problem(key, *_cut_head(first[0]), sides)


def _cut_head(attempt: Attempt) -> tuple[str, str | None]:
    reference = attempt.reference
    return attempt.prompt[:MAX_CHARS], None if reference is None else reference[:MAX_CHARS]


def _side(heading: str, attempts: Sequence[Attempt]) -> Side:
    attempt = attempts[0]
    kind, mark = _mark(attempt.score)
    ends = {"stop": "ended by itself", "length": "cut at the length limit", "data": "from a file"}
    facts = [ends.get(attempt.finish, attempt.finish)]
    facts.append(f"{attempt.num_tokens:,} tokens" if attempt.num_tokens is not None else "")
    facts.append(f"answer read: {attempt.answer[:200]}" if attempt.answer is not None else "no answer read")
    facts.append(attempt.note[:400])
    return Side(
        heading=heading,
        kind=kind,
        mark=mark,
        tally=f"({tally(attempts)})" if len(attempts) > 1 else "",
        text=attempt.response[:MAX_CHARS] or "(empty)",
        left_out=max(0, len(attempt.response) - MAX_CHARS),
        facts=" \u00b7 ".join(fact for fact in facts if fact),
    )


def _mark(score: float | None) -> tuple[str, str]:
    if score is None:
        return "none", "not graded"
    if score >= RIGHT:
        return "right", "right"
    return ("wrong", "wrong") if score <= 0 else ("partly", f"score {100 * score:.0f} %")
