"""The interfaces of teachers: recipe sections, and the teachers and judges that they open."""

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
"""Tokens that only the teacher has: cut out of its softmax, which is then conditional on the student's tokens, or left in it,
where their probability joins the tail of a top-K row."""
ScoreForm = Literal["argmax", "expectation"]
"""The judge's most likely digit, or the mean digit under its probabilities."""
Rendering = Literal["student", "own"]
"""The student's token ids; or the teacher's own template followed by the student's response."""
CAN: frozenset[Need] = frozenset({"none", "sampled", "topk", "full"})
"""Scores of a full-vocabulary teacher."""


def hash_facts(facts: Sequence[object]) -> str:
    """A hash of facts; values that are not JSON are hashed as strings."""
    return blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def gives_of(can: frozenset[Need], extra_ids: ExtraIds) -> frozenset[Need]:
    """The scores of a full-vocabulary teacher: a full row over the student's tokens has no tail."""
    return can - {"full"} if extra_ids == "tail" else can


def check_need(need: frozenset[Need], k: int | None, gives: frozenset[Need], what: str) -> None:
    """Raises ScoreError for a need that `what` does not provide, ValueError for "topk" without k."""
    if need - gives:
        raise ScoreError(f"{what} cannot give {sorted(need - gives)}; it gives {sorted(gives)}")
    if "topk" in need and (k is None or k < 1):
        raise ValueError(f"need 'topk' asks for k of at least 1; k is {k}")


class Generate(Protocol):
    """Generates a response to each prompt with a model in this process; None if it is truncated."""

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
    """The student's side of the run, as a teacher needs it to open."""

    name: str
    """The teacher's name in `Prompt.teacher`."""
    vocab_size: int
    """Size of the student's vocabulary, which the teacher shares; further rows of its head are cut off."""
    absent: tuple[int, ...] = ()
    """Ids below `vocab_size` that are tokens of teachers only."""
    teacher_tokenizer: Any = None
    """The teacher's own, compared with the student's; None: the student's, or unknown."""
    temperature: float = 1.0
    """The student's; scores are taken at it."""
    device: str | torch.device = "cpu"
    renderer: Renderer | None = None
    """The student's."""
    student: nn.Module | None = None
    """The live model, for a teacher that is the student itself."""
    start: str | None = None
    """The model directory or hub name of the student's initial weights; None for a random initialisation."""
    start_revision: str | None = None
    """Revision of `start`, where that is a hub name."""
    fresh_student: Callable[[], nn.Module] | None = None
    """Rebuilds the initial weights where `start` is None: a resumed run's live model no longer has them."""
    vision: Vision | None = None
    """The teacher's own image processor; None if prompts have no images."""
    seed: int = 0
    share_prompts: bool = True
    """Compute prefixes shared by several samples once."""
    grade: Callable[[Prompt, str], Grade | None] | None = None
    """The task's verdict on a response to a prompt; returns None if it cannot be graded."""
    generate: Generate | None = None

    @property
    def tokenizer(self) -> Any:
        """The student's; None if not given."""
        return None if self.renderer is None else self.renderer.tokenizer

    @property
    def teacher_size(self) -> int:
        """Size of the teacher's vocabulary, at least the student's."""
        own = 0 if self.teacher_tokenizer is None else vocabulary_size(self.teacher_tokenizer)
        return max(own, self.vocab_size)

    @property
    def tail_size(self) -> int | None:
        """Size of the teacher's vocabulary if the student lacks some of its tokens, else None."""
        return self.teacher_size if self.absent or self.teacher_size > self.vocab_size else None


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Requirements of a run on one of its teachers, for the checks of the teacher's section."""

    where: str
    """The section's place in the recipe: "teacher", or "teachers.NAME"."""
    method: str
    k: int
    """Largest K of the top-K rows that the method reads; 0: none."""
    temperature: float
    """The student's."""
    samples_per_prompt: int
    own_samples: bool
    """Whether the student ever trains on its own samples."""
    graded: bool
    """Whether a verifier grades every sample that the teacher scores."""
    start: str | None
    """The student's initial model; None for a random initialisation."""
    lora: bool
    parts: Mapping[str, Task]
    """The parts of the task whose samples the teacher scores, by their place in the recipe."""


class TeacherSection(ABC):
    """A teacher's section of a recipe: what it provides and needs, known before anything is loaded.

    To add a teacher, write a frozen subclass and list it in `teachers.TEACHERS`.
    """

    says_digits: bool = False
    """Whether `open` returns a `Judge`."""
    reads_steps: bool = False
    """Whether it is a judge that can grade each step."""
    writes_responses: bool = False
    """Whether `open` returns a `Responder`."""
    alone: bool = False
    """Whether it must be the run's only teacher."""
    reads_images: bool = False
    """Whether it can score prompts with images: it sees them, or does not need them."""
    rendering: Rendering = "student"
    """How the messages before a response are rendered for the teacher."""
    extra_ids: ExtraIds = "mask"
    """Treatment of tokens outside the student's vocabulary."""
    replays: bool = False
    """Whether training uses its recorded samples instead of new ones."""

    @property
    @abstractmethod
    def gives(self) -> frozenset[Need]:
        """The kinds of scores that the teacher can return. May raise RecipeError."""

    @property
    @abstractmethod
    def shown(self) -> str:
        """Display name: a model or an address."""

    @abstractmethod
    def check(self) -> str:
        """Returns a line for the dry run. Checks the section alone, without loading; raises RecipeError."""

    def check_run(self, run: RunFacts) -> None:
        """Raises RecipeError if the teacher does not fit the run."""

    @abstractmethod
    def open(self, setup: Setup) -> Teacher | Judge:
        """Loads or connects it. Raises RecipeError, VocabularyError, EngineError."""

    @property
    def follows_student(self) -> bool:
        """Whether its weights follow the student's."""
        return False

    @property
    def is_start(self) -> bool:
        """Whether it has the student's initial weights: with LoRA, the live model without its adapters."""
        return False

    @property
    def needs_grades(self) -> bool:
        """Whether a verifier must have graded a sample before it is scored."""
        return False

    @property
    def vocabulary(self) -> Source | None:
        """The tokenizer that must contain the student's tokens; None if it is the student's own, or unknown."""
        return None

    @property
    def weights(self) -> LoadedSection | None:
        """The section itself if it loads weights into this process, else None."""
        return None

    def elsewhere(self, token_env: str) -> tuple[list[str], dict[str, Any]] | None:
        """The `understudy` arguments that serve it on another machine, with `{host}` and `{port}` for the address, and the
        client's section without its url; None if it cannot be served.

        Raises RecipeError for keys that a server does not support.
        """
        return None


