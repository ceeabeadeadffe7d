"""TrOPD: a trust region from speculative decoding, forward KL outside it, and teacher prefixes that fade out.

Source: "Trust Region On-Policy Distillation", arXiv 2606.01249.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from understudy.losses import advantages
from understudy.losses.divergences import Tail
from understudy.losses.schedules import cosine_decay
from understudy.losses.terms import NLL, FoldedTopK, Loss, Over, Reads, Reduce, Term, TopKDivergence
from understudy.methods.base import ClippedMethod, NonNegative, PositiveInt, Prefix, Range, RolloutPlan, only, present
from understudy.types import Need, TokenBatch


@dataclass(frozen=True)
class TrOPD(ClippedMethod):
    """Trusted tokens take OPD's term; a token is trusted with probability `min(T(y_t)/S(y_t), 1)`. `outlier` treats the others.

    Guided samples begin with the first `floor(c(step) L)` tokens of a teacher's response, c a cosine from 1 to 0 over
    `anneal_steps`; their loss is `guidance * -log S(y_t)`. Student tokens and prefix tokens are averaged
    separately, unless `denominator` is "joint". The expected share of rejected tokens is the total variation distance of S
    and T (metric `total_variation`).
    """

    k: PositiveInt = 64
    """K of the forward KL."""
    region: Literal["bernoulli", "ratio"] = "bernoulli"
    """"ratio": a token is trusted where `T(y_t)/S(y_t) >= threshold`. In both regions T and S within
    `advantages.rounding` count as equal."""
    threshold: NonNegative = 1.0
    """Lowest T/S of a trusted token under `region: ratio`."""
    outlier: Literal["forward_kl", "clip", "mask", "scalar"] = "forward_kl"
    """Forward KL on the teacher's top K; `max(d_t, floor)` as advantage; nothing; or `-KL` as an advantage."""
    floor: float = -2.0
    """Lowest advantage under `outlier: clip`."""
    guidance: NonNegative = 0.001
    """Weight of the prefixes' NLL."""
    anneal_steps: Annotated[int, Range(0)] = 200
    """Steps over which prefixes fade out; 0: no guided samples."""
    also_positive: bool = False
    """Open in the sources, TrOPD + AOPD: trusted tokens with `T(y_t) - S(y_t) <= positive_threshold` take the forward KL
    too."""
    guided: Literal["beside", "replace"] = "beside"
    """Open in the sources: one guided sample per prompt, in addition to the on-policy ones or instead of one."""
    tail: Tail = "none"
    """"none" is the paper's sum over K tokens; "bucket" adds a category for the rest, which makes it a divergence."""
    positive_threshold: Annotated[float, Range(-1.0, 1.0)] = 0.0
    """AOPD's tau under `also_positive`. At 0 every outlier is below it, which leaves AOPD with guidance; between -1 and 0
    both choices count."""
    denominator: Literal["separate", "joint"] = "separate"
    """Open in the sources: separate means over student and prefix tokens, or one over all of them, where
    prefixes dilute the student's part."""
    reduce: Reduce = "token"
    """Mean over all tokens; mean per sample, then over samples; or sum per sample, then mean over samples."""
    prefix: Prefix = "share"
    """Open in the sources: prefixes are a share of each response, or end at an annealed maximum length, `c(step)` of the length
    budget."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"sampled", "topk"} if self._reads_topk else {"sampled"})

    @property
    def _reads_topk(self) -> bool:
        return self.outlier in ("forward_kl", "scalar") or self.also_positive

    @property
    def requires(self) -> tuple[str, ...]:
        return (*super().requires, "uniform") if self.region == "bernoulli" else super().requires

    @property
    def reads(self) -> Reads:
        return Reads(topk="teacher", k=self.k, tail=self.tail == "bucket") if self._reads_topk else Reads()

    def plan(self, step: int) -> RolloutPlan:
        share = cosine_decay(step, self.anneal_steps)
        return RolloutPlan(prefix_share=share, prefix=self.prefix, guided=self.guided)

    def terms(self, batch: TokenBatch, step: int) -> list[Term]:
        teacher, student = present(batch.teacher_logprob), present(batch.student_logprob)
        ratio, rounding = advantages.log_ratio(teacher, student), advantages.rounding(teacher, student)
        accept, own = advantages.acceptance(teacher, student), batch.on_policy
        # a draw is below 1, so a token with T >= S is always trusted
        drawn = self.region == "bernoulli"
        trusted = present(batch.uniform) < accept if drawn else (ratio + rounding).exp() >= self.threshold
        shown = {
            "trusted": only(trusted.to(teacher.dtype), own),
            "total_variation": only(1.0 - accept, own),
        }
        gated = advantages.gate(teacher, student, self.positive_threshold if self.also_positive else -1.0)
        divergent = own & trusted & gated
        over: Over = "own" if self.denominator == "separate" else "trained"
        terms = [
            self.policy_term(batch, ratio, own & trusted & ~divergent, reduce=self.reduce, over=over, metrics=shown)
        ]
        outliers = own & ~trusted
        if self.outlier == "forward_kl":
            divergent, outliers = divergent | outliers, own & ~own
        if self._reads_topk:
            forward = TopKDivergence(present(batch.topk_logprob), "forward", self.tail, self.min_log_ratio)
            terms.append(Term("forward_kl", forward, mask=divergent, reduce=self.reduce, over=over))
        if self.outlier == "clip":
            clipped = self.policy_term(batch, ratio.clamp_min(self.floor), outliers)
            terms.append(Term("outliers", clipped.loss, mask=outliers, reduce=self.reduce, over=over))
        if self.outlier == "scalar":
            folded: Loss = FoldedTopK(present(batch.topk_logprob), self.tail, batch.student_logprob, self.weight(batch))
            terms.append(Term("outliers", folded, mask=outliers, reduce=self.reduce, over=over))
        over = "given" if self.denominator == "separate" else "trained"
        return [*terms, Term("prefix", NLL(), mask=~own, coef=self.guidance, reduce=self.reduce, over=over)]
