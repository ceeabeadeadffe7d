"""AOPD: policy gradient where the teacher gives the token a higher probability than the student, forward KL elsewhere.

Source: "Asymmetric On-Policy Distillation", arXiv 2605.06387.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from understudy.losses import advantages
from understudy.losses.divergences import Tail
from understudy.losses.terms import Reads, Reduce, Term, TopKDivergence
from understudy.methods.base import ClippedMethod, PositiveInt, Range, only, present
from understudy.types import Need, TokenBatch


@dataclass(frozen=True)
class AOPD(ClippedMethod):
    """Tokens with `T(y_t) - S(y_t) <= threshold` (probabilities) take forward KL on the teacher's top K instead of OPD's term.

    T and S within `advantages.rounding` count as equal. Mean over the tokens of each sample, then over
    samples. `threshold=-1` is OPD; 1 is forward KL everywhere.
    """

    k: PositiveInt = 64
    """K of the forward KL."""
    threshold: Annotated[float, Range(-1.0, 1.0)] = 0.0
    """The paper's tau, a difference of probabilities."""
    mean_over_k: bool = False
    """Open in the sources: a factor 1/K on the forward KL."""
    reduce: Reduce = "sequence"
    """Mean over all tokens; mean per sample, then over samples; or sum per sample, then mean over samples."""
    tail: Tail = "none"
    """"none" is the paper's sum over K tokens; "bucket" adds a category for the rest, which makes it a divergence."""

    needs = frozenset[Need]({"sampled", "topk"})

    @property
    def reads(self) -> Reads:
        return Reads(topk="teacher", k=self.k, tail=self.tail == "bucket")

    def terms(self, batch: TokenBatch, step: int) -> list[Term]:
        teacher, student = present(batch.teacher_logprob), present(batch.student_logprob)
        topk = present(batch.topk_logprob)
        gate = advantages.gate(teacher, student, self.threshold)
        shown = {"gated": only(gate.to(teacher.dtype), batch.on_policy)}
        coef = 1.0 / topk.shape[-1] if self.mean_over_k else 1.0
        forward = TopKDivergence(topk, "forward", self.tail, self.min_log_ratio)
        return [
            self.policy_term(
                batch,
                advantages.log_ratio(teacher, student),
                batch.on_policy & ~gate,
                reduce=self.reduce,
                metrics=shown,
            ),
            Term("forward_kl", forward, mask=batch.on_policy & gate, coef=coef, reduce=self.reduce),
        ]
