"""OVD: the teacher gives each response a digit from 0 to 9, which decides what is trained on.

Source: "OVD: On-policy Verbal Distillation", arXiv 2601.21968.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from understudy.losses.terms import ReferenceKL, Term
from understudy.methods.base import (
    Acceptance,
    ClippedMethod,
    NonNegative,
    OnReject,
    Range,
    Rewards,
    RewardSource,
    RolloutPlan,
    present,
)
from understudy.types import Need, TokenBatch


@dataclass(frozen=True)
class OVD(ClippedMethod):
    """GRPO's clipped term over the samples that were accepted and those that replaced the rejected, and a KL to the reference.

    A sample with a verbal score of at least `threshold` is accepted. The advantage is over the group as trained on.
    """

    threshold: Annotated[float, Range(0.0, 9.0)] = 7
    """Least digit that is accepted."""
    on_reject: OnReject = "teacher"
    """Filling of a rejected slot: a response of the teacher, nothing, or one more attempt of the student. Open in the sources:
    "continue", the student's steps before the first rejected one, which the teacher continues; it needs `steps`."""
    reward: RewardSource = "outcome"
    """The verifier's score; or the digit over 9, which needs no ground truth."""
    score: Literal["argmax", "expectation"] = "argmax"
    """The digit that the judge finds most likely, or the mean under its probabilities."""
    steps: bool = False
    """Judge each step of a response; the lowest digit counts."""
    kl_coef: NonNegative = 0.001
    """Weight of the KL to the reference; 0: no reference model."""
    clip: NonNegative = field(default=0.2, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_reject == "continue" and not self.steps:
            raise ValueError(
                "on_reject is continue, which keeps the steps before the first rejected one, but steps is false, so that none "
                "is judged by itself; set steps to true"
            )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"verbal", "reference"} if self.kl_coef else {"verbal"})

    def plan(self, step: int) -> RolloutPlan:
        acceptance = Acceptance(self.threshold, self.on_reject, self.score, self.steps)
        return RolloutPlan(rewards=Rewards(self.reward), acceptance=acceptance)

    def terms(self, batch: TokenBatch, step: int) -> list[Term]:
        terms = [self.policy_term(batch, present(batch.outcome_advantage), None)]
        if self.kl_coef:
            terms.append(Term("reference_kl", ReferenceKL(present(batch.reference_logprob)), coef=self.kl_coef))
        return terms
