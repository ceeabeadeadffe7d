"""The interfaces of teachers: their sections of a recipe, and the teachers and judges that these open."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, NamedTuple, Protocol

from understudy.errors import RecipeError, ScoreError
from understudy.lazy import Tensor, nn, torch
from understudy.linear.head import LMHead
from understudy.models import (
    DType,
    Vision,
    check_model_dir,
    load_causal_lm,
    probe_head,
    probe_images,
    vocabulary_size,
)
from understudy.tasks.base import Task
from understudy.tasks.renderer import Renderer
from understudy.types import Grade, Need, Prompt, Request, Sample, Sampling, Scores, Verdict

ExtraIds = Literal["mask", "tail"]
"""Fate of tokens that the teacher has and the student has not: cut out of the teacher's softmax, which is then that given one
of the student's tokens, or left in it, so that their probability is in the tail of a row of K."""
ScoreForm = Literal["argmax", "expectation"]
"""The digit that a judge finds most likely, or the mean of the digits under its probabilities."""
Rendering = Literal["student", "own"]
"""The student's ids; or the teacher's own template, with the student's response behind it."""
CAN: frozenset[Need] = frozenset({"none", "sampled", "topk", "full"})
"""Scores of a teacher whose whole rows can be computed."""


def hash_facts(facts: Sequence[object]) -> str:
    """A hash of facts; one that is no JSON value counts by its text."""
    return blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def gives_of(can: frozenset[Need], extra_ids: ExtraIds) -> frozenset[Need]:
    """The scores of a teacher whose whole rows can be computed: a whole row over the student's tokens has no tail."""
    return can - {"full"} if extra_ids == "tail" else can


def check_need(need: frozenset[Need], k: int | None, gives: frozenset[Need], what: str) -> None:
    """Raises ScoreError for a need that `what` does not give, ValueError for "topk" without k."""
    if need - gives:
        raise ScoreError(f"{what} cannot give {sorted(need - gives)}; it gives {sorted(gives)}")
    if "topk" in need and (k is None or k < 1):
        raise ValueError(f"need 'topk' asks for k of at least 1; k is {k}")


class Generate(Protocol):
    """Writes a response to each prompt with a model of this process; None where one does not end."""

    def __call__(
        self, model: nn.Module, prompts: Sequence[Prompt], sampling: Sampling, *, reader: Renderer | None = None
    ) -> list[str | None]:
        """`reader`: the model's tokenizer with its template; None: the student's or, under `rendering: own`, the teacher's."""
        ...


class Source(NamedTuple):
    """A model or tokenizer: a directory or hub name, with its revision."""

    name: str
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The student's side of the run, which a teacher is opened beside."""

    name: str
    """As prompts name the teacher."""
    vocab_size: int
    """The student's tokens, which the teacher has too; rows of a head past them are cut off."""
    absent: tuple[int, ...] = ()
    """Ids below `vocab_size` that only teachers have a token for."""
    teacher_tokenizer: Any = None
    """The teacher's own, compared with the student's; None: the student's, or nobody says."""
    temperature: float = 1.0
    """The student's; scores are those at it."""
    device: str | torch.device = "cpu"
    renderer: Renderer | None = None
    """The student's."""
    student: nn.Module | None = None
    """The live model, for a teacher that is the student itself."""
    start: str | None = None
    """The model directory or hub name that the student starts from; None for one from scratch."""
    start_revision: str | None = None
    """Revision of `start`, where that is a hub name."""
    fresh_student: Callable[[], nn.Module] | None = None
    """Builds the start again where `start` is None: in a resumed run the live model is not the start any more."""
    vision: Vision | None = None
    """The teacher's own processor of images; None where prompts have none."""
    seed: int = 0
    share_prompts: bool = True
    """Compute once what several samples begin with."""
    grade: Callable[[Prompt, str], Grade | None] | None = None
    """The task's verdict on a response to a prompt; None of it where nobody can judge it."""
    generate: Generate | None = None

    @property
    def tokenizer(self) -> Any:
        """The student's; None where nobody gave one."""
        return None if self.renderer is None else self.renderer.tokenizer

    @property
    def teacher_size(self) -> int:
        """The teacher's tokens, at least the student's."""
        own = 0 if self.teacher_tokenizer is None else vocabulary_size(self.teacher_tokenizer)
        return max(own, self.vocab_size)

    @property
    def tail_size(self) -> int | None:
        """The teacher's tokens where some are not the student's, else None: there is no difference in a tail."""
        return self.teacher_size if self.absent or self.teacher_size > self.vocab_size else None


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """The demands of a run on one of its teachers, for the rules of the teacher's section."""

    where: str
    """The section's place in the recipe: "teacher", or "teachers.NAME"."""
    method: str
    k: int
    """Largest K of the top-K rows that the method reads; 0: none."""
    temperature: float
    """The student's."""
    samples_per_prompt: int
    own_samples: bool
    """Whether the student ever learns from samples of its own."""
    graded: bool
    """Whether a verifier grades every sample that the teacher scores."""
    start: str | None
    """The model that the student starts from; None for one from scratch."""
    lora: bool
    parts: Mapping[str, Task]
    """The parts of the task whose samples the teacher scores, by their place in the recipe."""


