"""The interface of tasks: where prompts come from, how responses are graded, and what is known before reading data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from understudy.environments import SINGLE_TURN, Environment
from understudy.errors import RecipeError
from understudy.types import Grade, Prompt

Split = Literal["train", "validation", "test"]
Carried = Literal["solution", "reference", "teacher"]


@dataclass(frozen=True)
class Intake:
    """Rows of a split that were read and left out."""

    source: str
    """File, folder, pattern or data set."""
    num_rows: int
    num_skipped: int
    """Rows that lack a value in a field that the recipe names."""
    skipped: tuple[str, ...]
    """The first of them, with place and reason."""
    digest: str
    """Hash of the rows' values in those fields."""
    revision: str | None = None
    """The hub commit that was read."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Facts saved in checkpoints, to detect changed data on resume."""
        return {"source": self.source, "rows": self.num_rows, "digest": self.digest, "revision": self.revision}


class Task(ABC):
    """A source of prompts with a verifier, and its own section of a recipe.

    To add a task, write a frozen subclass and list it in `mix.PARTS`. The concrete methods fit a computed task:
    every prompt has a solution and a reference, and splits are disjoint.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Display name, and prefix of the prompts' ids."""

    @abstractmethod
    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The prompts of a split, always the same in the same order. Raises RecipeError or DataError."""

    @abstractmethod
    def grade(self, prompt: Prompt, text: str) -> Grade:
        """The verdict on one response. Several threads may call it."""

    def reward(self, prompt: Prompt, text: str) -> Grade | None:
        """The reward of one response in training: its grade. None: it cannot be graded and is left out."""
        return self.grade(prompt, text)

    def same_answer(self, prompt: Prompt, one: str, other: str) -> bool:
        """Whether two answers, as the verifier read them, count as the same majority vote; by default, if spelled alike."""
        return one == other

    def gold(self, prompt: Prompt) -> Sequence[str]:
        """Correct responses, one per accepted answer; empty if none is known."""
        return (prompt.solution,) if prompt.solution is not None else prompt.reference or ()

    def grade_episode(self, prompt: Prompt, text: str) -> Grade:
        """The verdict on a response of `gold`'s form, which stands for a whole episode where there is an environment."""
        return self.grade(prompt, text)

    @property
    def mistakes(self) -> Mapping[str, str]:
        """Known mistakes of the data: the key of a problem, the last part of its prompt's id -> what is wrong."""
        return {}

    @property
    def graders(self) -> int:
        """Number of grading threads: more than one if grading waits for another process or machine."""
        return 1

    @property
    def rewards(self) -> bool:
        """Whether `reward` needs no reference."""
        return False

    def environment(self, prompt: Prompt) -> Environment:
        """Returns a new environment for one episode; by default a single turn."""
        return SINGLE_TURN

    def environment_files(self) -> Mapping[str, Mapping[str, str]]:
        """The files that its environments read besides the rows: `source` and `digest`, by key of the section. Raises as
        `check_files`."""
        return {}

    def on_file(self, path: str) -> Task:
        """Returns a task whose every split is the file, read with the keys of this one. Raises ValueError where it has none."""
        raise ValueError(
            "eval.path is read with the keys of the task (prompt_field, ...), which this one has not; write a section "
            "`eval_task: {type: file, path: ..., prompt_field: ...}` in its place"
        )

    def check_files(self) -> None:
        """Raises RecipeError or DataError for errors that can be found without reading everything."""

    def check_split(self, split: Split) -> None:
        """Raises RecipeError if the task has no such split."""

    @property
    def first_split(self) -> Split:
        """The split to train on, or the first one of evaluation-only data."""
        return "train"

    def intake(self, split: Split) -> Intake | None:
        """Intake of a split that has prompts; None for a task that reads nothing. Raises as `prompts`."""
        return None

    def part_of(self, prompt: Prompt) -> str | None:
        """The name of the part that a prompt belongs to; None for a task without parts."""
        return None

    def places(self, section: str = "task") -> Mapping[str, Task]:
        """The tasks that this one consists of, by their place in the recipe; by default itself."""
        return {section: self}

    @property
    def is_local(self) -> bool:
        """Whether its prompts can be read without the network."""
        return True

    @property
    def computed(self) -> bool:
        """Whether prompts are generated on access: millions of them, disjoint over splits by construction."""
        return True

    @property
    def carries(self) -> frozenset[Carried]:
        """Names what prompts have: a whole response to imitate, an answer to grade against, the name of their teacher."""
        return frozenset({"solution", "reference"})

    @property
    def is_chat(self) -> bool:
        """Whether prompts go through the tokenizer's chat template."""
        return False

    @property
    def has_images(self) -> bool:
        """Whether prompts have images, which student and teachers must then read."""
        return False

    @property
    def longest(self) -> int | None:
        """The longest `max_new_tokens` that its prompts have; None: they leave it to the sampling."""
        return None

    @property
    def num_tokens(self) -> int | None:
        """Size of the task's own tokenizer; None: it has none."""
        return None

    def tokenizer(self) -> Any:
        """The task's own tokenizer, for a student from scratch. Raises RecipeError where it has none."""
        raise RecipeError(f"the task {self.name} has no tokenizer of its own; set student.tokenizer")
