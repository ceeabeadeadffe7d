"""Grades a task's own gold answers, an empty response and the answers to other problems with its verifier."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from understudy.tasks.base import Task
from understudy.tasks.overlap import normalise, problem_key
from understudy.types import Prompt

Kind = Literal["gold", "empty", "of another problem"]
KINDS: tuple[Kind, ...] = ("gold", "empty", "of another problem")
MAX_GRADERS = 4
"""Threads; a verifier may keep a process for each."""
_MAX_TRIES = 50
"""Problems that are looked at for one with another answer."""


@dataclass(frozen=True)
class Case:
    """A response whose grade is known."""

    kind: Kind
    prompt: Prompt
    response: str

    @property
    def right(self) -> bool:
        """Whether the verifier has to find it right."""
        return self.kind == "gold"


@dataclass(frozen=True)
class Surprise:
    """A case that the verifier sees otherwise."""

    case: Case
    note: str
    """The verifier's reason, or that the answers may be equal."""
    mistake: str
    """The known upstream mistake; empty where none is known."""


@dataclass(frozen=True)
class Audit:
    """The outcome for each kind of case."""

    num_cases: dict[Kind, int]
    surprises: tuple[Surprise, ...]

    @property
    def failed(self) -> bool:
        """Whether a gold answer is wrong without a known mistake, or an empty response right."""
        return any(one.case.kind != "of another problem" and not one.mistake for one in self.surprises)


def cases(task: Task, prompts: Sequence[Prompt]) -> Iterator[Case]:
    """The gold answers, an empty response, and the first gold answer of a later problem whose answers are others."""
    for index, prompt in enumerate(prompts):
        if prompt.reference is None:
            continue
        golds = task.gold(prompt)
        yield from (Case("gold", prompt, response) for response in golds)
        yield Case("empty", prompt, "")
        own = set(map(normalise, prompt.reference))
        for step in range(1, min(_MAX_TRIES, len(prompts))):
            other = prompts[(index + step) % len(prompts)]
            if other.reference is not None and own.isdisjoint(map(normalise, other.reference)):
                yield from (Case("of another problem", prompt, response) for response in task.gold(other)[:1])
                break


def audit(task: Task, known: Sequence[Case], progress: Callable[[int], None] = lambda count: None) -> Audit:
    """Grades every case. `progress` gets the number of those that are done. Raises as the task's verifier does."""

    def grade(case: Case) -> Surprise | None:
        found = task.grade_episode(case.prompt, case.response)
        progress(1)
        if found.right == case.right and (case.right or found.score == 0.0):
            return None
        why = found.note or f"the score is {found.score:g}"
        return Surprise(case, why, task.mistakes.get(problem_key(case.prompt), "") if case.right else "")

    with ThreadPoolExecutor(min(MAX_GRADERS, os.cpu_count() or 1), thread_name_prefix="grade") as pool:
        surprises = tuple(one for one in pool.map(grade, known) if one is not None)
    return Audit({kind: sum(case.kind == kind for case in known) for kind in KINDS}, surprises)
