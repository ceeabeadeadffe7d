"""The contract between an environment and `play`, and the single-turn environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from understudy.types import Grade, Message, Prompt

DEADLINE_S = 300.0
"""Seconds for one step of an environment that sets no deadline of its own."""


@dataclass(frozen=True)
class Step:
    """An environment's answer to one message. Raises ValueError for a reward outside [0, 1] and for malformed messages."""

    messages: tuple[Mapping[str, Any], ...] = ()
    """The messages that the student reads next, each with strings `role` (not "assistant", which is the student) and
    `content`; after a prompt of plain text only `content` is read. A tool's reply has the role "tool", and `error: True`
    where the call failed."""
    inline: bool = False
    """Whether the contents are inserted verbatim into the student's own turn instead of between two turns of the chat
    template, as for the results of search agents."""
    done: bool = False
    """Whether the episode is over; its messages are then ignored."""
    reward: float | Grade | None = None
    """The score of the whole episode in [0, 1], which replaces the task's verifier; the last one given counts. A `Grade`
    also contains the answer that was read, and what is wrong with it."""

    def __post_init__(self) -> None:
        score = self.reward.score if isinstance(self.reward, Grade) else self.reward
        if score is not None and not 0.0 <= score <= 1.0:
            raise ValueError(f"the reward is {score}; it must lie in [0, 1]")
        for message in self.messages:
            role, content = message.get("role"), message.get("content")
            if not isinstance(role, str) or role == "assistant" or not isinstance(content, str):
                raise ValueError(
                    f"the message {message!r} needs role and content, both strings, of another than the student"
                )


class Environment(Protocol):
    """Answers the student in one episode. `Task.environment(prompt)` makes one for every sample.

    The task makes the prompt, with its system message and tools, so its length is known, and privileged teachers can see
    it, before generation. One thread at a time calls an environment; other episodes may run in other threads.
    An attribute `deadline_s` bounds a step in seconds, `DEADLINE_S` where there is none: a step that takes longer fails, and
    `close` is then called while it may still run. An attribute `stop` is a tuple of strings each of which ends a message of the
    student. An attribute `training_step` is set to the optimizer step whose samples the episode is for, 0 in an evaluation.
    """

    @property
    def max_turns(self) -> int:
        """Maximum number of messages from the student."""

    def step(self, message: Message) -> Step:
        """Answers a message. An exception ends this episode alone (`Sample.finish` is "environment")."""

    def close(self) -> None:
        """Releases the episode's resources. Called once, however it ended."""


class SingleTurn:
    """The environment of tasks that only grade a response: the student's first message."""

    max_turns = 1

    def step(self, message: Message) -> Step:
        """The episode is over."""
        return Step(done=True)

    def close(self) -> None:
        """Nothing is held."""


SINGLE_TURN = SingleTurn()
"""Stateless, so one serves all episodes; `play` skips the messages for it."""


def single_turn(prompt: Prompt) -> SingleTurn:
    """Returns `SINGLE_TURN`, for prompts without a task and for teachers that generate responses."""
    return SINGLE_TURN
