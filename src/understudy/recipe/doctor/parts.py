"""What is examined: the parts of a run as they were loaded, and the servers behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from understudy.models import load_tokenizer
from understudy.recipe import load
from understudy.recipe.judges import Judges
from understudy.recipe.schema import Recipe
from understudy.teachers import Local, LocalTeacher, Privileged, RoutedTeacher, StoredTeacher, Teacher
from understudy.teachers.judges.chat import ChatTeacher
from understudy.teachers.privileged import PrivilegedTeacher
from understudy.trainer.collect import Collector
from understudy.trainer.loop import Trainer
from understudy.trainer.rollouts import Rollouts
from understudy.types import Prompt

NUM_PROMPTS = 32
"""Of those that are drawn first, to be rendered and measured."""
HEALTH_S = 30.0
"""Until a server that says nothing is taken to be gone."""
NUM_COMPARED = 4
"""Of those, to be rendered with every side's chat template."""


@runtime_checkable
class Healthy(Protocol):
    """What waits for a server and can say whether it is well."""

    def health(self) -> str:
        """What the server says of itself, in a line. Raises EngineError where it does not answer."""
        ...


@dataclass(frozen=True)
class Side:
    """A model beside the student that reads the student's tokens."""

    label: str
    teacher: Teacher
    name: str | None
    """As samples name it; None: the only one, or the reference."""
    source: str | None
    """Directory or hub name of its tokenizer; None where that is the student's, or nobody says."""
    revision: str | None

    @property
    def model(self) -> nn.Module | None:
        """Where it is in this process."""
        return self.teacher.model if isinstance(self.teacher, LocalTeacher | PrivilegedTeacher) else None


@dataclass(frozen=True)
class Parts:
    """A run before its first step."""

    recipe: Recipe
    loaded: load.Loaded
    judges: Judges
    trainer: Trainer

    @property
    def rollouts(self) -> Rollouts:
        """Who draws prompts, also behind an overlap."""
        return rollouts_of(self.trainer)

    @property
    def collector(self) -> Collector:
        """Who writes and scores samples."""
        return self.rollouts.collector

    @property
    def samples_own(self) -> bool:
        """Whether the student ever learns from what it writes."""
        return any(part.plan(0).on_policy_share > 0 for part in self.recipe.method.members)

    @cached_property
    def sides(self) -> list[Side]:
        """Every teacher that gives token scores, and the reference."""
        found = []
        for label, name, teacher in _members(self.judges.teacher):
            found.append(Side(label, teacher, name, *_source(self.recipe.judges.get(name or "teacher"))))
        if self.judges.reference is not None:
            found.append(Side("reference", self.judges.reference, None, *_source(self.recipe.reference)))
        return found

    @cached_property
    def tokenizers(self) -> dict[str, Any]:
        """By label, of the sides that bring one."""
        return {
            side.label: load_tokenizer(side.source, revision=side.revision)
            for side in self.sides
            if side.source is not None
        }

    @cached_property
    def prompts(self) -> list[tuple[Prompt, Tensor]]:
        """Those that are drawn first, rendered. Raises DataError."""
        stream, first = self.rollouts.prompts, self.trainer.progress.position
        chosen = [stream[first + index] for index in range(NUM_PROMPTS)]
        return [(prompt, self.loaded.renderer.start(prompt)) for prompt in chosen]

    @property
    def servers(self) -> dict[str, Callable[[], object]]:
        """How each server says that it is well, by label."""
        named: dict[str, object] = {"rollout engine": self.collector.engine}
        named |= {side.label: uncached(side.teacher) for side in self.sides}
        named["judge"] = self.judges.judge
        found: dict[str, Callable[[], object]] = {}
        for label, one in named.items():
            if isinstance(one, Healthy):
                found[label] = one.health
            elif callable(info := getattr(one, "info", None)):
                found[label] = info
        return found

    @property
    def waits(self) -> bool:
        """Whether samples, scores or verdicts come from servers."""
        away = any(side.model is None and not isinstance(side.teacher, StoredTeacher) for side in self.sides)
        return bool(self.servers) or away or isinstance(self.judges.judge, ChatTeacher)


def _source(section: Any) -> tuple[str | None, str | None]:
    """Where the tokenizer is, and its revision: with the model, or as a served teacher's section says."""
    if isinstance(section, Local | Privileged):
        return section.model, section.revision
    # a judge has a tokenizer of its own, which need not be the student's
    return getattr(section, "tokenizer", None), None


def _members(teacher: Teacher | None) -> Iterator[tuple[str, str | None, Teacher]]:
    if isinstance(teacher, RoutedTeacher):
        yield from ((f"teacher {name}", name, one) for name, one in teacher._teachers.items())
    elif teacher is not None:
        yield "teacher", None, teacher


def rollouts_of(trainer: Trainer) -> Rollouts:
    """Also where they run ahead of the update."""
    given: Any = trainer.rollouts
    found: Rollouts = getattr(given, "rollouts", given)
    return found


def uncached(teacher: Teacher) -> Teacher:
    """The teacher behind a cache of its scores, which a rehearsal neither reads nor fills."""
    if isinstance(teacher, RoutedTeacher):
        return RoutedTeacher({name: uncached(one) for name, one in teacher._teachers.items()})
    inner: Teacher = getattr(teacher, "teacher", teacher)
    return inner


def precision(model: nn.Module | None, compute_dtype: torch.dtype | None = None) -> torch.dtype:
    """That of the numbers that a model gives; bfloat16 for one that is elsewhere."""
    if compute_dtype is not None:
        return compute_dtype
    return torch.bfloat16 if model is None else next(iter(model.parameters())).dtype


Check = tuple[str, str, Callable[[], Any]]
"""Name, what is checked, and the check."""
