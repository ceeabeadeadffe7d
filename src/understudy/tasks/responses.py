"""Given responses: which of a task's prompts they belong to, and whether a tokenizer can encode them.

A row of a file belongs to a prompt that states the same problem, whatever data set, template, letter case and white space
it comes in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from understudy.errors import RecipeError
from understudy.tasks.base import Intake, Task
from understudy.tasks.overlap import normalise, problem_key, wording
from understudy.tasks.records import File, Hub, Records
from understudy.types import Prompt, Sampling

Find = Callable[[Prompt], Sequence[str]]
"""Every distinct response to a prompt's problem, in the order of the data."""


class ResponseSection(ABC):
    """The section `responses`: where a teacher's own responses come from.

    To add a source, write a frozen subclass and list it in `RESPONSES`.
    """

    of_task: bool = False
    """Whether responses are the task's own solutions."""
    by_teacher: bool = False
    """Whether the run's teacher generates them on demand; `find` then returns none."""
    continue_template: str | None = None
    """Its question to the teacher for the rest of a response; None: the built-in one."""

    @property
    @abstractmethod
    def shown(self) -> str:
        """Display name."""

    def check(self) -> str:
        """Returns a line for the dry run, after quick checks. Raises RecipeError or DataError."""
        return f"responses: {self.shown}"

    @property
    def is_local(self) -> bool:
        """Whether all responses can be read without the network."""
        return True

    @property
    def in_run_dir(self) -> bool:
        """Whether they are kept in the run directory."""
        return False

    def intake(self, may_read: Callable[[Task], bool]) -> Intake | None:
        """Rows that are read of files; None where nothing is, or may be. Raises DataError for bad data."""
        return None

    def kept_in(self, folder: Path) -> ResponseSection:
        """The section with everything that it writes in `folder`."""
        return self

    def sampling(self, student: Sampling) -> Sampling:
        """The teacher's sampling, given the student's, if the teacher generates them. Raises ValueError."""
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

    def find(self) -> Find:
        return lambda prompt: () if prompt.solution is None else (prompt.solution,)


@dataclass(frozen=True, kw_only=True)
class RowResponses(ResponseSection):
    """Responses in rows of data, each with its problem. Several rows may answer one prompt."""

    prompt_field: str
    """The bare problem, or a chat; a field may be nested, `a.b`."""
    response_field: str | None = None
    """None: the assistant's turn that ends the chat."""

    @property
    @abstractmethod
    def rows(self) -> Records:
        """The data, with the response as the solution of the problem."""

    @property
    def is_local(self) -> bool:
        return self.rows.is_local

    def check(self) -> str:
        """Reads nothing from the network: of a hub name only the form is checked."""
        self.rows.check_files()
        return super().check()

    def intake(self, may_read: Callable[[Task], bool]) -> Intake | None:
        return self.rows.intake("train") if may_read(self.rows) else None

    def find(self) -> Find:
        rows = self.rows.prompts("train")
        if all(row.solution is None for row in rows):
            raise RecipeError(f"no row of {self.shown} has a response; give responses.response_field")
        found: dict[str, list[str]] = {}
        for row in rows:
            texts = found.setdefault(problem_key(row), [])
            if row.solution is not None and row.solution not in texts:
                texts.append(row.solution)
            # the same list under its wording: computed tasks name their problems themselves
            if len(row.messages or ()) == 1 and (asked := wording(row)) is not None:
                found.setdefault(normalise(asked), texts)

        def find(prompt: Prompt) -> Sequence[str]:
            keys = problem_key(prompt), normalise(wording(prompt) or "")
            return next((found[key] for key in keys if key in found), ())

        return find


@dataclass(frozen=True, kw_only=True)
class FileResponses(RowResponses):
    """Type `file`, also `jsonl`: a file, a folder or a pattern, of the kinds that the task `file` reads."""

    path: str
    """The rows with responses."""

    @property
    def shown(self) -> str:
        return f"{self.path} ({self.response_field or self.prompt_field})"

    @property
    def rows(self) -> File:
        return File(path=self.path, prompt_field=self.prompt_field, solution_field=self.response_field)


@dataclass(frozen=True, kw_only=True)
class HubResponses(RowResponses):
    """Type `hub`: a data set by its name on the hub or as a local folder."""

    dataset: str
    """`owner/name` on the hub, or a folder."""
    config: str | None = None
    """Its configuration, where it has several."""
    split: str = "train"
    """The split with the responses."""
    revision: str | None = None
    """A commit or tag; set it for reproducible results."""

    @property
    def shown(self) -> str:
        return f"{self.dataset}[{self.split}] ({self.response_field or self.prompt_field})"

    @property
    def rows(self) -> Hub:
        return Hub(
            dataset=self.dataset,
            config=self.config,
            split_train=self.split,
            revision=self.revision,
            prompt_field=self.prompt_field,
            solution_field=self.response_field,
        )
