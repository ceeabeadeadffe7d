"""What a server says, and what may be said to it again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from json import loads
from typing import Any

MAX_WAIT_S = 60.0
"""The longest that a server may ask to wait, and that a backoff grows to."""
_PASSING = frozenset({408, 409, 425, 429})
"""Statuses below 500 that may be others a moment later."""
_DOES_NOT_FIT = frozenset({400, 413, 422})
_TOO_LONG = re.compile(r"context.?length|maximum context|too long|too many tokens", re.IGNORECASE)


@dataclass(frozen=True)
class Reply:
    """What a server said, status 200 to 299."""

    url: str
    """Of the replica that said it."""
    status: int
    headers: Mapping[str, str]
    content: bytes

    def json(self) -> Any:
        """Raises BadReply for what is no JSON."""
        try:
            return loads(self.content)
        except (ValueError, RecursionError):
            raise BadReply(f"a reply that is no JSON: {self.text}") from None

    @property
    def text(self) -> str:
        """The content, with U+FFFD for what is no UTF-8."""
        return self.content.decode("utf-8", "replace")


class Refused(Exception):  # noqa: N818 (caught where it is known what was asked)
    """A status that no retry will change."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"status {status}: {message}")
        self.status = status
        self.message = message

    @property
    def too_long(self) -> bool:
        """Whether the question does not fit the model."""
        return self.status in _DOES_NOT_FIT and bool(_TOO_LONG.search(self.message))


class BadReply(Exception):  # noqa: N818 (caught by the wire, which asks again)
    """A reply that is not what was asked for: half a body, no JSON, other tokens."""


@dataclass(frozen=True)
class Trouble:
    """Why an attempt failed that may do better later."""

    text: str
    wait_s: float = 0.0
    """As the server asks."""


def passes(status: int) -> bool:
    """Whether another attempt may get another status."""
    return status in _PASSING or status >= 500


def message_of(reply: Reply) -> str:
    """`error.message` where the body has one, else the body."""
    try:
        values = loads(reply.content)
        error = values.get("error", values)
        found = error if isinstance(error, str) else error.get("message") or error.get("detail")
    except (ValueError, AttributeError, RecursionError):
        found = None
    return found if isinstance(found, str) else reply.text or "no more is said"


def asked_to_wait_s(reply: Reply) -> float:
    """Seconds of the header Retry-After, at most `MAX_WAIT_S`; 0 for none and for a date."""
    try:
        asked = float(reply.headers.get("retry-after", "0"))
    except ValueError:
        return 0.0
    return min(MAX_WAIT_S, asked) if asked > 0 else 0.0
