"""The interface of tasks: where prompts come from, how a response is graded, and what is known of both before reading."""

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
    """Rows without a value in one of the fields that the recipe names."""
    skipped: tuple[str, ...]
    """The first of them, with place and reason."""
    digest: str
    """Hash of what the rows say in those fields."""
    revision: str | None = None
    """The commit that the hub gave."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Facts that a checkpoint keeps, to notice other data at a resume."""
        return {"source": self.source, "rows": self.num_rows, "digest": self.digest, "revision": self.revision}


class Task(ABC):
    """A source of prompts with a verifier, and its own section of a recipe.

    A new task is a frozen dataclass of this kind, with a line in `mix.PARTS`. What is not abstract suits a task that is
    computed: every prompt has a solution and a reference, and no prompt stands in two splits.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that people read, and the prefix of the prompts' ids."""

    @abstractmethod
    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The prompts of a split, always the same in the same order. Raises RecipeError or DataError."""

    @abstractmethod
    def grade(self, prompt: Prompt, text: str) -> Grade:
        """The verdict on one response. Several threads may call it."""

    def reward(self, prompt: Prompt, text: str) -> Grade | None:
        """The reward of one response in training: its grade. None: nobody can judge it, so it is left out."""
        return self.grade(prompt, text)

    def same_answer(self, prompt: Prompt, one: str, other: str) -> bool:
        """Whether two answers, as the verifier read them, are one vote of a majority; here where they are spelled alike."""
        return one == other

    def gold(self, prompt: Prompt) -> Sequence[str]:
        """Responses that are right, one for each accepted answer; none where nobody knows one."""
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
        """Threads in which responses are graded: more than one where a grade waits for another process or machine."""
        return 1

    @property
    def rewards(self) -> bool:
        """Whether `reward` needs no reference."""
        return False

    def environment(self, prompt: Prompt) -> Environment:
        """Returns a new environment for one episode: who answers the student. Here nobody does."""
        return SINGLE_TURN

    def environment_files(self) -> Mapping[str, Mapping[str, str]]:
        """The files that its environments read beside the rows: `source` and `digest`, by key of the section. Raises as
        `check_files`."""
        return {}

    def on_file(self, path: str) -> Task:
        """Returns a task whose every split is the file, read with the keys of this one. Raises ValueError where it has none."""
        raise ValueError(
            "eval.path is read with the keys of the task (prompt_field, ...), which this one has not; write a section "
            "`eval_task: {type: file, path: ..., prompt_field: ...}` in its place"
        )

    def check_files(self) -> None:
        """Raises RecipeError or DataError for what can be found wrong without reading everything."""

    def check_split(self, split: Split) -> None:
        """Raises RecipeError where the task has no such split."""

    @property
    def first_split(self) -> Split:
        """The split to train on, or the first of data that is for measuring only."""
        return "train"

    def intake(self, split: Split) -> Intake | None:
        """Intake of a split that has prompts; None for a task that reads nothing. Raises as `prompts`."""
        return None

    def part_of(self, prompt: Prompt) -> str | None:
        """The name of the part that a prompt is of; None for a task without parts."""
        return None

    def places(self, section: str = "task") -> Mapping[str, Task]:
        """The tasks that this one is made of, by their place in the recipe; most stand for themselves."""
        return {section: self}

    @property
    def is_local(self) -> bool:
        """Whether its prompts can be read without the network."""
        return True

    @property
    def computed(self) -> bool:
        """Whether prompts are made when they are looked at: millions of them, disjoint over splits by construction."""
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
        """Whether prompts have images, which student and teachers then have to read."""
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
