"""Sampled-token and top-K scores from hidden states, chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.linear import score
from understudy.linear.head import LMHead
from understudy.linear.products import project

CHUNK_ELEMENTS = 64 * 152_064
"""Logits in one chunk: 64 rows of the largest common vocabulary, 37 MiB in float32."""


def score_rows(hidden: Tensor, head: LMHead, target: Tensor, *, k: int | None) -> dict[str, Tensor]:
    """`logprob` [T] of the targets and `entropy` [T]; with k also `topk_ids` and `topk_logprob` [T, min(k, V)].

    hidden [T, H], target [T]. Every logit is formed once; a chunk of them is all that is held.
    """
    if k is None:
        logprob, entropy = score(hidden, head, target)
        return {"logprob": logprob, "entropy": entropy}
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    rows = max(1, CHUNK_ELEMENTS // head.num_tokens)
    chunks = []
    for start in range(0, max(1, len(target)), rows):
        part = slice(start, start + rows)
        logits = project(hidden[part].to(dtype), head)
        top = logits.topk(min(k, head.num_tokens), dim=-1)
        lse = logits.logsumexp(-1, keepdim=True)
        logp = logits.sub_(lse)
        chunks.append(
            {
                "logprob": logp.gather(-1, target[part, None]).squeeze(-1),
                "entropy": -torch.linalg.vecdot(logp.exp(), logp),
                "topk_ids": top.indices,
                "topk_logprob": top.values - lse,
            }
        )
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
