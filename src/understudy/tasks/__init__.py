"""Tasks: where prompts come from and how a response is graded. A task is its own section of the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from understudy.tasks.arithmetic import Arithmetic, build_tokenizer
from understudy.tasks.mix import Mix
from understudy.tasks.overlap import num_repeated, overlap, overlap_message
from understudy.tasks.records import Hub, Jsonl
from understudy.tasks.renderer import Renderer, solution_sample, split_by_length
from understudy.types import Grade, Prompt


class Task(Protocol):
    """A source of prompts with a verifier. `grade` is safe to call from several threads."""

    @property
    def name(self) -> str:
        """For people and for file names' sake in reports."""

    def prompts(self, split: Literal["train", "validation", "test"]) -> Sequence[Prompt]:
        """The prompts of a split, always the same in the same order."""

    def grade(self, prompt: Prompt, text: str) -> Grade:
        """The verdict on one response."""

    def check_files(self) -> None:
        """Everything that can be found wrong without reading it all. Raises RecipeError or DataError."""


TASKS: Mapping[str, type[Arithmetic | Jsonl | Hub | Mix]] = {
    "arithmetic": Arithmetic,
    "jsonl": Jsonl,
    "hub": Hub,
    "mix": Mix,
}

__all__ = [
    "TASKS",
    "Arithmetic",
    "Hub",
    "Jsonl",
    "Mix",
    "Renderer",
    "Task",
    "build_tokenizer",
    "num_repeated",
    "overlap",
    "overlap_message",
    "solution_sample",
    "split_by_length",
]
