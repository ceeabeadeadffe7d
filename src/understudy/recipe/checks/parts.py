"""Everything that a check looks at, before and after everything is loaded, and what it finds."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from understudy.errors import EngineError, UnderstudyError
from understudy.given import is_given
from understudy.lazy import Tensor, nn, torch
from understudy.models.vocabulary import saved_ends, tokenizer_ends
from understudy.recipe.load import (
    Loaded,
    Teachers,
    data_parts,
    read_intakes,
    response_setup,
)
from understudy.recipe.schema import Recipe
from understudy.recipe.tokenizers import Tokenizers, tokenizer_source
from understudy.tasks import Intake, Task
from understudy.tasks.renderer import Renderer
from understudy.teachers import Source, Teacher, TeacherSection
from understudy.teachers.stores.responses import open_responses
from understudy.trainer.collect import Collected, Collector
from understudy.trainer.loop import Trainer
from understudy.trainer.rollouts import Rollouts
from understudy.types import Prompt

Level = Literal["ok", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "error")
"""The most serious last."""
Stage = Literal["files", "room", "loaded", "rehearsed", "advice"]
"""The input of a check: the recipe with its files and data; models whose sizes are known; everything loaded; samples that
were rehearsed; and all data, read whole, for warnings that no run has to heed. Rules that need the recipe alone are
`rules.RULES`: no recipe is made that breaks one."""
AS_SAID = "as the message says"
MAX_COMPARED = 200_000
"""Training prompts that are looked at one by one: computed tasks have millions."""
NUM_PROMPTS = 32
"""First prompts that are rendered and measured."""
HEALTH_S = 30.0
"""Seconds without an answer after which a server is taken to be gone."""
WAIT_S = 300.0
"""Seconds in which servers have to return samples, verdicts or scores of a few prompts."""
Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor. A check says what it found; its name and what it compares are added."""

    name: str = field(default="", kw_only=True)
    """In a check: one of several things that it looks at. Findings about the same make one: all that is found, the worst
    level, and every advice."""
    checked: str = field(default="", kw_only=True)
    found: str
    level: Level = "ok"
    advice: str = ""
    """The next step; left out where the level is "ok"."""


@dataclass(frozen=True)
class Check:
    """A rule about a run, in one place."""

    name: str
    stage: Stage
    checked: str
    """The two things that are compared, as the report names them."""
    run: Callable[[Any], Iterable[Finding]]
    """Looks at `Files` or, from the stage "loaded" on, `Parts`. No finding: the check does not apply."""

    def __call__(self, parts: Any) -> list[Finding]:
        """Raises what the check raises."""
        findings: dict[str, Finding] = {}
        for item in self.run(parts):
            name = f"{item.name}: {self.name}" if item.name else self.name
            found, level, advice = item.found, item.level, "" if item.level == "ok" else item.advice
            if (seen := findings.get(name)) is not None:
                found, level = f"{seen.found}; {found}", max(seen.level, level, key=LEVELS.index)
                advice = "; ".join(dict.fromkeys(text for text in (seen.advice, advice) if text))
            findings[name] = Finding(found, level, advice, name=name, checked=self.checked)
        return list(findings.values())

    def attempt(self, parts: Any) -> list[Finding]:
        """The findings, or an error with what the check raised: one check that fails must not hide what others find."""
        try:
            return self(parts)
        except UnderstudyError as error:
            found, advice = str(error), AS_SAID
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
            advice = "this check itself failed; report it, or skip all checks with --no-doctor"
        return [Finding(found, "error", advice, name=self.name, checked=self.checked)]


def within(limit_s: float, what: str, call: Callable[[], Returned]) -> Returned:
    """`call()` in a thread of its own. Raises EngineError where it has not returned after `limit_s` seconds.

    The thread then ends with the call's own deadline; it is a daemon, so it does not keep the process.
    """
    future: Future[Returned] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name=f"doctor: {what}", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        raise EngineError(f"{what} has not answered in {limit_s:g} s: see whether its server is up, and what it logs")
    return future.result()


