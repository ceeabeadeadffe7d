"""G-OPD and ExOPD: the teacher's reward over a reference model, scaled.

Source: "Learning beyond Teacher: Generalized On-Policy Distillation with Reward Extrapolation", arXiv 2602.12125.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from understudy.losses import advantages
from understudy.losses.terms import FullDivergence, Reads, Reduce, Term
from understudy.methods.base import ClippedMethod, NonNegative, only, present
from understudy.types import Need, TokenBatch


@dataclass(frozen=True)
class GOPD(ClippedMethod):
    """`A_t = sg[d_t + (scale - 1)(log T(y_t) - log R(y_t))]`; at the optimum S is `T^scale R^(1-scale)`, normalised.

    "full" is the reverse KL to that distribution; "sampled" is its Monte-Carlo gradient. The recipe's section
    `reference` sets R: the student's initial weights, the teacher's base (reward correction) or any model.
    """

    scale: NonNegative = 1.25
    """The paper's lambda: 1 is OPD for any R; below 1 interpolates; above 1 extrapolates beyond the teacher (ExOPD)."""
    form: Literal["sampled", "full"] = "sampled"
    """Rewards of sampled tokens, or reverse KL over the whole vocabulary."""
    reduce: Reduce = "token"
    """Mean over all tokens; mean per sample, then over samples; or sum per sample, then mean over samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form == "full" and (self.correction != "none" or self.clip is not None):
            raise ValueError("the full form has no policy gradient, so neither correction nor clip; use form: sampled")

    @property
    def needs(self) -> frozenset[Need]:
        reference: set[Need] = set() if self.scale == 1.0 else {"reference"}
        return frozenset(reference | {"sampled" if self.form == "sampled" else "full"})

    @property
    def reads(self) -> Reads:
        if self.form == "sampled":
            return Reads()
        return Reads(divergence=1.0, extrapolate=None if self.scale == 1.0 else self.scale)

    def terms(self, batch: TokenBatch, step: int) -> list[Term]:
        if self.form == "full":
            return [Term("divergence", FullDivergence(), mask=batch.on_policy, reduce=self.reduce)]
        teacher, student = present(batch.teacher_logprob), present(batch.student_logprob)
        if self.scale == 1.0:
            return [self.policy_term(batch, teacher - student, batch.on_policy, reduce=self.reduce)]
        reference = present(batch.reference_logprob)
        advantage = advantages.extrapolation(teacher, reference, student, self.scale)
        shown = {"teacher_over_reference": only(teacher - reference, batch.on_policy)}
        return [self.policy_term(batch, advantage, batch.on_policy, reduce=self.reduce, metrics=shown)]
