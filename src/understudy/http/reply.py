"""What a server says, and what may be said to it again."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from json import loads
from ssl import SSLError
from typing import Any

MAX_WAIT_S = 60.0
"""The longest that a server may ask to wait, and that a backoff grows to."""
_PASSING = frozenset({408, 409, 425, 429})
"""Statuses below 500 that may be others a moment later."""
_DOES_NOT_FIT = frozenset({400, 413, 422})
_TOO_LONG = re.compile(r"context.?length|maximum context|too long|too many tokens", re.IGNORECASE)


_BUSY = frozenset({429, 503})


@dataclass(frozen=True)
class Reply:
    """What a server said; who reads one has status 200 to 299."""

    url: str
    """Of the replica that said it."""
    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def is_success(self) -> bool:
        """200 to 299."""
        return 200 <= self.status < 300

    @property
    def is_busy(self) -> bool:
        """Whether the server is there, and will answer later."""
        return self.status in _BUSY

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


class BadReply(Exception):  # noqa: N818 (caught by the client, which asks again)
    """A reply that is not what was asked for: half a body, no JSON, other tokens."""


@dataclass(frozen=True)
class Trouble:
    """Why an attempt failed that may do better later."""

    text: str
    wait_s: float = 0.0
    """As the server asks."""
    counts: bool = True
    """Against the retries; not where the server is busy, or not there yet."""


def passes(status: int) -> bool:
    """Whether another attempt may get another status."""
    return status in _PASSING or status >= 500


def is_alive(status: int) -> bool:
    """Of a replica that was asked for its health; many servers have no such path, or another way to ask."""
    return status < 500 or status == 501


def not_there(error: BaseException) -> bool:
    """Whether no connection was made, for another reason than a certificate, which stays as it is."""
    import httpx

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SSLError):
            return False
        cause = cause.__cause__ or cause.__context__
    return isinstance(error, httpx.ConnectError)


def check_size(headers: Mapping[str, str], limit: int) -> None:
    """Raises BadReply for a body that announces more than `limit` bytes, and for a compressed one."""
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise BadReply(f"a body compressed with {coding[:20]}, which nobody asked for")
    length = headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > limit:
        raise _too_long(limit)


async def read_body(parts: AsyncIterator[bytes], limit: int, *, cut: bool, count: Callable[[int], None]) -> bytes:
    """The body as it was sent. Beyond `limit` bytes it is cut, or raises BadReply; `count` is told all that came."""
    found, size = [], 0
    async for part in parts:
        count(len(part))
        size += len(part)
        found.append(part)
        if size > limit:
            if not cut:
                raise _too_long(limit)
            break
    return b"".join(found)[:limit]


def _too_long(limit: int) -> BadReply:
    return BadReply(f"a reply of more than {limit:,} bytes, the most that are read")


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
