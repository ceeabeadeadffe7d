"""SFT: imitation of given responses; sequence-level distillation where a teacher wrote them (arXiv 1606.07947)."""

from __future__ import annotations

from dataclasses import dataclass

from understudy.losses.terms import NLL, Term
from understudy.methods.base import Method, RolloutPlan
from understudy.types import Need, TokenBatch


@dataclass(frozen=True)
class SFT(Method):
    """`-log S(y_t)` on the data's responses, mean over trained tokens."""

    needs = frozenset[Need]({"none"})

    def terms(self, batch: TokenBatch, step: int) -> list[Term]:
        return [Term("nll", NLL())]

    def plan(self, step: int) -> RolloutPlan:
        return RolloutPlan(on_policy_share=0.0)
