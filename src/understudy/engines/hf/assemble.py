"""From decoded rows to samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from understudy.engines.hf.decode import Decoded
from understudy.types import Author, Request, Sample


def prefix_length(request: Request) -> int:
    """Response tokens that are there before the student writes."""
    return 0 if request.prefix_ids is None else request.prefix_ids.numel()


def to_samples(
    requests: Sequence[Request], contexts: Sequence[Tensor], decoded: Decoded, tokenizer: Any, version: int
) -> list[Sample]:
    """One sample for each request and row; context [c] is the prompt with the prefix.

    All tokens lie one after the other in one tensor a field, of which the samples are views.
    """
    lengths = decoded.length.tolist()
    whose = torch.tensor(
        [(request.token_ids.numel(), prefix_length(request), n) for request, n in zip(requests, lengths, strict=True)]
    )
    author = torch.tensor([Author.PROMPT, Author.TEACHER, Author.STUDENT], dtype=torch.uint8).repeat(len(requests))
    author = author.repeat_interleave(whose.flatten())
    sampled = author == Author.STUDENT
    valid = torch.arange(decoded.ids.shape[1]) < whose[:, 2:]

    ids = torch.empty_like(author, dtype=torch.int64)
    ids[~sampled] = torch.cat(list(contexts))
    ids[sampled] = decoded.ids.cpu()[valid]
    logprob = torch.full(ids.shape, float("nan"))
    logprob[sampled] = decoded.logprob.cpu()[valid].float()
    policy_version = torch.where(sampled, version, -1)

    totals = whose.sum(-1).tolist()
    stopped = decoded.stopped.tolist()
    fields = zip(*(field.split(totals) for field in (ids, author, logprob, policy_version)), strict=True)
    texts = _texts(requests, ids.tolist(), totals, stopped, tokenizer)
    return [
        Sample(
            prompt=request.prompt,
            index=request.index,
            token_ids=row_ids,
            author=row_author,
            prompt_length=request.token_ids.numel(),
            finish="stop" if stop else "length",
            text=text,
            rollout_logprob=row_logprob,
            policy_version=row_version,
            teacher=request.prompt.teacher,
        )
        for request, stop, text, (row_ids, row_author, row_logprob, row_version) in zip(
            requests, stopped, texts, fields, strict=True
        )
    ]


def _texts(
    requests: Sequence[Request], ids: list[int], totals: list[int], stopped: list[bool], tokenizer: Any
) -> list[str]:
    """Responses without special tokens and without the token that ended them."""
    ends = list(accumulate(totals))
    responses = [
        ids[end - total + request.token_ids.numel() : end - stop]
        for request, end, total, stop in zip(requests, ends, totals, stopped, strict=True)
    ]
    texts: list[str] = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return texts
