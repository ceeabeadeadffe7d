"""The task `verifiers`: episodes of an environment of the package of that name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from understudy.environments import Environment
from understudy.environments.verifiers import Asked, Hosted, Played, World, check_package, open_world
from understudy.errors import DataError, check_range
from understudy.tasks.base import Carried, Split, Task
from understudy.tasks.lazy import LazyPrompts
from understudy.types import Grade, Prompt

_ENDED_EARLY = "the episode was cut off, or its environment gave no reward"
_REFERENCE = "graded by the environment"
"""Says that there is a grade, and nothing more."""


@dataclass(frozen=True, kw_only=True)
class Verifiers(Hosted, Task):
    """The task `verifiers`: an environment of the package verifiers (0.4 and later), with its own tasks, tools and rewards.

    The student is its model. The prompt is what the environment asks first, which must be the same in every episode of a task;
    the sum of its rewards is the score. Training has the first tasks, validation and test those behind them.
    """

    episodes: int | None = None
    """Training tasks; null: all but those of validation and test."""
    held_out: int = 100
    """Tasks of validation, and of the test."""
    reward_low: float = 0.0
    """The sum of rewards that is a score of 0."""
    reward_high: float = 1.0
    """The sum of rewards that is a score of 1."""
    max_turns: int = 10
    """Messages that the student may write."""

    def __post_init__(self) -> None:
        check_range(self, 1, "episodes", off="null takes all but those of validation and test")
        check_range(self, 0, "held_out")
        check_range(self, 1, "max_turns")
        check_range(self, 0, "timeout_s", above=True)
        if self.reward_low >= self.reward_high:
            raise ValueError(f"reward_low is {self.reward_low}; it must be less than reward_high, {self.reward_high}")

    @property
    def name(self) -> str:
        return self.taskset

    @property
    def is_local(self) -> bool:
        return False

    @property
    def is_chat(self) -> bool:
        return True

    @property
    def carries(self) -> frozenset[Carried]:
        return frozenset({"reference"})

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Lazy: an episode is begun for a prompt when it is looked at, which raises EngineError where it does not begin.

        Raises RecipeError where the environment cannot be opened, DataError where it has too few tasks.
        """
        wanted = None if self.episodes is None else self.episodes + 2 * self.held_out
        found = self._world.num_tasks(wanted)
        training = found - 2 * self.held_out
        if training < 1:
            raise DataError(
                f"the taskset {self.taskset} has {found} tasks, of which {2 * self.held_out} are held out; set a lower "
                "task.held_out"
            )
        starts = {"train": 0, "validation": training, "test": training + self.held_out}
        size = training if split == "train" else self.held_out
        return LazyPrompts(self._prompt, range(starts[split], starts[split] + size))

    def check_files(self) -> None:
        """Raises RecipeError where the package is missing; nothing is opened."""
        check_package()

    def gold(self, prompt: Prompt) -> Sequence[str]:
        """None: nobody knows one."""
        return ()

    def grade(self, prompt: Prompt, text: str) -> Grade:
        """Episodes that come to their end are graded there, so this one did not."""
        return Grade(0.0, note=_ENDED_EARLY)

    def environment(self, prompt: Prompt) -> Environment:
        """An episode of its own."""
        number = int(prompt.id.rpartition("/")[2])
        opening = Asked(prompt.messages or (), prompt.tools or ())
        return Played(
            partial(self._world.begin, number),
            self._world.leave,
            opening,
            low=self.reward_low,
            high=self.reward_high,
            max_turns=self.max_turns,
            timeout_s=self.timeout_s,
        )

    @property
    def _world(self) -> World:
        return open_world(Hosted(taskset=self.taskset, env=self.env, timeout_s=self.timeout_s))

    def _prompt(self, number: int) -> Prompt:
        opening = _opening(self._world, number)
        tools = opening.tools or None
        return Prompt(f"{self.taskset}/{number}", messages=opening.messages, tools=tools, reference=(_REFERENCE,))


@lru_cache(maxsize=100_000)
def _opening(world: World, number: int) -> Asked:
    """Asked for once: it costs the beginning of an episode."""
    return world.opening(number)
