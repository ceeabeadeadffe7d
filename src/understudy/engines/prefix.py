"""Responses that a teacher begins and the student continues."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from understudy.types import Request


def cut_prefix(response_ids: Tensor, share: float, *, max_new_tokens: int) -> Tensor | None:
    """The first l = min(floor(share * L), L - 1) tokens, L = min(len(response_ids), max_new_tokens); None where l = 0.

    The response ends with its EOS, which is never given: one token or more is left to the student. A cut falls between
    two tokens of the student's tokenizer, so a character that is several byte-level tokens may be cut in two; the student
    reads ids, and only the decoded text of the prefix alone would show it. Raises ValueError for a share outside [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share is {share}; it must lie in [0, 1]")
    length = min(response_ids.numel(), max_new_tokens)
    given = min(math.floor(share * length), length - 1)
    return response_ids[:given] if given > 0 else None


def guided_requests(
    requests: Sequence[Request],
    responses: Sequence[Tensor | None],
    share: float,
    *,
    max_new_tokens: int,
    offset: int = 0,
) -> list[Request]:
    """One for each request, in order, with the start of its response as prefix; none where there is no response or l = 0.

    `offset` is added to the index. Where guided samples stand beside on-policy ones it is larger than every index of the
    step, on all ranks, so that no two share a name and with it their draws; 0 where they replace them.
    """
    return [
        replace(
            request,
            index=request.index + offset,
            prefix_ids=None if response is None else cut_prefix(response, share, max_new_tokens=max_new_tokens),
        )
        for request, response in zip(requests, responses, strict=True)
    ]
