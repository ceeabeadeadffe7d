"""TopKTail: the gradient of the reverse KL, exact at the student's K most probable tokens and sampled at the others.

Source: "student top-k on-policy distillation", NeMo-RL, pull request 3584.
"""

from __future__ import annotations

from dataclasses import dataclass

from understudy.losses import advantages
from understudy.losses.terms import ExpectedLogRatio, Reads, Reduce, Term
from understudy.methods.base import ClippedMethod, PositiveInt, only, present
from understudy.types import Need, TokenBatch


@dataclass(frozen=True)
class TopKTail(ClippedMethod):
    """`sum_{v in TopK_S} S(v) sg[log S(v) - log T(v)]`, and OPD's term where the sampled token is not among the K.

    At S = S_old its expected gradient is that of `KL(S || T)` for every K; with K = V so is each token's own, and the value.
    """

    k: PositiveInt = 64
    """How many of the student's most probable tokens are summed exactly."""
    reduce: Reduce = "token"
    """Mean over all tokens; mean per sample, then over samples; or sum per sample, then mean over samples."""

    needs = frozenset[Need]({"full"})

    @property
    def reads(self) -> Reads:
        return Reads(topk="student", k=self.k)

    def terms(self, batch: TokenBatch, step: int) -> list[Term]:
        ratio = advantages.log_ratio(present(batch.teacher_logprob), present(batch.student_logprob))
        outside = (present(batch.topk_ids) != batch.target[:, None]).all(-1)
        shown = {"outside_topk": only(outside.to(ratio.dtype), batch.on_policy)}
        exact = ExpectedLogRatio(present(batch.topk_logprob), self.min_log_ratio)
        return [
            Term("topk", exact, mask=batch.on_policy, reduce=self.reduce, metrics=shown),
            self.policy_term(batch, ratio, batch.on_policy & outside, reduce=self.reduce),
        ]
