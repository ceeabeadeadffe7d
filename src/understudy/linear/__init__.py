"""From hidden states and a head to a loss and its gradient, without a [T, V] tensor."""

from __future__ import annotations

from understudy.linear.chunked import evaluate, score
from understudy.linear.columns import Slice
from understudy.linear.head import LMHead
from understudy.linear.kept import Kept
from understudy.linear.plan import CutTerms, Evaluation, count_denominators, count_own, cut_terms

__all__ = [
    "CutTerms",
    "Evaluation",
    "Kept",
    "LMHead",
    "Slice",
    "count_denominators",
    "count_own",
    "cut_terms",
    "evaluate",
    "score",
]
