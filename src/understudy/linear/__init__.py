"""From hidden states and a head to a loss and its gradient, without a [T, V] tensor."""

from __future__ import annotations

from .chunked import evaluate, score
from .head import LMHead
from .plan import Evaluation, count_denominators

__all__ = ["Evaluation", "LMHead", "count_denominators", "evaluate", "score"]
