"""Nobody answers: the student's first message is its response."""

from __future__ import annotations

from understudy.environments.base import Step
from understudy.types import Message, Prompt


class SingleTurn:
    """The environment of tasks that only grade a response."""

    max_turns = 1

    def step(self, message: Message) -> Step:
        """The episode is over."""
        return Step(done=True)

    def close(self) -> None:
        """Nothing is held."""


SINGLE_TURN = SingleTurn()
"""It has no state, so one serves all episodes; `play` knows it and does not even read the messages."""


def single_turn(prompt: Prompt) -> SingleTurn:
    """Returns `SINGLE_TURN`: for prompts of no task, and for teachers that write their own responses."""
    return SINGLE_TURN
