"""OPD: sampled-token reverse KL as a policy gradient.

Sources: Thinking Machines, "On-Policy Distillation" (2025); Qwen3 technical report, arXiv 2505.09388. The baseline is
vOPD's, arXiv 2605.07865.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from understudy.losses import advantages
from understudy.losses.terms import Reads, Reduce, Term
from understudy.methods.base import ClippedMethod, Range, Scope, Share, present
from understudy.types import Need, TokenBatch


@dataclass(frozen=True)
class OPD(ClippedMethod):
    """`A_t = sg[d_t]`, `d_t = log T(y_t) - log S_old(y_t)`; loss `-r_t A_t`, mean over trained tokens.

    At S = S_old its expected gradient is that of `KL(S || T)` at the visited prefixes.
    """

    discount: Share = 0.0
    """gamma > 0: `A_t = sum_{u >= t} gamma^(u-t) d_u` within the sample."""
    baseline: bool = False
    """Subtract `E_{y~S}[d] = -KL(S || T)`: same expectation, lower variance. Needs a full-vocabulary teacher."""
    reduce: Reduce = "token"
    """Mean over all tokens; mean per sample, then over samples; or sum per sample, then mean over samples."""
    baseline_k: Annotated[int, Range(0)] = 0
    """Above 0: sum the baseline over the teacher's top K only, which needs just a top-K teacher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline and self.discount:
            raise ValueError("baseline is the expectation of d_t alone; it does not fit a discount above 0")
        if self.baseline_k and not self.baseline:
            raise ValueError("baseline_k is given without baseline: true")

    @property
    def needs(self) -> frozenset[Need]:
        if not self.baseline:
            return frozenset({"sampled"})
        return frozenset({"sampled", "topk"} if self.baseline_k else {"full"})

    @property
    def scope(self) -> Scope:
        return "batch" if self.discount else "token"

    @property
    def reads(self) -> Reads:
        if self.baseline_k:
            return Reads(topk="teacher", k=self.baseline_k)
        return Reads(divergence=1.0 if self.baseline else None)

    def terms(self, batch: TokenBatch, step: int) -> list[Term]:
        advantage = advantages.log_ratio(present(batch.teacher_logprob), present(batch.student_logprob))
        if self.discount:
            trained = batch.mask & batch.on_policy
            advantage = advantages.return_to_go(advantage, batch.sequence, trained, self.discount)
        return [
            self.policy_term(
                batch,
                advantage,
                batch.on_policy,
                baseline=self.baseline and not self.baseline_k,
                baseline_logp=present(batch.topk_logprob) if self.baseline_k else None,
                reduce=self.reduce,
            )
        ]
