"""The task `math`: problems whose final answer is compared mathematically."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from understudy import config
from understudy.environments import Environment
from understudy.environments.python import python_tool
from understudy.environments.tools import ToolUse
from understudy.errors import check_range
from understudy.sandbox import SANDBOXES, Sandbox
from understudy.tasks.datasets import Named
from understudy.types import Prompt

BOXED = "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}."
"""The wording of Qwen's evaluations, which most papers on distillation of reasoning train and measure with."""


@dataclass(frozen=True, kw_only=True)
class Mathematics(Named):
    r"""The task `math`: GSM8K, MATH-500, AIME, DAPO-17k and others by name, or a file of problems with answers.

    The student is asked to reason step by step and to put its final answer within `\boxed{}`; `template` asks otherwise. The
    verifier is `math`. With `python` the student may run programs before it answers.
    """

    kind: ClassVar[str] = "math"

    template: str = BOXED
    """The wording around the problem."""
    python: Sandbox | None = config.choice(SANDBOXES, optional=True)
    """The student has a tool that runs Python programs in this sandbox; null: it has no tool."""
    max_turns: int = 8
    """Messages that the student may write, with `python`."""

    def __post_init__(self) -> None:
        if self.python is not None and not self.chat:
            raise ValueError("python is a tool, which needs a chat; leave chat out")
        check_range(self, 1, "max_turns")
        super().__post_init__()

    def check_files(self) -> None:
        super().check_files()
        if self.python is not None:
            self.python.check()

    def to_prompt(self, place: str, row: Mapping[str, Any]) -> Prompt:
        prompt = super().to_prompt(place, row)
        tools = () if self.python is None else (python_tool(self.python).schema,)
        return replace(prompt, tools=(*(prompt.tools or ()), *tools) or None)

    def environment(self, prompt: Prompt) -> Environment:
        """Runs the student's programs until it answers without one."""
        if self.python is None:
            return super().environment(prompt)
        return ToolUse([python_tool(self.python)], max_turns=self.max_turns, max_calls=4, deadline_s=300.0)
