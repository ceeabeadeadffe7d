"""OVD: the teacher grades each response with a digit from 0 to 9, which decides what is trained on.

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
    """GRPO's clipped term over accepted and replacement samples, plus a KL to the reference.

    A sample is accepted if its verbal score is at least `threshold`. Advantages are over the group after replacement.
    """

    threshold: Annotated[float, Range(0.0, 9.0)] = 7
    """Lowest accepted digit."""
    on_reject: OnReject = "teacher"
    """Replacement of a rejected sample: a teacher response, nothing, or one more student attempt. Open in the sources:
    "continue" keeps the student's steps before the first rejected one and lets the teacher continue; it needs `steps`."""
    reward: RewardSource = "outcome"
    """The verifier's score; or the digit over 9, which needs no ground truth."""
    score: Literal["argmax", "expectation"] = "argmax"
    """The judge's most likely digit, or the mean under its probabilities."""
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
