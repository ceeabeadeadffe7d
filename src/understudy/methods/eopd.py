"""EOPD: OPD everywhere, and forward KL on the teacher's top K where the teacher is uncertain.

Source: "Entropy-Aware On-Policy Distillation of Language Models", arXiv 2603.07079.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from understudy.lazy import torch
from understudy.losses import advantages
from understudy.losses.terms import Reads, Reduce, Term, TopKDivergence
from understudy.methods.base import ClippedMethod, NonNegative, PositiveInt, only, present
from understudy.types import Need, TokenBatch


@dataclass(frozen=True)
class EOPD(ClippedMethod):
    """OPD with a clip, plus `coef 1[H_T > threshold] sum_K T'(v)(log T'(v) - log S(v))`, T' renormalised on its top K.

    Both parts are means over all trained tokens. If the teacher returns no entropy, a lower bound is computed from its
    K probabilities; the metric `teacher_entropy_estimated` reports this.
    """

    k: PositiveInt = 16
    """K of the forward KL."""
    threshold: float = 0.8
    """Nats."""
    coef: float = 1.0
    """Weight of the forward KL, the paper's alpha."""
    reduce: Reduce = "token"
    """Mean over all tokens; mean per sample, then over samples; or sum per sample, then mean over samples."""
    clip: NonNegative = field(default=0.2, kw_only=True)

    needs = frozenset[Need]({"sampled", "topk"})

    @property
    def reads(self) -> Reads:
        return Reads(topk="teacher", k=self.k)

    def terms(self, batch: TokenBatch, step: int) -> list[Term]:
        ratio = advantages.log_ratio(present(batch.teacher_logprob), present(batch.student_logprob))
        topk = present(batch.topk_logprob)
        entropy = advantages.entropy_from_topk(topk) if batch.teacher_entropy is None else batch.teacher_entropy
        uncertain = batch.on_policy & (entropy > self.threshold)
        shown = {
            "uncertain": only(uncertain.to(ratio.dtype), batch.on_policy),
            "teacher_entropy_estimated": torch.full_like(ratio, float(batch.teacher_entropy is None)),
        }
        forward = TopKDivergence(topk.log_softmax(-1), "forward", "none")
        return [
            self.policy_term(batch, ratio, batch.on_policy, reduce=self.reduce, metrics=shown),
            Term("forward_kl", forward, mask=uncertain, coef=self.coef, reduce=self.reduce),
        ]
