"""What every teacher is, and what it is loaded into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from understudy.linear.head import LMHead
from understudy.tasks.renderer import Renderer
from understudy.types import Need, Prompt, Sample, Scores, Verdict

ScoreForm = Literal["argmax", "expectation"]
"""The digit that a judge finds most likely, or the mean of the digits under its probabilities."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a teacher is loaded into: the student's side of the run."""

    name: str
    """As prompts name the teacher."""
    vocab_size: int
    """Tokens that student and teacher share; rows of a head past them are cut off."""
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
    """Of `start`, where that is a hub name."""
    fresh_student: Callable[[], nn.Module] | None = None
    """Builds the start again where `start` is None: in a resumed run the live model is not the start any more."""
    seed: int = 0
    cache_dir: Path | None = None
    """For results that are expensive to recompute."""

    @property
    def tokenizer(self) -> Any:
        """The student's; None where nobody gave one."""
        return None if self.renderer is None else self.renderer.tokenizer


class Section(Protocol):
    """A teacher's section of a recipe."""

    @property
    def GIVES(self) -> frozenset[Need]:  # noqa: N802 (a constant of most sections)
        """What it can return, known before anything is loaded."""
        ...

    @property
    def shown(self) -> str:
        """How the teacher is named to people: a model, or an address."""
        ...

    def check(self) -> str:
        """What can be found wrong without loading; a line for the dry run. Raises RecipeError."""
        ...

    def open(self, setup: Setup) -> Teacher | Judge:
        """Loads it. Raises RecipeError, VocabularyError."""
        ...


class Teacher(Protocol):
    """Scores of responses, aligned to their token ids."""

    @property
    def name(self) -> str:
        """As prompts name it (`Prompt.teacher`)."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever scores may: what a cache of scores is keyed by."""
        ...

    def head_for(self, name: str | None) -> LMHead | None:
        """With `Scores.hidden` of samples of that teacher it gives whole rows; None where the teacher cannot."""
        ...

    def score(self, samples: Sequence[Sample], need: frozenset[Need], *, k: int | None = None) -> list[Scores]:
        """One for each sample, in order. Raises ScoreError for a need that this teacher cannot meet."""
        ...

    def follow(self, student: nn.Module) -> None:
        """Told after every optimizer update; a teacher that moves with the student moves now."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the recipe; empty for a teacher that does not move."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state()`."""
        ...

    @property
    def concurrency(self) -> int:
        """Calls of `score` that may run at the same time, each in a thread of its own."""
        ...

    @property
    def apart(self) -> bool:
        """Whether it may score while the student learns: not where it runs on the student's weights or follows them."""
        ...

    def close(self) -> None:
        """Gives up what is in flight; nothing is left of threads and connections."""
        ...


class Judge(Protocol):
    """A teacher that shows no probabilities: it reads a response and says a number."""

    @property
    def name(self) -> str:
        """As prompts name it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever verdicts may."""
        ...

    def judge(self, samples: Sequence[Sample], *, score: ScoreForm = "argmax", steps: bool = False) -> list[Verdict]:
        """One for each sample, in order; with `steps` of every step of the response, the lowest being the score.

        A reply without a digit is a verdict without a score, never 0.
        """
        ...

    def close(self) -> None:
        """Gives up what is in flight; nothing is left of threads and connections."""
        ...


class Responder(Protocol):
    """A teacher that is asked for its own responses, as text."""

    def respond(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float = 0.0) -> list[str | None]:
        """The teacher's own response to each prompt; None where it gave none that is complete."""
        ...


class Unmoved:
    """A teacher that stays as it is: nothing follows the student, nothing belongs into a checkpoint."""

    def follow(self, student: nn.Module) -> None:
        """Nothing to do."""

    def state(self) -> dict[str, Tensor]:
        """Nothing to keep."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to restore."""

    @property
    def concurrency(self) -> int:
        """One batch at a time."""
        return 1

    @property
    def apart(self) -> bool:
        """It has weights of its own."""
        return True

    def close(self) -> None:
        """Nothing is open."""
