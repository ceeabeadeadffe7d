"""Responses that were written before: which of a task's prompts they belong to, and whether a tokenizer can say them.

A row of a file belongs to a prompt that states the same problem, whatever data set, template, letter case and white space
it comes in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from understudy.errors import DataError
from understudy.tasks.records import NUM_CHECKED_ROWS, Hub, Jsonl, normalise, problem_key
from understudy.types import Prompt, Sampling

Find = Callable[[Prompt], Sequence[str]]
"""Every distinct response to a prompt's problem, in the order in which they were written down."""


class ResponseSection(ABC):
    """The section `responses`: where a teacher's own responses come from.

    A new source is a frozen dataclass of this kind, with a line in `RESPONSES`.
    """

    of_task: bool = False
    """Whether responses are the task's own solutions."""
    by_teacher: bool = False
    """Whether the run's teacher writes them on demand; `find` then knows none."""

    @property
    @abstractmethod
    def shown(self) -> str:
        """The name that people read."""

    @abstractmethod
    def check(self) -> str:
        """A line for the dry run, after reading what can be read quickly. Raises RecipeError or DataError."""

    @property
    def is_local(self) -> bool:
        """Whether all responses can be read without the network."""
        return True

    @property
    def in_run_dir(self) -> bool:
        """Whether they are kept in the run directory."""
        return False

    def kept_in(self, folder: Path) -> ResponseSection:
        """The section with everything that it writes in `folder`."""
        return self

    def sampling(self, student: Sampling) -> Sampling:
        """The teacher's sampling beside the student's, where the teacher writes them. Raises ValueError."""
        return student

    @abstractmethod
    def find(self) -> Find:
        """Reads all responses. Raises RecipeError or DataError."""


@dataclass(frozen=True, kw_only=True)
class Solutions(ResponseSection):
    """The section `responses` of type `solutions`: the task's own solutions."""

    of_task = True

    @property
    def shown(self) -> str:
        return "the solutions of the task"

    def check(self) -> str:
        return f"responses: {self.shown}"

    def find(self) -> Find:
        return lambda prompt: () if prompt.solution is None else (prompt.solution,)


@dataclass(frozen=True, kw_only=True)
class JsonlResponses(ResponseSection):
    """Type `jsonl`: a file of one JSON object per line, `.jsonl` or `.jsonl.gz`. Several rows may answer one prompt."""

    path: str
    prompt_field: str
    """The bare problem, or a chat whose last message is it; a field may be nested, `a.b`."""
    response_field: str

    @property
    def shown(self) -> str:
        return f"{self.path} ({self.response_field})"

    def check(self) -> str:
        if not list(islice(self.rows(), NUM_CHECKED_ROWS)):
            raise DataError(f"{self.shown}: no rows; it must hold at least one response")
        return f"responses: {self.shown}"

    def find(self) -> Find:
        return texts_by_problem(self.rows())

    def rows(self) -> Iterator[Prompt]:
        """Each row as a prompt, the response its solution. Raises RecipeError or DataError."""
        source = Jsonl(path=self.path, prompt_field=self.prompt_field, solution_field=self.response_field, chat=False)
        return (source.to_prompt(place, row) for place, row in source.rows(self.path))


@dataclass(frozen=True, kw_only=True)
class HubResponses(ResponseSection):
    """Type `hub`: a data set by its name on the hub or as a local folder. Several rows may answer one prompt."""

    dataset: str
    prompt_field: str
    response_field: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    """A commit or tag; give it where results are to be repeated."""

    @property
    def shown(self) -> str:
        return f"{self.dataset}[{self.split}] ({self.response_field})"

    @property
    def _source(self) -> Hub:
        return Hub(
            dataset=self.dataset,
            config=self.config,
            split_train=self.split,
            revision=self.revision,
            prompt_field=self.prompt_field,
            solution_field=self.response_field,
            chat=False,
        )

    def find(self) -> Find:
        return texts_by_problem(self.rows())

    @property
    def is_local(self) -> bool:
        return self._source.is_local

    def rows(self) -> Iterator[Prompt]:
        """Each row as a prompt, the response its solution. Raises DataError."""
        source = self._source
        return (source.to_prompt(place, row) for place, row in source.rows(self.split))

    def check(self) -> str:
        """Reads nothing from the network: of a hub name only the form is checked."""
        self._source.check_files()
        return f"responses: {self.shown}"


def texts_by_problem(rows: Iterator[Prompt]) -> Find:
    """Looks up solutions of `rows` by their problem, whatever data set, template or white space it comes in."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.solution is None:
            continue
        texts = found.setdefault(problem_key(row), [])
        if row.solution not in texts:
            texts.append(row.solution)
        # the same list under its wording: computed tasks name their problems themselves
        found[normalise(row.text or "")] = texts

    def find(prompt: Prompt) -> Sequence[str]:
        wording = prompt.text if prompt.messages is None else prompt.messages[-1]["content"]
        keys = problem_key(prompt), normalise(wording or "")
        return next((found[key] for key in keys if key in found), ())

    return find
