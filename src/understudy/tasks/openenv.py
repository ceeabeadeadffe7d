"""The task `openenv`: episodes of an environment behind a URL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from understudy.environments import Environment
from understudy.environments.openenv import Remote, Server, Session, check_package
from understudy.errors import check_range
from understudy.tasks.base import Carried, Split, Task
from understudy.tasks.lazy import LazyPrompts
from understudy.types import Grade, Prompt

_ENDED_EARLY = "the episode was cut off, or its environment gave no reward"
_REFERENCE = "graded by the environment"
"""Says that there is a grade, and nothing more."""


@dataclass(frozen=True, kw_only=True)
class OpenEnv(Server, Task):
    """The task `openenv`: a server with the interface of OpenEnv, or a Gymnasium environment behind it.

    Episode i begins with `reset(seed=i)`, whose observation is the prompt: a seed must always begin the same episode. What
    the student says is the action, and the sum of the rewards is the score. Training has the seeds from 0 on, validation
    and test those behind them.
    """

    system: str | None = None
    """The system message, which may say what an action looks like."""
    reset: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further arguments of every reset."""
    episodes: int = 1000
    """Training episodes."""
    held_out: int = 100
    """Episodes of validation, and of the test."""
    reward_low: float = 0.0
    """The sum of rewards that is a score of 0."""
    reward_high: float = 1.0
    """The sum of rewards that is a score of 1."""
    max_turns: int = 10
    """Messages that the student may write."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, "episodes", "held_out", "max_turns")
        if self.reward_low >= self.reward_high:
            raise ValueError(f"reward_low is {self.reward_low}; it must be less than reward_high, {self.reward_high}")

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

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
        """Lazy: a prompt is asked for when it is looked at, which raises EngineError where the server does not answer."""
        starts = {"train": 0, "validation": self.episodes, "test": self.episodes + self.held_out}
        size = self.episodes if split == "train" else self.held_out
        return LazyPrompts(self._prompt, range(starts[split], starts[split] + size))

    def check_files(self) -> None:
        """Raises RecipeError where the package for connections is missing; nothing is sent."""
        check_package()

    def gold(self, prompt: Prompt) -> Sequence[str]:
        """None: nobody knows one."""
        return ()

    def grade(self, prompt: Prompt, text: str) -> Grade:
        """Episodes that come to their end are graded there, so this one did not."""
        return Grade(0.0, note=_ENDED_EARLY)

    def environment(self, prompt: Prompt) -> Environment:
        """A session of its own."""
        seed = int(prompt.id.rpartition("/")[2])
        bounds = {"low": self.reward_low, "high": self.reward_high}
        return Remote(self, {**self.reset, "seed": seed}, max_turns=self.max_turns, **bounds)

    def _prompt(self, seed: int) -> Prompt:
        said = {"role": "user", "content": self._observations(seed)}
        system = () if self.system is None else ({"role": "system", "content": self.system},)
        return Prompt(f"{self.name}/{seed}", messages=(*system, said), reference=(_REFERENCE,))

    @cached_property
    def _observations(self) -> Any:
        """Seed -> the first observation as text, asked for once."""

        @lru_cache(maxsize=100_000)
        def first(seed: int) -> str:
            session = Session(self)
            try:
                return self.text(session.reset({**self.reset, "seed": seed}))
            finally:
                session.close()

        return first
