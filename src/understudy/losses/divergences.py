"""Divergences between next-token distributions, given as log-probabilities. Nats; the last dimension is summed over.

S is the student and T the teacher. Everything is differentiable with respect to S and finite where S > 0; `floor_excluded`
keeps reverse divergences finite where T is 0.
"""

from __future__ import annotations

import math
from typing import Literal

from understudy.lazy import Tensor, torch
from understudy.types import EXCLUDED

Direction = Literal["forward", "reverse"]
Tail = Literal["bucket", "none", "renormalise"]

MIN_LOG_RATIO = -20.0
"""Default log T - log S of a token that T excludes: finite, and far below any real reward."""


def floor_excluded(logq: Tensor, logp: Tensor, min_log_ratio: float) -> Tensor:
    """Returns log Q with `log P + min_log_ratio` where Q excludes the token (`types.EXCLUDED`); no gradient reaches P. NaN
    stays NaN."""
    return torch.where(logq <= EXCLUDED, logp.detach() + min_log_ratio, logq)


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """`KL(P || Q) = sum_v P(v) (log P(v) - log Q(v))`, with 0 log 0 = 0. [..., V] -> [...]."""
    p = logp.exp()
    gap = torch.where(p > 0, logp - logq, torch.zeros_like(p))
    return (p * gap).sum(-1)


def log_mixture(student_logp: Tensor, teacher_logp: Tensor, beta: float) -> Tensor:
    """`log M`, `M = (1 - beta) S + beta T`, for 0 < beta < 1. [..., V] -> [..., V]."""
    return torch.logaddexp(student_logp + math.log1p(-beta), teacher_logp + math.log(beta))


def generalised_js(
    student_logp: Tensor, teacher_logp: Tensor, beta: float, min_log_ratio: float = MIN_LOG_RATIO
) -> Tensor:
    """GKD's divergence, `beta KL(T || M) + (1 - beta) KL(S || M)`. [..., V] -> [...].

    `beta=0` is `KL(T || S)` and `beta=1` is `KL(S || T)`: special cases, not limits (the interpolation tends to 0 at
    both ends). `beta=1` alone is infinite where T excludes a token, so there T is floored (`floor_excluded`).
    Source: arXiv 2306.13649, eq. 1. Raises ValueError for a beta outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}; it must lie in [0, 1]")
    if beta == 0.0:
        return kl(teacher_logp, student_logp)
    if beta == 1.0:
        return kl(student_logp, floor_excluded(teacher_logp, student_logp, min_log_ratio))
    mixture = log_mixture(student_logp, teacher_logp, beta)
    return beta * kl(teacher_logp, mixture) + (1.0 - beta) * kl(student_logp, mixture)


def entropy(logp: Tensor) -> Tensor:
    """`-sum_v P(v) log P(v)`. [..., V] -> [...]."""
    p = logp.exp()
    total: Tensor = torch.special.entr(p).sum(-1)
    return total


def log_tail(logp: Tensor) -> Tensor:
    """`log(1 - sum_k P(k))`: the log-mass outside K given tokens. [..., K] -> [...].

    The mass is floored at the precision of the K numbers; a mass rounded to 0 would make the reverse divergence infinite.
    """
    return torch.log((1.0 - logp.exp().sum(-1)).clamp_min(torch.finfo(logp.dtype).eps))


def topk_divergence(
    student_logp: Tensor,
    teacher_logp: Tensor,
    direction: Direction,
    tail: Tail,
    student_tail: Tensor | None = None,
    teacher_tail: Tensor | None = None,
    min_log_ratio: float = MIN_LOG_RATIO,
) -> Tensor:
    """A divergence over K tokens of the vocabulary, both sides from their full softmax. [..., K] -> [...].

    `bucket` adds one category with the rest of both distributions (their log-masses `student_tail`, `teacher_tail`,
    [...]): a lower bound of the full divergence, never negative. `none` truncates the sum: it may be negative.
    `renormalise` divides both sides by their mass on the K tokens. `student_tail=None` under `bucket` means that there is no
    rest (K = V); all three then equal the full divergence. Tokens that T excludes add nothing to the forward
    direction (0 log 0 = 0); in the reverse one, and before T is renormalised, they are floored (`floor_excluded`).
    """
    if direction == "reverse" or tail == "renormalise":
        teacher_logp = floor_excluded(teacher_logp, student_logp, min_log_ratio)
    if tail == "renormalise":
        student_logp = student_logp.log_softmax(-1)
        teacher_logp = teacher_logp.log_softmax(-1)
    elif tail == "bucket" and student_tail is not None:
        rest = log_tail(teacher_logp) if teacher_tail is None else teacher_tail
        student_logp = torch.cat([student_logp, student_tail.unsqueeze(-1)], -1)
        teacher_logp = torch.cat([teacher_logp, rest.unsqueeze(-1)], -1)
    if direction == "forward":
        return kl(teacher_logp, student_logp)
    return kl(student_logp, teacher_logp)