@dataclass(eq=False)
class Files:
    """A recipe before anything is loaded."""

    recipe: Recipe
    training: bool = field(default=True, kw_only=True)
    """False for an evaluation or samples, which need no solutions."""
    fetch: bool = field(default=True, kw_only=True)
    """Whether data and tokenizers that are not on this machine are read from the network; else they stay unchecked."""

    @cached_property
    def tokenizers(self) -> Tokenizers:
        """Each tokenizer is loaded and compared once for all checks and for the run."""
        return Tokenizers(self.recipe)

    @cached_property
    def renderer(self) -> Renderer:
        """The student's tokenizer with its chat template."""
        student, tokenizer = self.recipe.student, self.tokenizers.student
        ends = tokenizer_ends(tokenizer) | (set() if student.model is None else saved_ends(student.model))
        vision = self.tokenizers.vision
        return Renderer(tokenizer, student.template_kwargs, ends, student.template_date, vision, student.on_rewrite)

    @property
    def knows_tokenizer(self) -> bool:
        """Whether the student's tokenizer may be loaded."""
        source = tokenizer_source(self.recipe)
        return source is None or self.has(source)

    def has(self, source: Source) -> bool:
        """Whether a tokenizer may be loaded."""
        return self.fetch or is_given(source.name) or Path(source.name).expanduser().exists()

    @cached_property
    def intakes(self) -> dict[str, Intake]:
        """Intake of each source that may be read, by place in the recipe."""
        return read_intakes(self.recipe, self.training, self.may_read)

    @property
    def written_prompts(self) -> Iterator[Prompt]:
        """Prompts of training and evaluation that are no computed ones and may be read, at most `MAX_COMPARED` of each."""
        for _, part, split in data_parts(self.recipe, self.training):
            if not part.computed and self.may_read(part):
                yield from islice(part.prompts(split), MAX_COMPARED)

    @cached_property
    def spelling(self) -> list[Prompt]:
        """Those of them that spell control tokens."""
        return [prompt for prompt in self.written_prompts if self.renderer.spells_control(prompt)]

    def may_read(self, task: Task) -> bool:
        """Whether the task's prompts may be read."""
        return self.fetch or task.is_local


@dataclass(frozen=True)
class Side:
    """A teacher or a reference, which reads the student's tokens."""

    label: str
    """As people read it: "teacher", "teacher NAME", "reference" or "reference for NAME, NAME"."""
    name: str | None
    """As samples name it; None: the only one, or a reference."""
    teacher: Teacher
    """Without a cache of its scores, which a rehearsal neither reads nor fills."""
    section: TeacherSection


@dataclass(eq=False)
class Parts(Files):
    """A run before its first step."""

    loaded: Loaded
    teachers: Teachers
    rollouts: Rollouts
    """They draw prompts, also where samples are written ahead of the update."""
    trainer: Trainer
    rehearsed: Collected | None = field(default=None, init=False)
    """Few samples with the scores that the method needs; None before the rehearsal, and where it failed."""

    @property
    def knows_tokenizer(self) -> bool:
        return True

    @cached_property
    def renderer(self) -> Renderer:
        return self.loaded.renderer

    @cached_property
    def sides(self) -> list[Side]:
        """Every teacher that gives token scores, and every reference."""
        recipe, reference, found = self.recipe, self.teachers.reference, []
        if self.teachers.teacher is not None:
            for name, teacher in self.teachers.teacher.members().items():
                label, as_named = (f"teacher {name}", name) if recipe.teachers else ("teacher", None)
                found.append(Side(label, as_named, teacher.uncached(), recipe.all_teachers[name]))
        # they are opened by their places in the recipe, and several teachers may have one
        references = {} if reference is None else {one.name: one for one in reference.members().values()}
        for place, section in recipe.all_references.items():
            names = ", ".join(name for name, one in recipe.references.items() if one == section)
            label = f"reference for {names}" if names else "reference"
            found.append(Side(label, None, references[place].uncached(), section))
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
        sides = {side.label: side.teacher.model for side in self.sides if side.teacher.model is not None}
        return {"student": self.loaded.model} | sides

    @property
    def servers(self) -> dict[str, Callable[[], str]]:
        """How the servers of engine, teachers and judge are, by label: a line, or EngineError where one does not answer."""
        named: dict[str, Any] = {"rollout engine": self.rollouts.collector.engine, "judge": self.teachers.judge}
        named |= {side.label: side.teacher for side in self.sides}
        return {label: one.health for label, one in named.items() if hasattr(one, "health")}

    def bounded(self, what: str, call: Callable[[], Returned]) -> Returned:
        """`call()`; where it waits for servers, EngineError after `WAIT_S`."""
        judge = self.teachers.judge
        away = [side.teacher.remote for side in self.sides] + [judge is not None and judge.remote]
        return within(WAIT_S, what, call) if self.servers or any(away) else call()

    @contextmanager
    def short(self, num_prompts: int, max_samples: int, max_new_tokens: int) -> Iterator[Collector]:
        """The collector for few and short samples; responses that a teacher writes for it are forgotten."""
        collector, section = self.rollouts.collector, self.recipe.responses
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