def check_rendering(section: TeacherSection, run: RunFacts) -> None:
    """Raises RecipeError if a teacher must render prompts without messages."""
    if section.rendering == "own" and run.parts and not any(part.is_chat for part in run.parts.values()):
        raise RecipeError(
            f"{run.where}.rendering is own, but the problems of {', '.join(run.parts)} are plain text, which every template "
            f"leaves as it is; remove {run.where}.rendering"
        )


@dataclass(frozen=True, kw_only=True)
class LoadedSection(TeacherSection):
    """The keys of every teacher whose weights are loaded into this process."""

    dtype: DType = "auto"
    """ "auto": the checkpoint's own, or the student's if the weights are the student's initial ones."""
    offload: bool = False
    """Keep the weights in host memory between uses."""
    attn_implementation: str | None = None
    """Attention implementation in transformers, such as sdpa or flash_attention_2; None: its default."""

    @property
    @abstractmethod
    def source(self) -> Source | None:
        """The model; None: the student's initial model."""

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
        """Raises RecipeError for a directory without a model."""
        return f"teacher: {self.shown if self.source is None else check_model_dir(self.source.name)}"

    def load(self, device: str | torch.device, vision: Vision | None = None) -> nn.Module:
        """The model of `source`, with its image processor if needed. Raises RecipeError if it cannot be loaded."""
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
    """Its name in `Prompt.teacher`."""
    model: nn.Module | None = None
    """Its model in this process."""
    remote: bool = False
    """Whether it waits for a server."""

    @property
    def origin(self) -> str | None:
        """A hash of what a server or a recording reports to score with; None if the recipe and model files determine it."""
        return None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever scores or verdicts may change; part of the cache key."""

    def close(self) -> None:
        """Cancels requests in flight and closes threads and connections."""


class Recording(Protocol):
    """Previously recorded samples."""

    name: str
    """The teacher that scored them."""

    @property
    def prompt_ids(self) -> frozenset[str]:
        """Prompts that have a recorded sample."""

    def samples_for(self, requests: Sequence[Request]) -> list[Sample | None]:
        """The recorded sample for each request, or None."""


class Teacher(Opened):
    """Scores responses token by token. The concrete methods fit a teacher with frozen weights."""

    concurrency: int = 1
    """Maximum concurrent calls of `score`, each in its own thread."""
    temperature: float | None = None
    """Temperature of its scores, if known."""
    collective: bool = False
    """Whether its weights are sharded: then `score` is a collective call of all ranks."""
    own_end: int | None = None
    """The end-of-turn token of its own rendering, which replaces the student's; None: it reads the student's."""

    @abstractmethod
    def score(self, samples: Sequence[Sample], need: frozenset[Need], *, k: int | None = None) -> list[Scores]:
        """Returns one per sample, in order. Raises ScoreError for a need that this teacher cannot meet.

        A full-vocabulary teacher may also return the most likely tokens of samples with `keep_tokens`; scores must not
        depend on this.
        """

    def head_for(self, name: str | None) -> LMHead | None:
        """The head that maps `Scores.hidden` of that teacher's samples to full rows, or None."""
        return None

    def follow(self, student: nn.Module) -> None:
        """Called after every optimizer update; a teacher that follows the student updates here."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint must save."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state()`."""

    @property
    def max_tokens(self) -> int | None:
        """Length of the longest sequence it can score, if known. May query a server and raise EngineError."""
        return None

    def num_prompt_tokens(self, sample: Sample) -> int:
        """Length of the prompt in this teacher's tokens."""
        return sample.prompt_length

    @property
    def recording(self) -> Recording | None:
        """The recorded samples, if it can score no others."""
        return None

    def members(self) -> dict[str, Teacher]:
        """The teachers it routes to, by name; by default itself."""
        return {self.name: self}

    def uncached(self) -> Teacher:
        """The teacher behind a cache of its scores."""
        return self


class Judge(Opened):
    """Grades responses with a digit; returns no token probabilities."""

    @abstractmethod
    def judge(self, samples: Sequence[Sample], *, score: ScoreForm = "argmax", steps: bool = False) -> list[Verdict]:
        """Returns one verdict per sample, in order; `steps` grades every step, and the lowest digit is the score.

        A reply without a digit gives a verdict without a score, never 0.
        """


class Responder(Protocol):
    """A teacher or judge that generates its own responses, as text."""

    def respond(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float = 0.0) -> list[str | None]:
        """The teacher's response to each prompt; None if it is incomplete."""
        ...
