"""A teacher that sees more than the student: a worked solution, feedback, a system prompt (OPSD, SDFT, SDPO).

The response tokens are the student's own, after another prompt, so scores stay aligned with the sample.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from understudy.errors import CheckpointError, DataError, RecipeError
from understudy.lazy import Tensor, nn, no_grad, torch
from understudy.models import unwrap
from understudy.models.parallel import whole
from understudy.teachers.base import ExtraIds, LoadedSection, RunFacts, Setup, Source, hash_facts
from understudy.teachers.local import LocalTeacher, Start
from understudy.teachers.rendering import OtherPrompt
from understudy.types import Prompt, Sample

TEMPLATE = "A correct solution of the problem below, for reference:\n\n{solution}\n\nThe problem:\n\n{prompt}"
PLACEHOLDERS = {
    "prompt": "what the student is asked",
    "solution": "Prompt.solution, from the field that task.solution_field says",
    "reference": "Prompt.reference, the first of the answers that the verifier accepts",
    "feedback": "Sample.grade, which a verifier gives before the teacher is asked; the note is empty where it passed",
}
_PLACEHOLDER = re.compile(rf"\{{({'|'.join(PLACEHOLDERS)})\}}")
_STATE = "ema."


@dataclass(frozen=True, kw_only=True)
class Privileged(LoadedSection):
    """The section of a recipe for a teacher with privileged context. Raises ValueError for keys that contradict each other."""

    reads_images = True

    model: str | None = None
    """A directory or a hub name; None: the student's initial weights."""
    ema: float | None = None
    """Decay d in [0, 1): after every update `teacher <- d * teacher + (1 - d) * student`. None: frozen."""
    template: str = TEMPLATE
    """The teacher's prompt; {prompt}, {solution}, {reference} and {feedback} are replaced, nothing else is."""
    system: str | None = None
    """A system message for the teacher only, added to the chat's own."""
    revision: str | None = None
    """Commit, branch or tag of a hub model."""
    extra_ids: ExtraIds = "mask"
    """As of a local teacher."""

    def __post_init__(self) -> None:
        if "{prompt}" not in self.template:
            raise ValueError("template has no {prompt}, so the teacher would not see the problem")
        for word in re.findall(r"\{(\w+)\}", _PLACEHOLDER.sub("", self.template)):
            close = get_close_matches(word, PLACEHOLDERS, n=1, cutoff=0.75)
            if close:
                raise ValueError(f"template holds {{{word}}}, which nothing replaces; did you mean {{{close[0]}}}?")
        if self.ema is not None and not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema is {self.ema}; a decay lies in [0, 1), and a teacher that never moves has none")
        if self.ema is not None and self.model is not None:
            raise ValueError("ema averages the student's own weights, so model must be left out")
        if self.revision is not None and self.model is None:
            raise ValueError("revision is that of model, which is left out; the student's start has student.revision")

    @property
    def source(self) -> Source | None:
        return None if self.model is None else Source(self.model, self.revision)

    @property
    def follows_student(self) -> bool:
        return self.ema is not None

    @property
    def needs_grades(self) -> bool:
        return "feedback" in self.shows

    @property
    def shown(self) -> str:
        return super().shown if self.ema is None else "the student's moving average"

    def check(self) -> str:
        """Raises RecipeError for a directory that is no model."""
        return f"{super().check()}; it is shown {', '.join(sorted(self.shows))}"

    def _check_student(self, where: str, start: str | None, lora: bool) -> None:
        if self.model is None and start is None:
            raise RecipeError(
                f"{where} is the student's own start, but the student is built from scratch (student.build) and knows "
                f"nothing yet; set {where}.model, or student.model"
            )
        if self.ema is not None and lora:
            raise RecipeError(
                f"{where}.ema averages the student's weights, which needs full fine-tuning; remove student.lora, or "
                f"{where}.ema: the teacher is then the student without its adapters"
            )

    def check_run(self, run: RunFacts) -> None:
        """Raises RecipeError if the student has no initial model, or the template uses fields that samples lack."""
        where = run.where
        self._check_student(where, run.start, run.lora)
        if self.needs_grades and not run.graded:
            raise RecipeError(
                f"{where}.template shows {{feedback}}, which a verifier gives, but the method {run.method} has no samples "
                f"graded; take a method that rewards right answers, or change {where}.template"
            )
        for place, part in run.parts.items():
            for word in ("solution", "reference"):
                if word in self.shows and word not in part.carries:
                    raise RecipeError(
                        f"{where}.template shows {{{word}}}, but {place}.{word}_field does not say where it is; give it, "
                        f"or change {where}.template"
                    )
            if self.system is not None and not part.is_chat:
                raise RecipeError(
                    f"{where}.system is a message of a chat, but the problems of {place} are plain text; put it into "
                    f"{where}.template"
                )

    @property
    def shows(self) -> frozenset[str]:
        """The placeholders in the template."""
        return frozenset(_PLACEHOLDER.findall(self.template))

    def open(self, setup: Setup) -> PrivilegedTeacher:
        """Loads the model. Raises RecipeError where it cannot be, or the student has no start or, with `ema`, adapters."""
        student = setup.student
        self._check_student(setup.name, setup.start, student is not None and unwrap(student) is not student)
        if self.model is not None:
            return PrivilegedTeacher(
                LocalTeacher.beside(setup, self.load(setup.device, setup.vision), self.extra_ids, offload=self.offload),
                self,
                setup,
            )
        start = Start(dtype=self.dtype, offload=self.offload, attn_implementation=self.attn_implementation)
        if self.ema is None:
            return PrivilegedTeacher(start.open(setup), self, setup)
        # in the student's precision, so that the average starts from the unrounded initial weights
        model = replace(start, dtype="auto").load_start(setup)
        average = MovingAverage(model, self.ema, None if self.dtype == "auto" else getattr(torch, self.dtype))
        return PrivilegedTeacher(LocalTeacher.beside(setup, model, offload=self.offload), self, setup, average)


