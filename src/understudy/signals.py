"""Signals: what the teacher says about each token, without gradient. Row t concerns token t of a batch."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def log_ratio(teacher_logprob: Tensor, student_logprob: Tensor) -> Tensor:
    """`d_t = log T(y_t) - log S(y_t)`, the token reward of on-policy distillation. [T]."""
    return teacher_logprob - student_logprob


@torch.no_grad()
def return_to_go(reward: Tensor, sequence: Tensor, mask: Tensor, discount: float) -> Tensor:
    """`G_t = sum_{u >= t} discount^(u - t) r_u` over the trained tokens of the same sample. [T].

    u - t counts trained tokens, so that what the environment wrote in between costs no discount. The tokens of a
    sample stand in their order; samples may be interleaved. Masked tokens give 0 and are not read.
    """
    gain = torch.zeros_like(reward)
    for name in sequence[mask].unique():
        index = torch.nonzero(mask & (sequence == name)).squeeze(-1)
        running = reward.new_zeros(())
        for t in reversed(index.tolist()):
            running = reward[t] + discount * running
            gain[t] = running
    return gain
