"""GKD: a divergence over the whole vocabulary on the student's own samples.

Source: Agarwal et al., "On-Policy Distillation of Language Models", arXiv 2306.13649.
"""

from __future__ import annotations

from dataclasses import dataclass

from understudy.losses.terms import FullDivergence, Reads, Reduce, Term
from understudy.methods.base import RolloutPlan, ScoreMethod, Share
from understudy.types import Need, TokenBatch


@dataclass(frozen=True)
class GKD(ScoreMethod):
    """Generalised Jensen-Shannon divergence of `beta`; see `divergences.generalised_js`."""

    beta: Share = 1.0
    """0: forward `KL(T || S)`; 1: reverse `KL(S || T)`; between: interpolated."""
    on_policy_share: Share = 1.0
    """The paper's lambda: share of samples that the student writes; the rest are the data's responses."""
    reduce: Reduce = "token"
    """Mean over all tokens; mean per sample, then over samples; or sum per sample, then mean over samples."""

    needs = frozenset[Need]({"full"})

    @property
    def reads(self) -> Reads:
        return Reads(divergence=self.beta)

    def terms(self, batch: TokenBatch, step: int) -> list[Term]:
        return [Term("divergence", FullDivergence(), reduce=self.reduce)]

    def plan(self, step: int) -> RolloutPlan:
        return RolloutPlan(on_policy_share=self.on_policy_share)