class MovingAverage:
    """`average <- d * average + (1 - d) * student`, in at least float32; `model`, in `dtype`, is the average rounded."""

    def __init__(self, model: nn.Module, decay: float, dtype: torch.dtype | None = None) -> None:
        self._decay = decay
        self._average = {
            name: value.detach().to(torch.promote_types(value.dtype, torch.float32))
            for name, value in model.named_parameters()
        }
        self._model = model if dtype is None else model.to(dtype)
        self._push()

    def follow(self, student: nn.Module) -> None:
        """One update. Raises RecipeError for a student of another architecture."""
        self._move(dict(student.named_parameters()), 1.0 - self._decay, RecipeError, "the student")

    def state(self) -> dict[str, Tensor]:
        """The averages themselves, no copies."""
        return {_STATE + name: value for name, value in self._average.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError for averages of another model."""
        saved = {name.removeprefix(_STATE): value for name, value in state.items()}
        self._move(saved, 1.0, CheckpointError, "the checkpoint's moving average")

    @no_grad
    def _move(
        self, target: Mapping[str, Tensor], share: float, error: type[RecipeError | CheckpointError], whose: str
    ) -> None:
        """Moves by that share towards the target; 1 copies it exactly."""
        ours = self._average
        for name in sorted(ours.keys() | target.keys()):
            if name not in ours or name not in target or ours[name].shape != target[name].shape:
                raise error(
                    f"weight {name!r} of {whose} is not as in the teacher that averages it; both must be of one "
                    "architecture and one recipe"
                )
        for name, average in ours.items():
            average.lerp_(whole(target[name].detach()).to(average), share)
        self._push()

    @no_grad
    def _push(self) -> None:
        for name, value in self._model.named_parameters():
            # in float32 the average is the weight itself
            if value.data_ptr() != self._average[name].data_ptr():
                value.copy_(self._average[name])


class PrivilegedTeacher(OtherPrompt):
    """Scores the response after the prompt that the section builds."""

    def __init__(
        self, inner: LocalTeacher, section: Privileged, setup: Setup, average: MovingAverage | None = None
    ) -> None:
        super().__init__(inner, setup)
        self._local = inner
        self._section = section
        assert setup.renderer is not None
        self._renderer = setup.renderer
        self._average = average
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the current weights and of how prompts are rewritten."""
        if self._fingerprint is None:
            rewording = [self._section.template, self._section.system, self._renderer.settings]
            self._fingerprint = hash_facts([self._local.hash_weights(), rewording])
        return self._fingerprint

    def follow(self, student: nn.Module) -> None:
        if self._average is not None:
            self._average.follow(student)
            self._fingerprint = None

    def state(self) -> dict[str, Tensor]:
        """The averages, in at least float32; empty for a frozen teacher."""
        return {} if self._average is None else self._average.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError for the state of another teacher."""
        if self._average is not None:
            self._average.load_state(state)
            self._fingerprint = None
        elif state:
            raise CheckpointError(
                f"the checkpoint holds {len(state)} tensors of a teacher that moves, but teacher {self.name!r} has no ema; "
                "resume with the recipe that wrote it"
            )

    def _read(self, sample: Sample) -> tuple[Prompt, Tensor]:
        shown = reword(sample, self._section.template, self._section.system)
        return shown, self._renderer.start(shown)


def reword(sample: Sample, template: str, system: str | None = None) -> Prompt:
    """The prompt that the teacher sees: its text, or the last user message, inserted into the template.

    Raises DataError, naming the prompt, if the template uses a missing field, if a chat has no user message, and for a
    system message without a chat.
    """
    prompt = sample.prompt
    if prompt.messages is None:
        if system is not None:
            raise DataError(
                f"prompt {prompt.id} is no chat and takes no system message; move teacher.system into teacher.template"
            )
        told = (prompt.solution, *(prompt.reference or ()), None if sample.grade is None else sample.grade.note)
        quoted = (*prompt.quoted, *filter(None, told)) if prompt.quoted else ()
        return replace(prompt, text=_fill(template, sample, prompt.text or ""), quoted=quoted)
    messages = [dict(message) for message in prompt.messages]
    asked = [message for message in messages if message.get("role") == "user"]
    if not asked:
        raise DataError(f"prompt {prompt.id} has no message of the user to put into the teacher's template")
    asked[-1]["content"] = _fill(template, sample, asked[-1]["content"])
    if system is not None and messages[0].get("role") == "system":
        messages[0]["content"] += f"\n\n{system}"
    elif system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return replace(prompt, messages=tuple(messages))


def _fill(template: str, sample: Sample, asked: str) -> str:
    """Replaces all placeholders in one pass, so that braces in a solution are untouched."""
    values: dict[str, Any] = {
        "prompt": asked,
        "solution": sample.prompt.solution,
        "reference": None if sample.prompt.reference is None else sample.prompt.reference[0],
        "feedback": None if sample.grade is None else sample.grade.note,
    }
    for name in _PLACEHOLDER.findall(template):
        if values[name] is None:
            raise DataError(
                f"prompt {sample.prompt.id} has nothing for {{{name}}} in the teacher's template ({PLACEHOLDERS[name]}); "
                "give it, leave such problems out, or change teacher.template"
            )
    return _PLACEHOLDER.sub(lambda match: str(values[match[1]]), template)
