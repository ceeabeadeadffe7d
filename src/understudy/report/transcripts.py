"""Attempts of the student at the same problems, before and after, grouped by what changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from understudy.eval.estimators import RIGHT
from understudy.report.read import Attempt, read_attempts
from understudy.report.verdict import Comparison

PER_GROUP = 4
_GROUPS: dict[tuple[bool | None, bool | None], str] = {
    (False, True): "Wrong before, right after",
    (True, False): "Right before, wrong after",
    (False, False): "Wrong both times",
    (True, True): "Right both times",
    (None, None): "Not graded",
}
_ENDS = {
    "stop": "ended by itself",
    "length": "cut at the length limit",
    "data": "from a file",
    "environment": "environment failed",
}


@dataclass(frozen=True)
class Side:
    """The attempts at a problem in one evaluation. The first is shown, the others are only counted."""

    heading: str
    attempts: Sequence[Attempt]

    @property
    def grade(self) -> tuple[str, str]:
        """CSS class and text of the mark."""
        score = self.attempts[0].score
        if score is None:
            return "none", "not graded"
        if score >= RIGHT:
            return "right", "right"
        return ("wrong", "wrong") if score <= 0 else ("partly", f"score {100 * score:.0f} %")

    @property
    def facts(self) -> str:
        """Ending and length of the attempt, the answer that the verifier read, and its note."""
        attempt = self.attempts[0]
        facts = (
            _ENDS.get(attempt.finish, attempt.finish),
            "" if attempt.num_tokens is None else f"{attempt.num_tokens:,} tokens",
            "no answer read" if attempt.answer is None else f"answer read: {attempt.answer[:200]}",
            attempt.note[:400],
        )
        return " \u00b7 ".join(filter(None, facts))


@dataclass(frozen=True)
class Group:
    title: str
    count: str
    problems: Sequence[Sequence[Side]]


def transcript_groups(comparison: Comparison) -> tuple[list[Group], str]:
    """The first attempts at `PER_GROUP` problems of each group, and a sentence that says what they are."""
    members: dict[tuple[bool | None, bool | None], list[str]] = {kind: [] for kind in _GROUPS}
    for key, (first, last) in comparison.problems.items():
        old, new = first[0].score, last[0].score
        members[(None, None) if old is None or new is None else (old >= RIGHT, new >= RIGHT)].append(key)
    before, after = f"before, step {comparison.before.step:,}", f"after, step {comparison.after.step:,}"
    groups = []
    for kind, title in _GROUPS.items():
        pairs = [comparison.problems[key] for key in members[kind][:PER_GROUP]]
        if pairs:
            count = f"{len(members[kind]):,} of {len(comparison.problems):,} problems"
            groups.append(Group(title, count, [(Side(before, first), Side(after, last)) for first, last in pairs]))
    note = (
        "First attempts at the same problems, before and after; the first few of each group, in the order of the "
        "evaluation. All others are in the files under eval/."
    )
    return groups, note if groups else ""


def training_groups(samples: Sequence[tuple[int, Path]]) -> list[Group]:
    """A few of the training samples in each file, those first in which several authors wrote."""
    groups = []
    for step, path in samples:
        attempts = sorted(read_attempts(path), key=lambda attempt: -len(set(attempt.tokens.get("author", ()))))
        problems = [(Side("attempt", [attempt]),) for attempt in attempts[:PER_GROUP]]
        groups.append(Group(f"Training samples of step {step:,}", f"{len(problems)} shown", problems))
    return groups
