"""The sections `train`, `async`, `parallel` and `eval` of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from understudy.errors import RecipeError, check_range, nearest
from understudy.losses.schedules import Shape
from understudy.tasks import Split
from understudy.trainer.alarms import ALARMS, OnAlarm
from understudy.types import Rejected, Sampling

MAX_STEPS = 1_000_000
"""The most steps of a run: the method's plan of every step is read before the first one."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """The section `train`. A step draws prompts, samples responses, scores them and makes optimizer updates."""

    steps: int
    """Steps of the run; one uses `prompts_per_step` times `samples_per_prompt` samples."""
    prompts_per_step: int = 64
    """Prompts drawn in a step, over all ranks."""
    samples_per_prompt: int = 1
    """Responses to each prompt; rewards are compared within them."""
    minibatches: int = 1
    """Optimizer updates that divide a step's samples among them."""
    passes: int = 1
    """Epochs over a step's samples; after the step's first update the ratio to the sampling student is not 1."""
    max_prompt_tokens: int = 1024
    """Longer prompts are left out, counted and reported; they are never cut."""
    lr: float = 1e-5
    """Peak learning rate of AdamW."""
    schedule: Shape = "constant"
    """Shape of the learning-rate schedule after warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate grows from 0."""
    final_lr_share: float = 0.0
    """End of the schedule, as a share of `lr`."""
    weight_decay: float = 0.0
    """Applies to matrices; vectors (norms, biases) are not decayed."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's two moments."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    max_grad_norm: float | None = 1.0
    """2-norm to which the gradient of an update is clipped; None: no clipping."""
    micro_batch_tokens: int | None = None
    """Tokens of one forward and backward, padding included. None: 16,384, or 2,048 on a CPU, whose cache holds no more."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] | None = None
    """bfloat16: mixed precision over float32 weights; auto: that, where the device has instructions for it; None: the
    precision of the weights."""
    master_weights: bool = True
    """Update float32 copies of a student's weights in 16 bits: 18 bytes a trained weight in place of 8, and no update is
    rounded away. Nothing changes for a student in float32, nor for LoRA, whose adapters are float32."""
    share_prompts: bool = True
    """Compute the shared prompt of several samples, and the shared start of several prompts (a system prompt, tools, examples),
    once, in scoring and in the update. Nothing changes but rounding. A model whose attention needs a mask computes each sample
    whole."""
    compile: bool = False
    """Compile the layers of the student with torch.compile for the update: minutes at the first step, for fewer passes over
    activations. On a CPU it needs a C++ compiler."""
    fused_kernels: bool = True
    """On a GPU with Triton, read logits and form their gradient in one kernel a pass; false: in operations of torch."""
    gradient_checkpointing: bool = False
    """Compute activations a second time in the backward pass: less memory, a third more time."""
    on_missing_score: Literal["error", "drop"] = "error"
    """Whether a sample that the teacher could not score stops the run or is dropped and counted."""
    on_alarm: Mapping[str, OnAlarm] = field(default_factory=dict)
    """Action by alarm name: warn (the default), stop the run while the alarm is on, or ignore it."""
    stop_at: float | None = None
    """Stop when an evaluation's avg@k reaches this."""
    save_every: int | None = None
    """Steps between checkpoints; one is always written at the end and on SIGINT, SIGTERM or SIGHUP."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: bool = False
    """Also keep the checkpoint with the highest avg@k; one is written whenever an evaluation is the best so far."""
    save_samples_every: int = 50
    """Steps between files of training samples; 0: none."""
    save_tokens: int = 4
    """Samples of each such step of which every token is kept with all that the update knew of it (`tokens/`); 0: none, and no
    sums over tokens either (`pictures.jsonl`)."""
    save_tokens_bytes: int = 268_435_456
    """Most bytes of `tokens/` over the run, 256 MiB. The budget is divided in advance; a sample longer than its share is
    recorded up to it."""

    @property
    def records_tokens(self) -> bool:
        """Whether the run records single tokens."""
        return self.save_samples_every > 0 and self.save_tokens > 0

    def __post_init__(self) -> None:
        check_range(self, 1, "steps", off="`understudy eval` evaluates without training")
        if self.steps > MAX_STEPS:
            raise ValueError(
                f"steps is {self.steps:,}; a run has at most {MAX_STEPS:,}, and ends earlier with stop_at or Ctrl-C"
            )
        check_range(self, 1, "prompts_per_step", "samples_per_prompt", "max_prompt_tokens")
        if self.compile and self.gradient_checkpointing:
            raise ValueError(
                "compile and gradient_checkpointing do not go together: transformers computes activations again inside the "
                "layer that is compiled; set one of them to false"
            )
        check_range(self, 1, "micro_batch_tokens", off="null takes what suits the device")
        check_range(self, 1, "minibatches", off="1 makes one update of a step")
        check_range(self, 1, "passes", off="1 uses each sample once")
        check_range(self, 1, "save_every", off="null saves at the end only")
        check_range(self, 1, "keep_last", off="1 keeps the last one, from which the run can be resumed")
        check_range(self, 0, "max_grad_norm", above=True, off="null does not clip, 0 would stop every update")
        check_range(self, 0, "lr", "warmup_steps", "weight_decay", "save_samples_every", "save_tokens")
        check_range(self, 1, "save_tokens_bytes", off="save_tokens: 0 keeps none")
        check_range(self, 0, "eps", above=True)
        check_range(self, 0, "final_lr_share", high=1)
        check_range(self, 0, "stop_at", high=1, off="null never stops early")
        names = [alarm.name for alarm in ALARMS]
        for name in self.on_alarm:
            if name not in names:
                raise ValueError(f"on_alarm has {name!r}, which is no alarm; {nearest(name, names)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {list(self.betas)}; both must be at least 0 and less than 1")


@dataclass(frozen=True, kw_only=True)
class Async:
    """The section `async`: generation, scoring and updates overlap. Without it they take turns."""

    max_staleness: int = 0
    """Most steps between the weights that sample and those that train on the samples. 0: strictly on-policy; only scoring
    overlaps with generation."""
    timeout_s: float = 1800.0
    """Seconds without a finished sample after which the run stops."""

    def __post_init__(self) -> None:
        check_range(self, 0, "max_staleness")
        check_range(self, 1, "timeout_s", off="a large number waits as long")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """The section `parallel`: how the processes of a run divide the student among them. Without it each holds all of it."""

    shard: int
    """Number of processes that weights, gradients and optimizer state are divided over."""
    replicate: int = 1
    """Number of groups of `shard` processes; each group holds the whole student."""
    teachers: bool = False
    """Whether teachers and references loaded in this run are sharded too."""
    reshard: bool = True
    """Whether a block drops what it gathered after each forward and backward; False keeps it until the update is done, which
    takes the memory of the whole weights and gathers them once."""
    gradients: Literal["shards", "whole"] = "shards"
    """How gradients of several micro-batches add up: in shards, a block's being reduced after each; or whole in each process,
    all being reduced once, which takes the memory of the whole gradient."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """Precision in which weights are gathered and computed with; None: their own."""
    reduce_dtype: Literal["float32", "bfloat16"] | None = None
    """Precision in which gradients are added up over processes; None: that of the gathered weights."""

    vocabulary: bool = False
    """Whether each process keeps its rows of the output layer and projects the tokens of all in its group with them; False
    gathers the layer, whole, in each. Not for a layer that is the embedding too, nor with LoRA."""

    def __post_init__(self) -> None:
        check_range(self, 1, "shard", off="1 keeps all of the student in each process")
        check_range(self, 1, "replicate", off="1 makes one group")
        if self.shard == 1 and (self.param_dtype or self.reduce_dtype or self.vocabulary):
            raise ValueError(
                "param_dtype, reduce_dtype and vocabulary are those of shards; set shard to 2 or more, or remove them"
            )

    def check(self, world: int) -> None:
        """Raises RecipeError where the run has another number of processes."""
        if self.shard * self.replicate != world:
            raise RecipeError(
                f"parallel.shard x parallel.replicate is {self.shard} x {self.replicate}, but the run has "
                f"{world} {'process' if world == 1 else 'processes'}; start it with torchrun and as many in all "
                "(--nproc-per-node, --nnodes), or set these keys"
            )


@dataclass(frozen=True, kw_only=True)
class Eval:
    """The section `eval`: held-out problems, evaluated before, during and after training."""

    every: int | None = None
    """Steps between evaluations; None: only before and after."""
    at_start: bool = True
    """Also before the first step."""
    path: str | None = None
    """A file of problems that is read with the keys of `task`, in place of its split; None: the split."""
    split: Split = "test"
    """The split of the task."""
    problems: int | None = 200
    """Number of problems, the first of the split; None: all."""
    samples_per_prompt: int = 1
    """Responses to each problem."""
    sampling: Sampling | None = None
    """None: as in training."""
    greedy: bool = False
    """Also one answer to each problem at temperature 0, the metric `greedy`."""
    teacher: bool = False
    """Also the teacher's own answers to the problems, once, before the first step: the metric `teacher`."""
    reject_below: float | None = None
    """Also test-time rejection: an answer to which the judge gives a lower digit is drawn again (`rejection@N`)."""
    on_reject: Rejected = "resample"
    """Fate of such an answer: "resample" draws the whole again. Open in the sources: "revise" keeps the steps before the first
    rejected one and draws the rest again (`revision@N`); "continue" has the teacher write the rest (`assisted`)."""
    max_attempts: int = 4
    """N, the most draws of one answer under rejection; the last counts where none was accepted."""

    def __post_init__(self) -> None:
        check_range(self, 1, "every", off="null evaluates before and after training only")
        check_range(self, 1, "problems", off="null takes all; without a section eval nothing is evaluated")
        check_range(self, 1, "samples_per_prompt")
        check_range(self, 2, "max_attempts", off="without reject_below every answer is drawn once")
        check_range(self, 0, "reject_below", high=9)
        if self.on_reject != "resample" and self.reject_below is None:
            raise ValueError(f"on_reject is {self.on_reject}, but nothing is rejected; set reject_below, such as 7")
