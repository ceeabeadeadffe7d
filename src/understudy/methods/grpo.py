"""GRPO, Dr.GRPO and DAPO: a sample's outcome reward relative to those of the prompt's other samples.

Sources: GRPO, arXiv 2402.03300; Dr.GRPO, arXiv 2503.20783; DAPO, arXiv 2503.14476.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from understudy.losses import advantages
from understudy.losses.terms import Reduce, ReferenceKL, Term
from understudy.methods.base import Method, NonNegative, PolicyMethod, Range, Rewards, RolloutPlan, present
from understudy.types import Need, TokenBatch


@dataclass(frozen=True)
class GRPO(PolicyMethod):
    """`A_i = (R_i - mean_g) / (std_g + 1e-6)` on every token of sample i, clipped as PPO; `distil_coef` adds `coef d_t`."""

    clip_low: NonNegative = 0.2
    """How far below 1 the ratio is clipped."""
    clip_high: NonNegative = 0.2
    """How far above 1 the ratio is clipped."""
    normalise_std: bool = True
    """Divide by the standard deviation of a prompt's rewards."""
    length: Reduce = "token"
    """Mean over all tokens; mean per sample, then over samples; or mean over samples of sums divided by `max_tokens`."""
    kl_coef: NonNegative = 0.0
    """Weight of the KL to the reference model."""
    dynamic_sampling: bool = False
    """Replace prompts whose samples all get the same grade (before length penalties) with further prompts."""
    distil_coef: NonNegative = 0.0
    """Weight of OPD's log-ratio in the advantage."""
    overlong_buffer: Annotated[int, Range(0)] = 0
    """Number of tokens before the length limit over which a penalty grows to -1."""
    max_tokens: Annotated[int | None, Range(1)] = None
    """Divisor of "constant"; None: the run's `sampling.max_new_tokens`."""

    @property
    def ratio_clip(self) -> tuple[float, float]:
        return self.clip_low, self.clip_high

    @property
    def needs(self) -> frozenset[Need]:
        asked: set[Need] = {"sampled"} if self.distil_coef else {"none"}
        return frozenset(asked | {"reference"} if self.kl_coef else asked)

    def plan(self, step: int) -> RolloutPlan:
        rewards = Rewards("outcome", self.normalise_std, self.dynamic_sampling, self.overlong_buffer)
        return RolloutPlan(rewards=rewards)

    def for_run(self, num_steps: int, max_new_tokens: int) -> Method:
        return self if self.max_tokens is not None else replace(self, max_tokens=max_new_tokens)

    def terms(self, batch: TokenBatch, step: int) -> list[Term]:
        advantage = present(batch.outcome_advantage)
        if self.distil_coef:
            ratio = advantages.log_ratio(present(batch.teacher_logprob), present(batch.student_logprob))
            advantage = advantage + self.distil_coef * ratio
        scale = 1.0
        if self.length == "constant":
            if self.max_tokens is None:
                raise ValueError("length is constant, but no run is known here to take it from; set max_tokens")
            scale = 1.0 / self.max_tokens
        terms = [replace(self.policy_term(batch, advantage, batch.on_policy, reduce=self.length), coef=scale)]
        if self.kl_coef:
            loss, coef = ReferenceKL(present(batch.reference_logprob)), self.kl_coef * scale
            terms.append(Term("reference_kl", loss, mask=batch.on_policy, coef=coef, reduce=self.length))
        return terms


@dataclass(frozen=True)
class DrGRPO(GRPO):
    """GRPO without division by the standard deviation, and with a constant divisor instead of the lengths."""

    normalise_std: bool = False
    length: Reduce = "constant"


@dataclass(frozen=True)
class DAPO(GRPO):
    """GRPO with a higher upper clip, a token mean, dynamic sampling and a soft overlong penalty."""

    clip_high: NonNegative = 0.28
    dynamic_sampling: bool = True
    overlong_buffer: Annotated[int, Range(0)] = 0
    """The paper uses 4,096 of 20,480 tokens."""
