"""Tasks whose episodes are started and graded elsewhere: `openenv`, at a URL, and `verifiers`, by the package verifiers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

from understudy.environments import Environment, openenv, verifiers
from understudy.environments.endpoint import Asked, Played
from understudy.errors import DataError, check_range
from understudy.tasks.base import Carried, Split, Task
from understudy.tasks.lazy import LazyPrompts
from understudy.types import Grade, Prompt

_ENDED_EARLY = "the episode was cut off, or its environment gave no reward"
_REFERENCE = "graded by the environment"
"""Says that there is a grade, and nothing more."""


@dataclass(frozen=True, kw_only=True)
class _Hosted(Task):
    """Numbered episodes: training has the first ones, validation and test the next."""

    held_out: int = 100
    """Episodes of validation, and of the test."""
    reward_low: float = 0.0
    """The sum of rewards that is a score of 0."""
    reward_high: float = 1.0
    """The sum of rewards that is a score of 1."""
    max_turns: int = 10
    """Messages that the student may write."""

    def __post_init__(self) -> None:
        check_range(self, 0, "held_out")
        check_range(self, 1, "max_turns")
        if self.reward_low >= self.reward_high:
            raise ValueError(f"reward_low is {self.reward_low}; it must be less than reward_high, {self.reward_high}")

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

        Raises RecipeError where the environment cannot be opened, DataError where it has too few episodes.
        """
        training = self._num_training()
        starts = {"train": 0, "validation": training, "test": training + self.held_out}
        size = training if split == "train" else self.held_out
        return LazyPrompts(self._prompt, range(starts[split], starts[split] + size))

    def gold(self, prompt: Prompt) -> Sequence[str]:
        """None: unknown."""
        return ()

    def grade(self, prompt: Prompt, text: str) -> Grade:
        """Episodes that come to their end are graded there, so this one did not."""
        return Grade(0.0, note=_ENDED_EARLY)

    @abstractmethod
    def _num_training(self) -> int:
        """The number of training episodes."""

    @abstractmethod
    def _prompt(self, number: int) -> Prompt:
        """The opening of an episode."""


@dataclass(frozen=True, kw_only=True)
class OpenEnv(openenv.Server, _Hosted):
    """The task `openenv`: a server with the interface of OpenEnv, or a Gymnasium environment behind it.

    Episode i begins with `reset(seed=i)`, whose observation is the prompt: a seed must always begin the same episode. What
    the student says is the action, and the sum of the rewards is the score.
    """

    system: str | None = None
    """The system message, which may say what an action looks like."""
    reset: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further arguments of every reset."""
    episodes: int = 1000
    """Training episodes."""

    def __post_init__(self) -> None:
        openenv.Server.__post_init__(self)
        _Hosted.__post_init__(self)
        check_range(self, 1, "episodes")

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    def check_files(self) -> None:
        """Raises RecipeError where the package for connections is missing; nothing is sent."""
        openenv.check_package()

    def environment(self, prompt: Prompt) -> Environment:
        """A session of its own."""
        seed = int(prompt.id.rpartition("/")[2])
        bounds = {"low": self.reward_low, "high": self.reward_high}
        return openenv.Remote(self, {**self.reset, "seed": seed}, max_turns=self.max_turns, **bounds)

    def _num_training(self) -> int:
        return self.episodes

    def _prompt(self, number: int) -> Prompt:
        said = {"role": "user", "content": self._observations(number)}
        system = () if self.system is None else ({"role": "system", "content": self.system},)
        return Prompt(f"{self.name}/{number}", messages=(*system, said), reference=(_REFERENCE,))

    @cached_property
    def _observations(self) -> Any:
        """Seed -> the first observation as text, asked for once."""

        @lru_cache(maxsize=100_000)
        def first(seed: int) -> str:
            session = openenv.Session(self)
            try:
                return self.text(session.reset({**self.reset, "seed": seed}))
            finally:
                session.close()

        return first


@dataclass(frozen=True, kw_only=True)
class Verifiers(verifiers.Hosted, _Hosted):
    """The task `verifiers`: an environment of the package verifiers (0.4 and later), with its own tasks, tools and rewards.

    The student is its model. The prompt is what the environment asks first, which must be the same in every episode of a task;
    the sum of its rewards is the score.
    """

    episodes: int | None = None
    """Training tasks; null: all but those of validation and test."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, "episodes", off="null takes all but those of validation and test")
        check_range(self, 0, "timeout_s", above=True)

    @property
    def name(self) -> str:
        return self.taskset

    def check_files(self) -> None:
        """Raises RecipeError where the package is missing; nothing is opened."""
        verifiers.check_package()

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

    def _num_training(self) -> int:
        wanted = None if self.episodes is None else self.episodes + 2 * self.held_out
        found = self._world.num_tasks(wanted)
        if found <= 2 * self.held_out:
            raise DataError(
                f"the taskset {self.taskset} has {found} tasks, of which {2 * self.held_out} are held out; set a lower "
                "task.held_out"
            )
        return found - 2 * self.held_out

    def _prompt(self, number: int) -> Prompt:
        opening = _opening(self._world, number)
        tools = opening.tools or None
        return Prompt(f"{self.taskset}/{number}", messages=opening.messages, tools=tools, reference=(_REFERENCE,))

    @property
    def _world(self) -> verifiers.World:
        return verifiers.open_world(verifiers.Hosted(taskset=self.taskset, env=self.env, timeout_s=self.timeout_s))


@lru_cache(maxsize=100_000)
def _opening(world: verifiers.World, number: int) -> Asked:
    """Asked for once: it costs the beginning of an episode."""
    return world.opening(number)
