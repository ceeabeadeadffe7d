"""TOP-D: OPD towards a mixture of teacher and student, which bounds every token's reward from below.

Source: "Trust Region Policy Distillation", arXiv 2607.04751. NeMo-RL calls it TROPD, which is not our `tropd`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from understudy.lazy import torch
from understudy.losses import advantages
from understudy.losses.terms import Reduce, Term
from understudy.methods.base import ClippedMethod, Range, present
from understudy.types import Need, TokenBatch


@dataclass(frozen=True)
class TOPD(ClippedMethod):
    """`A_t = sg[log(mix T(y_t) + (1 - mix) S(y_t)) - log S(y_t)] = sg[log(mix e^{d_t} + 1 - mix)]`, at least `log(1 - mix)`.

    At S = S_old its expected gradient is that of `KL(S || mix T + (1 - mix) sg[S])` at the visited prefixes.
    """

    mix: Annotated[float, Range(1e-6, 1.0)] = 0.2
    """Share of the teacher in the target, the paper's alpha; 1 is OPD."""
    reduce: Reduce = "token"
    """Mean over all tokens; mean per sample, then over samples; or sum per sample, then mean over samples."""

    needs = frozenset[Need]({"sampled"})

    def terms(self, batch: TokenBatch, step: int) -> list[Term]:
        ratio = advantages.log_ratio(present(batch.teacher_logprob), present(batch.student_logprob))
        advantage = ratio
        if self.mix < 1.0:
            # exactly 0 at T = S, and no overflow of e^d
            above = ratio + (self.mix + (1.0 - self.mix) * (-ratio).exp()).log()
            advantage = torch.where(ratio > 0, above, torch.log1p(self.mix * torch.expm1(ratio)))
        return [self.policy_term(batch, advantage, batch.on_policy, reduce=self.reduce)]
