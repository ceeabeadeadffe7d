"""Requests to an engine: teacher prefixes, length limits, and the responses that become samples."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from understudy.errors import DataError, RecipeError
from understudy.lazy import Tensor, torch
from understudy.types import Author, Finish, Request, Sample


def cut_prefix(
    response_ids: Tensor, share: float, *, max_new_tokens: int, of: Literal["share", "length"] = "share"
) -> Tensor | None:
    """The first l = min(floor(share * L), L - 1) tokens, L = min(len(response_ids), max_new_tokens); None where l = 0.

    `of="length"`: l = min(floor(share * max_new_tokens), L - 1), a maximum length that is the same for every response.

    The response ends with its EOS, which is never part of the prefix: at least one token is left to the student. A cut falls
    between two tokens of the student's tokenizer, so a character of several byte-level tokens may be cut in two; the student
    reads ids, and only the decoded text of the prefix alone would show it. Raises ValueError for a share outside [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share is {share}; it must lie in [0, 1]")
    length = min(response_ids.numel(), max_new_tokens)
    num_given = min(math.floor(share * (length if of == "share" else max_new_tokens)), length - 1)
    return response_ids[:num_given] if num_given > 0 else None


def guided_requests(
    requests: Sequence[Request],
    responses: Sequence[Tensor | None],
    share: float,
    *,
    max_new_tokens: int,
    of: Literal["share", "length"] = "share",
    offset: int = 0,
) -> list[Request]:
    """The requests, in order, each with the start of its response as prefix (`cut_prefix`); without one where there is no
    response or l = 0.

    `offset` is added to the index. Where guided samples stand beside on-policy ones it is larger than every index of the
    step, on all ranks, so that no two share a name and with it their draws; 0 where they replace them.
    """
    return [
        replace(
            request,
            index=request.index + offset,
            prefix_ids=None
            if response is None
            else cut_prefix(response, share, max_new_tokens=request.prompt.room(max_new_tokens), of=of),
        )
        for request, response in zip(requests, responses, strict=True)
    ]


@dataclass(eq=False)
class Response:
    """A response in progress, possibly in several parts and by several versions of the weights."""

    request: Request
    context: list[int]
    """Prompt and prefix."""
    room: int
    """Maximum number of tokens from the student."""
    ids: list[int] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    version: list[int] = field(default_factory=list)
    finish: Finish | None = None
    """None while in progress."""
    stopped_by_text: bool = False
    """Whether it ends with a string of `request.stop`, not with an end token."""
    num_redrawn: int = 0
    """Discarded draws of tokens that the tokenizer does not have."""

    def cut(self, tokenizer: Any) -> bool:
        """Ends the response with the token that completes one of `request.stop`, and drops the tokens after it.
        Returns whether there is one."""
        num = find_stop(self.ids, self.request.stop, tokenizer)
        if num is not None:
            del self.ids[num:], self.logprob[num:], self.version[num:]
            self.finish, self.stopped_by_text = "stop", True
        return num is not None


def find_stop(ids: Sequence[int], stop: Sequence[str], tokenizer: Any) -> int | None:
    """The number of tokens up to and including the one that completes the first stop string; None if there is none."""

    def holds(num: int) -> bool:
        text: str = tokenizer.decode(ids[:num], clean_up_tokenization_spaces=False)
        return any(one in text for one in stop)

    if not stop or not ids or not holds(len(ids)):
        return None
    # a string that is there stays there with more tokens
    return 1 + bisect_left(range(1, len(ids)), True, key=holds)


def open_responses(requests: Sequence[Request], max_new_tokens: int, limit: int | None, owner: str) -> list[Response]:
    """An empty response for each request.

    Raises DataError for an empty prompt and for a prefix that leaves no room, RecipeError for a request whose longest
    response needs more than `limit` positions; `owner` has that many.
    """
    responses = []
    for request in requests:
        length, room = request.token_ids.numel(), request.prompt.room(max_new_tokens)
        prefix = [] if request.prefix_ids is None else request.prefix_ids.tolist()
        if length == 0:
            raise DataError(f"request {request.key} has no prompt token; a prompt needs at least one (a BOS will do)")
        if len(prefix) >= room:
            raise DataError(
                f"request {request.key}: a prefix of {len(prefix)} tokens leaves nothing of max_new_tokens {room} to the "
                "student; cut it (`engines.requests.cut_prefix`)"
            )
        if limit is not None and length + max_new_tokens > limit:
            raise RecipeError(
                f"request {request.key}: {length} prompt tokens and max_new_tokens {max_new_tokens} make "
                f"{length + max_new_tokens}, but {owner}; lower max_new_tokens or drop longer prompts"
            )
        responses.append(Response(request, request.token_ids.tolist() + prefix, room - len(prefix)))
    return responses


def to_samples(responses: Sequence[Response], tokenizer: Any, *, with_logprob: bool = True) -> list[Sample]:
    """One sample for each finished response; its text has neither special tokens nor the token that ended it.

    `with_logprob=False`: the numbers refer to another distribution than `Sample.rollout_logprob` promises.
    """
    if not responses:
        # batch_decode makes one empty text of an empty list
        return []
    shown = []
    for one in responses:
        prefix = one.context[one.request.token_ids.numel() :]
        ended = one.finish == "stop" and not one.stopped_by_text
        shown.append(prefix + (one.ids[:-1] if ended else one.ids))
    # all at once: a fast tokenizer decodes a batch in parallel
    texts: list[str] = tokenizer.batch_decode(shown, skip_special_tokens=True)
    samples = []
    for one, text in zip(responses, texts, strict=True):
        assert one.finish is not None
        num_prompt, num_read = one.request.token_ids.numel(), len(one.context)
        author = torch.full((num_read + len(one.ids),), Author.STUDENT, dtype=torch.uint8)
        author[:num_read] = Author.TEACHER
        author[:num_prompt] = Author.PROMPT
        # copies, not views: pickling a view, for other ranks, pickles the whole underlying tensor
        logprob = torch.tensor([math.nan] * num_read + one.logprob, dtype=torch.float32)
        samples.append(
            Sample(
                prompt=one.request.prompt,
                index=one.request.index,
                token_ids=torch.tensor(one.context + one.ids),
                author=author,
                prompt_length=num_prompt,
                finish=one.finish,
                text=text,
                rollout_logprob=logprob if with_logprob else None,
                policy_version=torch.tensor([-1] * num_read + one.version),
                teacher=one.request.prompt.teacher,
            )
        )
    return samples
