"""Responses that were written before: which of a task's prompts they belong to, and whether a tokenizer can say them.

A row of a file belongs to a prompt that states the same problem, whatever data set, template, letter case and white space
it comes in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from understudy.errors import DataError
from understudy.tasks.records import NUM_CHECKED_ROWS, Hub, Jsonl, normalise, problem_key
from understudy.types import Prompt


@dataclass(frozen=True, kw_only=True)
class Solutions:
    """The section `responses` of type `solutions`: the task's own solutions."""

    @property
    def shown(self) -> str:
        """For people."""
        return "the solutions of the task"

    def check(self) -> str:
        """Nothing to read; a line for the dry run."""
        return f"responses: {self.shown}"

    def load(self) -> SolutionTexts:
        """Nothing is read: prompts carry their solutions."""
        return SolutionTexts()


class _Rows(ABC):
    """What files and data sets of responses share."""

    @property
    @abstractmethod
    def shown(self) -> str:
        """For people."""

    @abstractmethod
    def rows(self) -> Iterator[Prompt]:
        """Each row as a prompt: the problem its text, the response its solution. Raises RecipeError or DataError."""

    @abstractmethod
    def check(self) -> str:
        """Reads what can be read quickly; a line for the dry run. Raises RecipeError or DataError."""

    def load(self) -> FoundTexts:
        """All rows. Raises RecipeError or DataError."""
        return FoundTexts(self.rows())


@dataclass(frozen=True, kw_only=True)
class JsonlResponses(_Rows):
    """Type `jsonl`: a file of one JSON object per line, `.jsonl` or `.jsonl.gz`. Several rows may answer one prompt."""

    path: str
    prompt_field: str
    """The bare problem, or a chat whose last message is it; a field may be nested, `a.b`."""
    response_field: str

    @property
    def shown(self) -> str:
        return f"{self.path} ({self.response_field})"

    def check(self) -> str:
        """Reads the first rows."""
        if not list(islice(self.rows(), NUM_CHECKED_ROWS)):
            raise DataError(f"{self.shown}: no rows; it must hold at least one response")
        return f"responses: {self.shown}"

    def rows(self) -> Iterator[Prompt]:
        source = Jsonl(path=self.path, prompt_field=self.prompt_field, solution_field=self.response_field, chat=False)
        return (source.to_prompt(place, row) for place, row in source.rows(self.path))


@dataclass(frozen=True, kw_only=True)
class HubResponses(_Rows):
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

    def rows(self) -> Iterator[Prompt]:
        source = self._source
        return (source.to_prompt(place, row) for place, row in source.rows(self.split))

    def check(self) -> str:
        """Of a hub name the form only: nothing is read from the network."""
        self._source.check_files()
        return f"responses: {self.shown}"


class SolutionTexts:
    """`Prompt.solution`."""

    def find(self, prompt: Prompt) -> Sequence[str]:
        """One text, or none."""
        return () if prompt.solution is None else (prompt.solution,)


class FoundTexts:
    """Texts by the problem that they answer. `rows`: prompts whose text is the problem and whose solution is the answer."""

    def __init__(self, rows: Iterator[Prompt]) -> None:
        self._texts: dict[str, list[str]] = {}
        self.num_rows = 0
        for row in rows:
            if row.solution is None:
                continue
            self.num_rows += 1
            texts = self._texts.setdefault(problem_key(row), [])
            if row.solution not in texts:
                texts.append(row.solution)
            # the same list under its wording: computed tasks name their problems themselves
            self._texts[normalise(row.text or "")] = texts

    def find(self, prompt: Prompt) -> Sequence[str]:
        """Every distinct response to the prompt's problem, in the order of the rows."""
        wording = prompt.text if prompt.messages is None else prompt.messages[-1]["content"]
        for key in (problem_key(prompt), normalise(wording or "")):
            if key in self._texts:
                return self._texts[key]
        return ()
