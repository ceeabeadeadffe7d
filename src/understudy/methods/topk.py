"""TopK: a divergence over K tokens of the vocabulary, with the rest in a tail bucket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from understudy.losses.divergences import Direction, Tail
from understudy.losses.terms import Reads, Reduce, Term, TopKDivergence
from understudy.methods.base import PositiveInt, ScoreMethod, present
from understudy.types import Need, TokenBatch


@dataclass(frozen=True)
class TopK(ScoreMethod):
    """Forward or reverse KL over the teacher's or the student's top K; see `divergences.topk_divergence`.

    With K = V every choice agrees with the full divergence.
    """

    k: PositiveInt = 64
    """Tokens compared at each position."""
    direction: Direction = "forward"
    """Forward: KL from the teacher; reverse: from the student."""
    support: Literal["teacher", "student"] = "teacher"
    """"student" needs a teacher that can score given tokens."""
    tail: Tail = "bucket"
    """The other tokens: one bucket, dropped, or both sides renormalised on the K."""
    reduce: Reduce = "token"
    """Mean over all tokens; mean per sample, then over samples; or sum per sample, then mean over samples."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"topk"} if self.support == "teacher" else {"full"})

    @property
    def reads(self) -> Reads:
        return Reads(topk=self.support, k=self.k, tail=self.tail == "bucket")

    def terms(self, batch: TokenBatch, step: int) -> list[Term]:
        loss = TopKDivergence(present(batch.topk_logprob), self.direction, self.tail, self.min_log_ratio)
        return [Term("divergence", loss, reduce=self.reduce)]