class TeacherSection(ABC):
    """A teacher's section of a recipe: what it gives, needs and costs, known before anything is loaded.

    A new teacher is a frozen dataclass of this kind, with a line in `teachers.TEACHERS`.
    """

    says_digits: bool = False
    """Whether `open` returns a `Judge`."""
    reads_steps: bool = False
    """Whether it is a judge that can say a digit for each step."""
    writes_responses: bool = False
    """Whether `open` returns a `Responder`."""
    alone: bool = False
    """Whether it cannot be one of several."""
    reads_images: bool = False
    """Whether it is shown the images of prompts, or needs none of a prompt."""
    rendering: Rendering = "student"
    """The rendering of the messages that the teacher reads before a response."""
    extra_ids: ExtraIds = "mask"
    """Treatment of tokens that the student does not have."""
    replays: bool = False
    """Whether it brings recorded samples, which are trained on in place of new ones."""

    @property
    @abstractmethod
    def gives(self) -> frozenset[Need]:
        """The kinds of scores that the teacher can return. May raise RecipeError."""

    @property
    @abstractmethod
    def shown(self) -> str:
        """The name that people read: a model, or an address."""

    @abstractmethod
    def check(self) -> str:
        """A line for the dry run. Raises RecipeError for what is wrong with the section by itself, without loading."""

    def check_run(self, run: RunFacts) -> None:
        """Raises RecipeError where the teacher does not suit the run."""

    @abstractmethod
    def open(self, setup: Setup) -> Teacher | Judge:
        """Loads or connects it. Raises RecipeError, VocabularyError, EngineError."""

    @property
    def follows_student(self) -> bool:
        """Whether its weights move with the student's."""
        return False

    @property
    def is_start(self) -> bool:
        """Whether it is the student's start: with LoRA that is the live model without its adapters."""
        return False

    @property
    def needs_grades(self) -> bool:
        """Whether a verifier must have graded a sample before it is scored."""
        return False

    @property
    def vocabulary(self) -> Source | None:
        """The tokenizer that must have the student's tokens; None where it is the student's own, or nobody says."""
        return None

    @property
    def weights(self) -> LoadedSection | None:
        """The section itself where it loads weights into this process; None: it loads none."""
        return None

    def elsewhere(self, token_env: str) -> tuple[list[str], dict[str, Any]] | None:
        """Arguments of `understudy` that serve it on another machine, whose address `{host}` and `{port}` stand for, and the
        section that asks there, without its url; None for one that is not served.

        Raises RecipeError for keys that a server lacks.
        """
        return None


def check_rendering(section: TeacherSection, run: RunFacts) -> None:
    """Raises RecipeError where a teacher is to render what has no messages."""
    if section.rendering == "own" and run.parts and not any(part.is_chat for part in run.parts.values()):
        raise RecipeError(
            f"{run.where}.rendering is own, but the problems of {', '.join(run.parts)} are plain text, which every template "
            f"leaves as it is; remove {run.where}.rendering"
        )


