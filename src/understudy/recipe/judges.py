"""The teachers, the judge, the reference model and the teacher's own responses of a run, loaded beside its student."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from understudy.engines import HFEngine
from understudy.models import stop_ids
from understudy.recipe.load import Loaded, load_base
from understudy.recipe.schema import Recipe
from understudy.teachers import Chat, Judge, LocalTeacher, RoutedTeacher, Setup, Start, Teacher, Verbal
from understudy.teachers.judges.chat import ChatTeacher
from understudy.teachers.privileged import PrivilegedTeacher
from understudy.teachers.stores.responses import (
    Generate,
    ResponseSetup,
    ResponseStore,
    TeacherResponses,
    open_responses,
)
from understudy.types import Prompt, Request

NUM_CHECKED_PROMPTS = 10_000
"""Training prompts that are looked up among the responses."""


@dataclass(frozen=True)
class Judges:
    """Who judges the student."""

    teacher: Teacher | None = None
    """Gives token scores; of several the one that each sample names."""
    judge: Judge | None = None
    """Says a digit."""
    reference: Teacher | None = None
    several: bool = False

    def close(self) -> None:
        """Ends connections."""
        for one in (self.teacher, self.judge, self.reference):
            if one is not None:
                one.close()

    @property
    def models(self) -> list[nn.Module]:
        """The teachers' models that read what the student reads."""
        found = [self.teacher, self.reference]
        return [one.model for one in found if isinstance(one, LocalTeacher | PrivilegedTeacher)]


def load_judges(recipe: Recipe, loaded: Loaded) -> Judges:
    """The teachers and the reference model at the student's temperature and vocabulary."""
    with ExitStack() as stack:
        judges = _load(recipe, loaded, stack)
        # from here on they are closed by whoever asked for them
        stack.pop_all()
    return judges


def _load(recipe: Recipe, loaded: Loaded, stack: ExitStack) -> Judges:
    opened: dict[str, Any] = {}
    for name, kind in recipe.judges.items():
        opened[name] = kind.open(teacher_setup(recipe, loaded, name))
        stack.callback(opened[name].close)
    asked = recipe.method.needs
    kinds = recipe.judges.items()
    judge = next((opened[name] for name, kind in kinds if isinstance(kind, Verbal | Chat)), None)
    scorers = {name: one for name, one in opened.items() if one is not judge}
    teacher: Teacher | None = RoutedTeacher(scorers) if recipe.teachers else next(iter(scorers.values()), None)
    reference: Teacher | None = None
    if "reference" in asked:
        section = recipe.reference or Start()
        reference = section.open(teacher_setup(recipe, loaded, "reference"))
    return Judges(teacher, judge, reference, several=bool(recipe.teachers))


def teacher_setup(recipe: Recipe, loaded: Loaded, name: str) -> Setup:
    """What a teacher is loaded into."""
    student = recipe.student
    return Setup(
        name=name,
        vocab_size=loaded.vocab_size,
        temperature=recipe.sampling.temperature or 1.0,
        device=loaded.device,
        renderer=loaded.renderer,
        student=loaded.model,
        start=student.model,
        start_revision=student.revision,
        fresh_student=lambda: load_base(
            student, loaded.renderer.tokenizer, loaded.vocab_size, loaded.device, recipe.seed, None
        ),
        seed=recipe.seed,
        cache_dir=Path(recipe.run_dir) / "cache",
    )


def open_store(recipe: Recipe, loaded: Loaded, judges: Judges) -> ResponseStore | None:
    """Where a teacher's own responses come from. Raises RecipeError where none fits."""
    if recipe.responses is None:
        return None
    setup = ResponseSetup(
        renderer=loaded.renderer,
        seed=recipe.seed,
        run_dir=Path(recipe.run_dir),
        sampling=recipe.sampling,
        generate=_writer(recipe, loaded, judges),
        fingerprint=_fingerprint(judges) if isinstance(recipe.responses, TeacherResponses) else None,
    )
    store = open_responses(recipe.responses, setup)
    store.check(recipe.task.prompts("train"), recipe.task.name, limit=NUM_CHECKED_PROMPTS)
    return store


def _fingerprint(judges: Judges) -> str | None:
    teacher = judges.teacher or judges.judge
    return None if teacher is None else teacher.fingerprint


def _writer(recipe: Recipe, loaded: Loaded, judges: Judges) -> Generate | None:
    """Asks the teacher for its own responses; None where it cannot write."""
    if not isinstance(recipe.responses, TeacherResponses):
        return None
    sampling = recipe.responses.sampling(recipe.sampling)
    if isinstance(judges.judge, ChatTeacher):
        chat = judges.judge
        limit, temperature = sampling.max_new_tokens, sampling.temperature
        return lambda prompts: chat.respond(prompts, max_new_tokens=limit, temperature=temperature)
    if isinstance(judges.teacher, RoutedTeacher) or not isinstance(judges.teacher, LocalTeacher):
        return None
    teacher, renderer = judges.teacher, loaded.renderer
    engine = HFEngine(
        teacher.model,
        renderer.tokenizer,
        seed=recipe.seed,
        # the teacher may end its turns with another token than the student
        stop_ids=tuple({*renderer.stop_ids, *stop_ids(renderer.tokenizer, teacher.model)}),
        vocab_size=loaded.vocab_size,
    )

    def write(prompts: Sequence[Prompt]) -> list[str | None]:
        requests = [Request(prompt, 0, renderer.start(prompt)) for prompt in prompts]
        with teacher.on_device():
            written = engine.generate(requests, sampling, step=0, stream="teacher")
        return [None if sample.truncated else sample.text for sample in written]

    return write
