"""From a row of logits and one uniform number to a token and its log-probability."""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.types import Sampling


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling. logits [B, V] at the sampling temperature (at 1 for a greedy draw), uniform [B] float64.

    The token is the first one whose cumulative probability exceeds the uniform number; greedy: the most likely one.
    Its log-probability refers to the softmax of `logits`, unfiltered. -> ids [B], logprob [B] in the logits' type.
    A row with NaN or +inf gives some token, with log-probability NaN.
    """
    peak = logits.amax(-1, keepdim=True)
    shifted = logits - peak
    weight = shifted.exp()
    if sampling.temperature == 0:
        ids, total = logits.argmax(-1, keepdim=True), weight.sum(-1, keepdim=True)
    elif sampling.filtered:
        total = weight.sum(-1, keepdim=True)
        kept, order = _filter(weight, sampling)
        ids = order.gather(-1, _invert(kept.cumsum(-1, dtype=torch.float64), uniform))
    else:
        cumulative = weight.cumsum(-1, dtype=torch.float64)
        ids, total = _invert(cumulative, uniform), cumulative[:, -1:]
    logprob = shifted.gather(-1, ids) - total.log()
    return ids.squeeze(-1), logprob.squeeze(-1).to(logits.dtype)


def _invert(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds `uniform` times the total, so never one of weight 0. [B, 1].

    A uniform number below 1 times the total stays below the total in float64; only a row of NaN needs the clamp.
    """
    index = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return index.clamp_max_(cumulative.shape[-1] - 1)


def _filter(weight: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Weights in descending order with 0 for what is filtered out, and the ids in that order. [B, K] each.

    In the order of transformers: top-k, then top-p of what is left, then min-p; the most likely token always stays.
    """
    size = weight.shape[-1]
    kept, order = (
        weight.topk(min(sampling.top_k, size), dim=-1)
        if sampling.top_k > 0
        else weight.sort(dim=-1, descending=True, stable=True)
    )
    allowed = kept >= sampling.min_p * kept[:, :1]
    if sampling.top_p < 1.0:
        cumulative = kept.cumsum(-1, dtype=torch.float64)
        before = cumulative - kept
        allowed &= before < sampling.top_p * cumulative[:, -1:]
        allowed[:, 0] = True
    return kept.where(allowed, 0.0), order
