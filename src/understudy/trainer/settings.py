"""The sections `train`, `async` and `eval` of a recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from understudy.losses.schedules import Shape
from understudy.tasks import Split
from understudy.types import Sampling


def _check(section: object, low: float, *names: str, high: float = math.inf) -> None:
    for name in names:
        value = getattr(section, name)
        # not (value < low or ...), so that NaN is refused too
        if value is not None and not (low <= value <= high and value < math.inf):
            limit = "finite" if high == math.inf else f"at most {high:g}"
            raise ValueError(f"{name} is {value}; it must be at least {low:g}, and {limit}")


@dataclass(frozen=True, kw_only=True)
class Train:
    """The section `train`. A step draws prompts, samples responses, scores them and makes optimizer updates."""

    steps: int
    prompts_per_step: int = 64
    samples_per_prompt: int = 1
    minibatches: int = 1
    """Optimizer updates that divide a step's samples among them."""
    passes: int = 1
    """Epochs over a step's samples; with more than one update the ratio to the sampling student is not 1."""
    max_prompt_tokens: int = 1024
    """Longer prompts are left out, counted and reported; they are never cut."""
    lr: float = 1e-5
    schedule: Shape = "constant"
    warmup_steps: int = 0
    final_lr_share: float = 0.0
    """End of the schedule, as a share of `lr`."""
    weight_decay: float = 0.0
    """Applies to matrices; vectors (norms, biases) are not decayed."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    micro_batch_tokens: int | None = None
    """Tokens of one forward and backward, padding included. None: 16,384, or 2,048 on a CPU, whose cache holds no more."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] | None = None
    """bfloat16: mixed precision over float32 weights; auto: that, where the device has instructions for it; None: the
    precision of the weights."""
    master_weights: bool = True
    """Update float32 copies of a student's weights in 16 bits: 18 bytes a trained weight in place of 8, and no update is
    rounded away. Nothing changes for a student in float32, nor for LoRA, whose adapters are float32."""
    gradient_checkpointing: bool = False
    on_missing_score: Literal["error", "drop"] = "error"
    """Whether a sample that the teacher could not score stops the run or is dropped and counted."""
    stop_at: float | None = None
    """Stop when an evaluation's avg@k reaches this."""
    save_every: int | None = None
    """Steps between checkpoints; one is always written at the end and on SIGINT or SIGTERM."""
    keep_last: int = 2
    keep_best: bool = False
    """Also keep the checkpoint with the highest avg@k; one is written whenever an evaluation is the best so far."""
    save_samples_every: int = 50
    """Steps between files of training samples; 0: none."""

    def __post_init__(self) -> None:
        _check(self, 1, "steps", "prompts_per_step", "samples_per_prompt", "max_prompt_tokens", "micro_batch_tokens")
        _check(self, 1, "minibatches", "passes", "save_every", "keep_last")
        _check(self, 0, "lr", "warmup_steps", "weight_decay", "max_grad_norm", "eps", "save_samples_every")
        _check(self, 0, "final_lr_share", "stop_at", high=1)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {list(self.betas)}; both must be at least 0 and less than 1")
        if self.max_grad_norm == 0:
            raise ValueError("max_grad_norm is 0, which stops every update; leave it out (null) not to clip")


@dataclass(frozen=True, kw_only=True)
class Async:
    """The section `async`: generation, scoring and updates overlap. Without it they take turns."""

    max_staleness: int = 0
    """Most steps between the weights that sample and those that learn from the samples. 0: strictly on-policy; only scoring
    overlaps with generation."""
    timeout_s: float = 1800.0
    """Seconds without a finished sample after which the run stops."""

    def __post_init__(self) -> None:
        _check(self, 0, "max_staleness")
        _check(self, 1, "timeout_s")


@dataclass(frozen=True, kw_only=True)
class Eval:
    """The section `eval`: held-out problems, evaluated before, during and after training."""

    every: int | None = None
    """Steps between evaluations; None: only before and after."""
    at_start: bool = True
    split: Split = "test"
    problems: int | None = 200
    """Number of problems, the first of the split; None: all."""
    samples_per_prompt: int = 1
    sampling: Sampling | None = None
    """None: as in training."""
    greedy: bool = False
    """Also one answer to each problem at temperature 0, the metric `greedy`."""
    reject_below: float | None = None
    """Also test-time rejection: an answer to which the judge gives a lower digit is drawn again (`rejection@N`)."""
    max_attempts: int = 4
    """N, the most draws of one answer under rejection; the last counts where none was accepted."""

    def __post_init__(self) -> None:
        _check(self, 1, "every", "problems", "samples_per_prompt")
        _check(self, 2, "max_attempts")
        _check(self, 0, "reject_below", high=9)
