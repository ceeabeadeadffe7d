"""The task `math`: problems whose final answer is compared mathematically."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from understudy.tasks.datasets import Named

BOXED = "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}."
"""The wording of Qwen's evaluations, which most papers on distillation of reasoning train and measure with."""


@dataclass(frozen=True, kw_only=True)
class Mathematics(Named):
    r"""The task `math`: GSM8K, MATH-500, AIME, DAPO-17k and others by name, or a file of problems with answers.

    The student is asked to reason step by step and to put its final answer within `\boxed{}`; `template` asks otherwise. The
    verifier is `math`.
    """

    kind: ClassVar[str] = "math"

    template: str = BOXED
    """The wording around the problem."""