@dataclass(frozen=True, kw_only=True)
class LoadedSection(TeacherSection):
    """The keys of every teacher whose weights are loaded into this process."""

    dtype: DType = "auto"
    """ "auto": the checkpoint's own, or the student's where the weights are the student's start."""
    offload: bool = False
    """Keep the weights in host memory between uses."""
    attn_implementation: str | None = None
    """Name of the attention in transformers, such as sdpa or flash_attention_2; None: its choice."""

    @property
    @abstractmethod
    def source(self) -> Source | None:
        """The model; None: the student's start."""

    @property
    def gives(self) -> frozenset[Need]:
        return gives_of(CAN, self.extra_ids)

    @property
    def vocabulary(self) -> Source | None:
        return self.source

    @property
    def weights(self) -> LoadedSection:
        return self

    @property
    def is_start(self) -> bool:
        return self.source is None

    @property
    def shown(self) -> str:
        return "the student's start" if self.source is None else self.source.name

    def check(self) -> str:
        """Raises RecipeError for a directory that is no model."""
        return f"teacher: {self.shown if self.source is None else check_model_dir(self.source.name)}"

    def load(self, device: str | torch.device, vision: Vision | None = None) -> nn.Module:
        """The model of `source`, with its processor of images if it is to read some. Raises RecipeError where it cannot be
        loaded."""
        assert self.source is not None
        model: nn.Module = load_causal_lm(
            self.source.name,
            dtype=self.dtype,
            device="cpu" if self.offload else device,
            attn_implementation=self.attn_implementation,
            revision=self.source.revision,
            vision=vision,
        )
        probe_head(model)
        if vision is not None:
            probe_images(model)
        return model


class Opened(ABC):
    """A teacher or judge that is loaded or connected."""

    name: str
    """As prompts name it (`Prompt.teacher`)."""
    model: nn.Module | None = None
    """Its model in this process."""
    remote: bool = False
    """Whether it waits for a server."""

    @property
    def origin(self) -> str | None:
        """A hash of what a server or a recording says it scores with; None where recipe and files of the model say all."""
        return None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever scores or verdicts may; caches are keyed by it."""

    def close(self) -> None:
        """Gives up what is in flight; nothing is left of threads and connections."""


class Recording(Protocol):
    """Samples that were recorded before."""

    name: str
    """The teacher that scored them."""

    @property
    def prompt_ids(self) -> frozenset[str]:
        """Prompts that have a recorded sample."""

    def samples_for(self, requests: Sequence[Request]) -> list[Sample | None]:
        """The recorded sample for each request; None where there is none."""


class Teacher(Opened):
    """Scores of responses, aligned to their token ids. What is not abstract suits a teacher with frozen weights."""

    concurrency: int = 1
    """Calls of `score` that may run at the same time, each in a thread of its own."""
    temperature: float | None = None
    """Temperature of its scores, where it knows it."""
    collective: bool = False
    """Whether its weights are in shards, so that every rank has to ask it whenever one does."""
    own_end: int | None = None
    """The token that ends a turn in its own rendering, for which the student's stands; None: it reads the student's."""

    @abstractmethod
    def score(self, samples: Sequence[Sample], need: frozenset[Need], *, k: int | None = None) -> list[Scores]:
        """One for each sample, in order. Raises ScoreError for a need that this teacher cannot meet.

        A teacher that forms whole rows for its scores may also name the most likely tokens of samples with `keep_tokens`; no
        score may depend on that.
        """

    def head_for(self, name: str | None) -> LMHead | None:
        """The head that turns `Scores.hidden` of that teacher's samples into whole rows; None where it has none."""
        return None

    def follow(self, student: nn.Module) -> None:
        """Called after every optimizer update; a teacher that moves with the student moves now."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must hold beside the recipe."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state()`."""

    @property
    def max_tokens(self) -> int | None:
        """Tokens of the longest sequence that it scores, where it knows it. May ask a server, and raise EngineError."""
        return None

    def num_prompt_tokens(self, sample: Sample) -> int:
        """Tokens of the prompt as this teacher reads it."""
        return sample.prompt_length

    @property
    def recording(self) -> Recording | None:
        """The samples that it scores, where it scores no others."""
        return None

    def members(self) -> dict[str, Teacher]:
        """The teachers behind it, by name; most stand for themselves."""
        return {self.name: self}

    def uncached(self) -> Teacher:
        """The teacher behind a cache of its scores."""
        return self


class Judge(Opened):
    """Reads a response and says a digit; it shows no probabilities of tokens."""

    @abstractmethod
    def judge(self, samples: Sequence[Sample], *, score: ScoreForm = "argmax", steps: bool = False) -> list[Verdict]:
        """One for each sample, in order; with `steps` of every step of the response, the lowest being the score.

        A reply without a digit is a verdict without a score, never 0.
        """


class Responder(Protocol):
    """A teacher or judge that writes responses of its own, as text."""

    def respond(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float = 0.0) -> list[str | None]:
        """The teacher's own response to each prompt; None where it gave none that is complete."""
        ...
