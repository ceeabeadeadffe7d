"""Per-token advantages and weights, without gradient. Row t is token t of a batch."""

from __future__ import annotations

import math
from typing import Literal

from understudy.errors import ScoreError
from understudy.lazy import Tensor, no_grad, torch

Correction = Literal["none", "tis", "icepop"]
STD_EPS = 1e-6
"""Added to the standard deviation, so groups with equal rewards get advantage 0."""

ROUNDINGS = 16
"""Ulps between two computations of one log-probability; at most 11 measured between packed and single sequences."""


@no_grad
def log_ratio(teacher_logprob: Tensor, student_logprob: Tensor) -> Tensor:
    """`d_t = log T(y_t) - log S(y_t)`, the token reward of on-policy distillation. [T]."""
    return teacher_logprob - student_logprob


@no_grad
def extrapolation(teacher_logprob: Tensor, reference_logprob: Tensor, student_logprob: Tensor, scale: float) -> Tensor:
    """`d_t + (scale - 1)(log T(y_t) - log R(y_t))`: the log-ratio to `T^scale R^(1-scale)`, up to its normaliser. [T].

    Source: G-OPD, arXiv 2602.12125, eq. 6.
    """
    return log_ratio(teacher_logprob, student_logprob) + (scale - 1.0) * (teacher_logprob - reference_logprob)


@no_grad
def rounding(teacher_logprob: Tensor, student_logprob: Tensor) -> Tensor:
    """Largest `|d_t|` that rounding alone can explain when T(y_t) = S(y_t). [T] nats."""
    eps = max(torch.finfo(value.dtype).eps for value in (teacher_logprob, student_logprob))
    # a log-probability is a difference of logits, so its error does not shrink as it approaches 0
    return ROUNDINGS * eps * student_logprob.abs().clamp_min(1.0)


@no_grad
def acceptance(teacher_logprob: Tensor, student_logprob: Tensor) -> Tensor:
    """`min(T(y_t) / S(y_t), 1)`, the probability that speculative decoding keeps the student's token. [T].

    Exactly 1 where T is below S by at most `rounding`. Its expectation under S is 1 minus the total variation
    distance of S and T.
    """
    ratio = log_ratio(teacher_logprob, student_logprob)
    return torch.where(ratio >= -rounding(teacher_logprob, student_logprob), 0.0, ratio).exp()


@no_grad
def gate(teacher_logprob: Tensor, student_logprob: Tensor, threshold: float) -> Tensor:
    """Tokens with `T(y_t) - S(y_t) <= threshold`; T and S within `rounding` count as equal. [T] bool.

    Empty at `threshold=-1`. Source: AOPD, arXiv 2605.06387.
    """
    # rounding must not decide on which side T = S falls
    slack = rounding(teacher_logprob, student_logprob) * student_logprob.exp()
    below = teacher_logprob.exp() - student_logprob.exp() <= threshold + slack
    # rounding may take a difference of two probabilities below -1
    return below & (threshold > -1.0)


def mixture_floor(mix: float, kind: Literal["mixture", "odds"]) -> float:
    """The reward floor: `log(mix) / (1 - mix)`, or `log(mix / (1 - mix))`. Source: REOPOLD, arXiv 2603.11137."""
    return math.log(mix) / (1.0 - mix) if kind == "mixture" else math.log(mix / (1.0 - mix))


@no_grad
def top_share(value: Tensor, mask: Tensor, share: float) -> Tensor:
    """The `ceil(share N)` largest of the N values where `mask`; ties with the smallest of them are included. [T] bool."""
    # 0.07 * 100 is 7.000000000000001
    num_kept = math.ceil(round(share * int(mask.sum()), 9))
    if num_kept == 0:
        return torch.zeros_like(mask)
    least = value[mask].topk(num_kept).values[-1]
    return mask & (value >= least)


@no_grad
def entropy_from_topk(topk_logprob: Tensor) -> Tensor:
    """Entropy of the K probabilities and the rest as one category: a lower bound of the full entropy. [T, K] -> [T]."""
    p = topk_logprob.exp()
    rest = (1.0 - p.sum(-1)).clamp(0.0, 1.0)
    bound: Tensor = torch.special.entr(p).sum(-1) + torch.special.entr(rest)
    return bound


@no_grad
def group_advantage(reward: Tensor, group: Tensor, *, normalise_std: bool) -> Tensor:
    """`(R_i - mean_g) / (std_g + 1e-6)` over the samples of the same group; without the division for Dr.GRPO. [N].

    The population standard deviation gives a group of one 0 instead of NaN. Equal rewards give exactly 0.
    Source: GRPO, arXiv 2402.03300; Dr.GRPO, arXiv 2503.20783.
    """
    names, index = group.unique(return_inverse=True)
    size = torch.zeros(len(names), dtype=reward.dtype).index_add_(0, index, torch.ones_like(reward))
    mean = torch.zeros_like(size).index_add_(0, index, reward) / size
    # rounding in the mean of equal numbers would be divided by 1e-6
    low = torch.full_like(size, math.inf).scatter_reduce(0, index, reward, "amin")
    high = torch.full_like(size, -math.inf).scatter_reduce(0, index, reward, "amax")
    centred = torch.where((low == high)[index], 0.0, reward - mean[index])
    if not normalise_std:
        return centred
    std = (torch.zeros_like(size).index_add_(0, index, centred**2) / size).sqrt()
    return centred / (std[index] + STD_EPS)


@no_grad
def importance(
    student_logprob: Tensor,
    rollout_logprob: Tensor | None,
    on_policy: Tensor,
    kind: Correction,
    low: float,
    high: float,
) -> Tensor | None:
    """Importance weight for the gap between the trainer's S_old and the engine's mu. [T]; None without a correction.

    "tis": `min(S_old / mu, high)`; "icepop": `S_old / mu` inside [low, high], 0 outside. Tokens that no engine sampled
    get weight 1. Sources: truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training"), IcePop (Ling team, arXiv 2510.18855).
    """
    if kind == "none":
        return None
    if rollout_logprob is None:
        raise ScoreError(
            f"correction {kind!r} needs rollout_logprob, which the batch does not have: the engine records it"
        )
    ratio = torch.where(on_policy, (student_logprob - rollout_logprob).exp(), 1.0)
    if kind == "tis":
        return ratio.clamp_max(high)
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


@no_grad
def overlong_penalty(num_tokens: int, limit: int, buffer: int) -> float:
    """0 up to `limit - buffer` tokens, then linearly down to -1 at `limit`. Source: DAPO, arXiv 2503.14476, eq. 13."""
    if buffer <= 0:
        return 0.0
    return -min(max(num_tokens - (limit - buffer), 0) / buffer, 1.0)


@no_grad
def return_to_go(reward: Tensor, sequence: Tensor, mask: Tensor, discount: float) -> Tensor:
    """`G_t = sum_{u >= t} discount^(u - t) r_u` over the trained tokens of the same sample. [T].

    u - t counts trained tokens only, so tokens that the environment wrote are not discounted. The tokens of a
    sample are in order; samples may be interleaved. Masked tokens are not read and give 0.
    """
    rewards, names = reward.tolist(), sequence.tolist()
    gain, running = [0.0] * len(rewards), dict[int, float]()
    for t in reversed(mask.nonzero().squeeze(-1).tolist()):
        running[names[t]] = gain[t] = rewards[t] + discount * running.get(names[t], 0.0)
    return reward.new_tensor(gain)
