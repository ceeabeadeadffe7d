"""Problems of several tasks in turn, each part with a teacher of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from understudy import config
from understudy.environments import Environment
from understudy.errors import DataError
from understudy.tasks.arithmetic import Arithmetic
from understudy.tasks.base import Split, Task
from understudy.tasks.calls import Calls
from understudy.tasks.choice import Choice
from understudy.tasks.code import Code
from understudy.tasks.customers import Customers
from understudy.tasks.in_memory import Rows
from understudy.tasks.instructions import Instructions
from understudy.tasks.lazy import LazyPrompts
from understudy.tasks.math import Mathematics
from understudy.tasks.qa import QuestionAnswering
from understudy.tasks.records import File, Hub
from understudy.tasks.vision import Visual
from understudy.types import Grade, Prompt

PARTS: dict[str, type[Task]] = {
    "arithmetic": Arithmetic,
    "math": Mathematics,
    "choice": Choice,
    "instructions": Instructions,
    "code": Code,
    "calls": Calls,
    "customers": Customers,
    "qa": QuestionAnswering,
    "vision": Visual,
    "file": File,
    "jsonl": File,
    "hub": Hub,
    "rows": Rows,
}
"""`type` of a task, or of a part of a mix -> its section."""
SEPARATOR = "/"
"""Between the name of a part and the part's own id of a prompt."""


@dataclass(frozen=True)
class Mix(Task):
    """The task `mix`: `parts: {addition: {type: arithmetic, ...}, chain: {...}}`.

    Prompts of the parts alternate, as many of each as the shortest part has. The name of a part names the teacher that
    judges its samples, unless the part's own data do.
    """

    parts: Mapping[str, Task] = config.choices(PARTS)
    """Tasks by a name of yours."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts is empty; name at least one task")
        for name in self.parts:
            if SEPARATOR in name:
                raise ValueError(
                    f"a part is named {name!r}; names have no {SEPARATOR!r}, which ends them in a prompt's id"
                )

    @property
    def name(self) -> str:
        return "mix/" + "+".join(self.parts)

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Lazy; the i-th prompt is of part i modulo the number of parts. Raises as the parts do."""
        found = [(name, part.prompts(split)) for name, part in self.parts.items()]

        def prompt(index: int) -> Prompt:
            place, which = divmod(index, len(found))
            name, prompts = found[which]
            chosen = prompts[place]
            return replace(chosen, id=f"{name}{SEPARATOR}{chosen.id}", teacher=chosen.teacher or name)

        return LazyPrompts(prompt, range(len(found) * min(len(prompts) for _, prompts in found)))

    def grade(self, prompt: Prompt, text: str) -> Grade:
        """The verdict of the part that the prompt comes from."""
        return self._part(prompt).grade(prompt, text)

    def reward(self, prompt: Prompt, text: str) -> Grade | None:
        """The reward of the part that the prompt comes from."""
        return self._part(prompt).reward(prompt, text)

    def gold(self, prompt: Prompt) -> Sequence[str]:
        """The right responses that the prompt's part knows."""
        return self._part(prompt).gold(prompt)

    @property
    def mistakes(self) -> Mapping[str, str]:
        return {key: why for part in self.parts.values() for key, why in part.mistakes.items()}

    def environment(self, prompt: Prompt) -> Environment:
        """The environment of the prompt's part."""
        return self._part(prompt).environment(prompt)

    @property
    def graders(self) -> int:
        # a function of the user's is called by one thread
        return 1 if any(part.rewards for part in self.parts.values()) else max(p.graders for p in self.parts.values())

    def _part(self, prompt: Prompt) -> Task:
        part = self.parts.get(prompt.id.partition(SEPARATOR)[0])
        if part is None:
            raise DataError(f"prompt {prompt.id} is of none of the parts {', '.join(self.parts)}")
        return part

    def check_files(self) -> None:
        for part in self.parts.values():
            part.check_files()

    def places(self, section: str = "task") -> Mapping[str, Task]:
        return {f"{section}.parts.{name}": part for name, part in self.parts.items()}

    @property
    def first_split(self) -> Split:
        return next(iter(self.parts.values())).first_split

    @property
    def is_local(self) -> bool:
        return all(part.is_local for part in self.parts.values())

    @property
    def has_images(self) -> bool:
        return any(part.has_images for part in self.parts.values())

    @property
    def computed(self) -> bool:
        return all(part.computed for part in self.parts.values())
