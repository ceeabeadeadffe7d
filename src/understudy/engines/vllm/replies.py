"""Reads vLLM's replies, and raises BadReply for anything that does not fit the request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from understudy.http.replies import BadReply, Reply

LEAST = -9999.0
"""vLLM's substitute for minus infinity, which no drawn token can have."""
SLACK = 1e-6
"""Rounding may lift a log-probability this far above 0."""


def read_choices(reply: Reply, body: dict[str, Any]) -> list[tuple[list[int], list[float], str]]:
    """Ids, log-probabilities and finish of the `n` responses, in order; "abort": the server was paused."""
    stop, read = set(body["stop_token_ids"]), []
    for choice in _choices(reply, body["n"]):
        ids, finish, prompt = (choice.get(name) for name in ("token_ids", "finish_reason", "prompt_token_ids"))
        if prompt is not None and prompt != body["prompt"]:
            raise BadReply("it read other prompt tokens than were sent")
        if not isinstance(ids, list) or not all(isinstance(token, int) and token >= 0 for token in ids):
            raise BadReply("no token ids (vLLM before 0.20 does not give them)")
        if finish not in ("stop", "length", "abort"):
            raise BadReply(f"the finish reason {finish!r}")
        if len(ids) > body["max_tokens"]:
            raise BadReply(f"{len(ids)} tokens where at most {body['max_tokens']} were asked for")
        logprobs = choice.get("logprobs")
        values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        # a reply without tokens has no log-probabilities either
        logprob = check_logprobs(values if ids else [], len(ids))
        if any(token in stop for token in ids[:-1]):
            raise BadReply("it went on after a token that ends a response")
        ended = bool(ids) and ids[-1] in stop
        by_text = finish == "stop" and choice.get("stop_reason") in body.get("stop", ())
        if finish == "stop" and not ended and not by_text:
            raise BadReply(
                f"it stopped at a token that ends no response ({ids[-1:]}); the server has stop tokens of its own"
            )
        if finish == "length" and not ended and len(ids) < body["max_tokens"]:
            raise BadReply(f"it gave up after {len(ids)} of {body['max_tokens']} tokens")
        read.append((ids, logprob, "stop" if ended else finish))
    return read


def _choices(reply: Reply, num: int) -> list[dict[str, Any]]:
    values = reply.json()
    choices = values.get("choices") if isinstance(values, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise BadReply("a reply without choices")
    if sorted(str(choice.get("index")) for choice in choices) != sorted(map(str, range(num))):
        raise BadReply(f"{len(choices)} choices where {num} were asked for")
    return sorted(choices, key=lambda choice: int(choice["index"]))


def check_logprobs(values: object, num_tokens: int) -> list[float]:
    """One number a token. Raises BadReply for a wrong count and for a number that is missing, not finite, or above 0."""
    if not isinstance(values, list) or len(values) != num_tokens:
        count = len(values) if isinstance(values, list) else "no"
        raise BadReply(f"{count} log-probabilities for {num_tokens} tokens")
    for place, value in enumerate(values):
        # so written that NaN is an error too
        if isinstance(value, bool) or not isinstance(value, int | float) or not LEAST < value <= SLACK:
            raise BadReply(f"the log-probability of token {place} is {value!r}")
    return [min(float(value), 0.0) for value in values]


def read_scores(reply: Reply, ids: Sequence[int]) -> list[float]:
    """`prompt_logprobs` of every token but the first."""
    rows = _choices(reply, 1)[0].get("prompt_logprobs")
    if not isinstance(rows, list) or len(rows) != len(ids):
        count = len(rows) if isinstance(rows, list) else "no"
        raise BadReply(f"{count} prompt log-probabilities for {len(ids)} tokens")
    found = []
    for row, token in zip(rows[1:], ids[1:], strict=True):
        entry = row.get(str(token)) if isinstance(row, dict) else None
        found.append(entry.get("logprob") if isinstance(entry, dict) else None)
    return check_logprobs(found, len(ids) - 1)
