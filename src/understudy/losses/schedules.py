"""Schedules: stateless functions from a step to a number, so a resumed run continues them."""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["constant", "linear", "cosine"]


def cosine_decay(step: int, num_steps: int) -> float:
    """`(1 + cos(pi * min(step / num_steps, 1))) / 2`: 1 at step 0, 0 from `num_steps` on."""
    share = 1.0 if num_steps <= 0 else min(step / num_steps, 1.0)
    return 0.5 * (1.0 + math.cos(math.pi * share))


def linear_decay(step: int, num_steps: int) -> float:
    """`1 - min(step / num_steps, 1)`."""
    return 0.0 if num_steps <= 0 else 1.0 - min(step / num_steps, 1.0)


def learning_rate(
    step: int, *, peak: float, num_steps: int, warmup_steps: int, shape: Shape, final_share: float
) -> float:
    """The learning rate of optimizer step `step` (0-based).

    Linear warm-up over `warmup_steps` (the first step takes `peak / warmup_steps`, not 0), then `shape` from `peak`
    down to `final_share * peak` at the last step, and constant after it.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if shape == "constant":
        return peak
    decay = cosine_decay if shape == "cosine" else linear_decay
    share = decay(step - warmup_steps, num_steps - 1 - warmup_steps)
    return peak * (final_share + (1.0 - final_share) * share)
