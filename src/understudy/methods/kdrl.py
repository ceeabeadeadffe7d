"""KDRL: an outcome policy gradient and a distillation term in one loss.

Source: "KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and Reinforcement Learning", arXiv 2506.02208.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from understudy.losses.terms import SquaredLogRatio, Term
from understudy.methods.base import ClippedMethod, Method, NonNegative, Rewards, RolloutPlan, present
from understudy.types import Need, TokenBatch


@dataclass(frozen=True)
class KDRL(ClippedMethod):
    """`J_GRPO - beta d_t^2 / 2`, differentiated through S in the second part, which is off where the sample is correct."""

    beta: NonNegative = 0.002
    """Weight of the distillation term."""
    anneal_to: float | None = None
    """Value of beta at the last step, reached linearly; None: constant."""
    skip_correct: bool = True
    """Without verdicts in the batch, samples with a positive advantage count as correct."""
    clip: NonNegative = field(default=0.2, kw_only=True)
    num_steps: int | None = field(default=None, kw_only=True)
    """Steps of the schedule to `anneal_to`; None: the run's steps."""

    needs = frozenset[Need]({"sampled"})

    def plan(self, step: int) -> RolloutPlan:
        return RolloutPlan(rewards=Rewards("outcome"))

    def for_run(self, num_steps: int, max_new_tokens: int) -> Method:
        return self if self.num_steps is not None else replace(self, num_steps=num_steps)

    def pull(self, step: int) -> float:
        """Weight of the distillation term at a step. Raises ValueError if it depends on a run length that is not set."""
        if self.anneal_to is None or step == 0:
            return self.beta
        if self.num_steps is None:
            raise ValueError("anneal_to counts by the run's steps, but no run is known here; set num_steps")
        done = min(step / max(1, self.num_steps - 1), 1.0)
        return self.beta + (self.anneal_to - self.beta) * done

    def terms(self, batch: TokenBatch, step: int) -> list[Term]:
        advantage = present(batch.outcome_advantage)
        right = advantage > 0 if batch.correct is None else batch.correct
        pulled = batch.on_policy & ~right if self.skip_correct else batch.on_policy
        return [
            self.policy_term(batch, advantage, batch.on_policy),
            Term("teacher", SquaredLogRatio(present(batch.teacher_logprob)), mask=pulled, coef=self.pull(step)),
        ]
