"""Everything that is loaded for a run, as the checks of the later stages see it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from understudy.recipe.checks.files import Files
from understudy.recipe.checks.findings import within
from understudy.recipe.load import Loaded, Teachers, response_setup
from understudy.recipe.schema import Recipe
from understudy.teachers import Start, Teacher, TeacherSection
from understudy.teachers.stores.responses import open_responses
from understudy.trainer.collect import Collected, Collector
from understudy.trainer.loop import Trainer
from understudy.trainer.rollouts import Rollouts
from understudy.types import Prompt

NUM_PROMPTS = 32
"""First prompts that are rendered and measured."""
HEALTH_S = 30.0
"""Seconds without an answer after which a server is taken to be gone."""
WAIT_S = 300.0
"""Seconds in which servers have to return samples, verdicts or scores of a few prompts."""

Returned = TypeVar("Returned")


@runtime_checkable
class Healthy(Protocol):
    """An engine or teacher whose server says how it is."""

    def health(self) -> str:
        """The server's own description, in a line. Raises EngineError where it does not answer."""
        ...


@dataclass(frozen=True)
class Side:
    """A teacher or the reference, which reads the student's tokens."""

    label: str
    """As people read it: "teacher", "teacher NAME" or "reference"."""
    name: str | None
    """As samples name it; None: the only one, or the reference."""
    teacher: Teacher
    """Without a cache of its scores, which a rehearsal neither reads nor fills."""
    section: TeacherSection

    @property
    def model(self) -> nn.Module | None:
        """Its model in this process."""
        return self.teacher.model


class Parts(Files):
    """A run before its first step."""

    def __init__(
        self, recipe: Recipe, loaded: Loaded, teachers: Teachers, rollouts: Rollouts, trainer: Trainer
    ) -> None:
        super().__init__(recipe)
        self.loaded = loaded
        self.teachers = teachers
        self.rollouts = rollouts
        """They draw prompts, also where samples are written ahead of the update."""
        self.trainer = trainer
        self.rehearsed: Collected | None = None
        """Few samples with the scores that the method needs; None before the rehearsal, and where it failed."""

    @property
    def collector(self) -> Collector:
        """Writes and scores samples."""
        return self.rollouts.collector

    @cached_property
    def sides(self) -> list[Side]:
        """Every teacher that gives token scores, and the reference."""
        recipe, reference, found = self.recipe, self.teachers.reference, []
        if self.teachers.teacher is not None:
            for name, teacher in self.teachers.teacher.members().items():
                label, as_named = (f"teacher {name}", name) if recipe.teachers else ("teacher", None)
                found.append(Side(label, as_named, teacher.uncached(), recipe.all_teachers[name]))
        if reference is not None:
            found.append(Side("reference", None, reference.uncached(), recipe.reference or Start()))
        return found

    @cached_property
    def prompts(self) -> list[tuple[Prompt, Tensor]]:
        """The first that are drawn, rendered. Raises DataError."""
        first = self.trainer.progress.position
        chosen = [self.rollouts.prompts[index] for index in range(first, first + NUM_PROMPTS)]
        return [(prompt, self.loaded.renderer.start(prompt)) for prompt in chosen]

    @property
    def models(self) -> dict[str, nn.Module]:
        """The student's and its teachers' in this process, by label."""
        sides = {side.label: side.model for side in self.sides if side.model is not None}
        return {"student": self.loaded.model} | sides

    @property
    def servers(self) -> dict[str, Healthy]:
        """The engine, teachers and judge that say how they are, by label."""
        named: dict[str, object] = {"rollout engine": self.collector.engine, "judge": self.teachers.judge}
        named |= {side.label: side.teacher for side in self.sides}
        return {label: one for label, one in named.items() if isinstance(one, Healthy)}

    def bounded(self, what: str, call: Callable[[], Returned]) -> Returned:
        """`call()`; where it waits for servers, EngineError after `WAIT_S`."""
        judge = self.teachers.judge
        away = [side.teacher.remote for side in self.sides] + [judge is not None and judge.remote]
        return within(WAIT_S, what, call) if self.servers or any(away) else call()

    @contextmanager
    def short(self, num_prompts: int, max_samples: int, max_new_tokens: int) -> Iterator[Collector]:
        """The collector for few and short samples; responses that a teacher writes for it are forgotten."""
        collector, section = self.collector, self.recipe.responses
        settings, sampling, responses = collector.settings, collector.sampling, collector.responses
        num_samples = min(max_samples, settings.samples_per_prompt)
        sampling = replace(sampling, max_new_tokens=min(max_new_tokens, sampling.max_new_tokens))
        with tempfile.TemporaryDirectory() as folder:
            if section is not None and section.by_teacher:
                section = section.kept_in(Path(folder))
                recipe = replace(self.recipe, responses=section, sampling=sampling)
                # a fingerprint would read all weights, and nobody reads this store again
                setup = response_setup(recipe, self.loaded.renderer, self.teachers.responder, "rehearsal")
                responses = open_responses(section, setup)
            yield replace(
                collector,
                settings=replace(settings, prompts_per_step=num_prompts, samples_per_prompt=num_samples),
                teacher=None if collector.teacher is None else collector.teacher.uncached(),
                sampling=sampling,
                responses=responses,
            )


def precision(model: nn.Module | None, compute_dtype: torch.dtype | None = None) -> torch.dtype:
    """The precision of the numbers that a model gives; bfloat16 for one that is elsewhere."""
    if compute_dtype is not None:
        return compute_dtype
    return torch.bfloat16 if model is None else next(iter(model.parameters())).dtype
