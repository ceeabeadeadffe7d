"""What vLLM says, read with distrust, and the samples that it becomes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from understudy.engines.hf.assemble import prefix_length
from understudy.http import BadReply, Reply
from understudy.types import Author, Finish, Request, Sample

LEAST = -9999.0
"""What vLLM writes for minus infinity, which no token that was drawn can have."""
SLACK = 1e-6
"""By which rounding may lift a log-probability above 0."""


@dataclass(frozen=True)
class Part:
    """Tokens of one response, as far as one reply has them."""

    ids: list[int]
    logprob: list[float]
    finish: str
    """"stop", "length", or "abort": the server was paused."""


@dataclass(eq=False)
class Draft:
    """A response that is being written, perhaps in several parts and by several versions."""

    request: Request
    context: list[int]
    room: int
    """Tokens that the student may write in all."""
    ids: list[int] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    version: list[int] = field(default_factory=list)
    finish: Finish | None = None
    num_fruitless: int = 0
    """Replies in a row without a token."""
    num_redrawn: int = 0
    """Draws that gave no token which exists."""

    def add(self, part: Part, version: int, vocab_size: int) -> None:
        """Appends a part. It ends before the first token from `vocab_size` on, and with it the response, truncated; a
        response without any token is drawn again."""
        keep = next((place for place, token in enumerate(part.ids) if token >= vocab_size), len(part.ids))
        self.ids += part.ids[:keep]
        self.logprob += part.logprob[:keep]
        self.version += [version] * keep
        self.num_fruitless = 0 if keep else self.num_fruitless + 1
        if keep < len(part.ids):
            self.num_redrawn += 1
            self.finish = "length" if self.ids else None
        elif part.finish == "stop":
            self.finish = "stop"
        elif part.finish == "length" or len(self.ids) >= self.room:
            self.finish = "length"


def read_parts(reply: Reply, body: dict[str, Any]) -> list[Part]:
    """The `n` responses to a request, in order. Raises BadReply for anything that does not fit it."""
    choices = _choices(reply, body["n"])
    return [_read_part(choice, body) for choice in choices]


def _choices(reply: Reply, num: int) -> list[dict[str, Any]]:
    values = reply.json()
    choices = values.get("choices") if isinstance(values, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise BadReply("a reply without choices")
    if sorted(str(choice.get("index")) for choice in choices) != sorted(map(str, range(num))):
        raise BadReply(f"{len(choices)} choices where {num} were asked for")
    return sorted(choices, key=lambda choice: int(choice["index"]))


def _read_part(choice: dict[str, Any], body: dict[str, Any]) -> Part:
    ids, finish = choice.get("token_ids"), choice.get("finish_reason")
    given = choice.get("prompt_token_ids")
    if given is not None and given != body["prompt"]:
        raise BadReply("it read other prompt tokens than were sent")
    if not isinstance(ids, list) or not all(isinstance(token, int) and token >= 0 for token in ids):
        raise BadReply("no token ids (vLLM before 0.20 does not give them)")
    if finish not in ("stop", "length", "abort"):
        raise BadReply(f"the finish reason {finish!r}")
    if len(ids) > body["max_tokens"]:
        raise BadReply(f"{len(ids)} tokens where at most {body['max_tokens']} were asked for")
    logprobs = choice.get("logprobs")
    found = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    logprob = check_logprobs(found if ids else [], len(ids))
    stop = set(body["stop_token_ids"])
    if any(token in stop for token in ids[:-1]):
        raise BadReply("it went on after a token that ends a response")
    ended = bool(ids) and ids[-1] in stop
    if finish == "stop" and not ended:
        raise BadReply(
            f"it stopped at a token that ends no response ({ids[-1:]}); the server has stop tokens of its own"
        )
    if finish == "length" and not ended and len(ids) < body["max_tokens"]:
        raise BadReply(f"it gave up after {len(ids)} of {body['max_tokens']} tokens")
    return Part(ids, logprob, "stop" if ended else finish)


def check_logprobs(values: object, num_tokens: int) -> list[float]:
    """One number a token. Raises BadReply for another count, what is missing, not finite, or above 0."""
    if not isinstance(values, list) or len(values) != num_tokens:
        count = len(values) if isinstance(values, list) else "no"
        raise BadReply(f"{count} log-probabilities for {num_tokens} tokens")
    for place, value in enumerate(values):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise BadReply(f"the log-probability of token {place} is {value!r}")
        if not math.isfinite(value) or not LEAST < value <= SLACK:
            raise BadReply(f"the log-probability of token {place} is {value}")
    return [min(float(value), 0.0) for value in values]


def read_scores(reply: Reply, ids: Sequence[int]) -> list[float]:
    """`prompt_logprobs` of every token but the first. Raises BadReply."""
    rows = _choices(reply, 1)[0].get("prompt_logprobs")
    if not isinstance(rows, list) or len(rows) != len(ids):
        raise BadReply(
            f"{len(rows) if isinstance(rows, list) else 'no'} prompt log-probabilities for {len(ids)} tokens"
        )
    found = []
    for row, token in zip(rows[1:], ids[1:], strict=True):
        entry = row.get(str(token)) if isinstance(row, dict) else None
        found.append(entry.get("logprob") if isinstance(entry, dict) else None)
    return check_logprobs(found, len(ids) - 1)


def to_samples(drafts: Sequence[Draft], tokenizer: Any, *, with_logprob: bool) -> list[Sample]:
    """One sample for each finished draft. `with_logprob=False`: the server's numbers refer to another distribution."""
    texts: list[str] = tokenizer.batch_decode([_shown(draft) for draft in drafts], skip_special_tokens=True)
    return [_to_sample(draft, text, with_logprob) for draft, text in zip(drafts, texts, strict=True)]


def _shown(draft: Draft) -> list[int]:
    """The response without the token that ended it."""
    prompt = draft.request.token_ids.numel()
    return [*draft.context[prompt:], *(draft.ids[:-1] if draft.finish == "stop" else draft.ids)]


def _to_sample(draft: Draft, text: str, with_logprob: bool) -> Sample:
    assert draft.finish is not None
    request, num_read, num_written = draft.request, len(draft.context), len(draft.ids)
    num_given = prefix_length(request)
    whose = torch.tensor([Author.PROMPT, Author.TEACHER, Author.STUDENT], dtype=torch.uint8)
    return Sample(
        prompt=request.prompt,
        index=request.index,
        token_ids=torch.tensor([*draft.context, *draft.ids], dtype=torch.int64),
        author=whose.repeat_interleave(torch.tensor([num_read - num_given, num_given, num_written])),
        prompt_length=request.token_ids.numel(),
        finish=draft.finish,
        text=text,
        rollout_logprob=torch.tensor([math.nan] * num_read + draft.logprob) if with_logprob else None,
        policy_version=torch.tensor([-1] * num_read + draft.version, dtype=torch.int64),
        teacher=request.prompt.teacher,
    )
