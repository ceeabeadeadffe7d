"""Requests to one or several replicas of a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long and how often is asked."""

    timeout_s: float = 120.0
    """Of one attempt."""
    deadline_s: float = 600.0
    """Of one request with all its attempts and waits."""
    max_retries: int = 5
    """Of a request that timed out, lost its connection, met status 429 or 500 and above, or got a wrong reply."""
    backoff_s: float = 0.5
    """Before the first retry; doubled with each, up to a minute, with jitter."""
    max_concurrency: int = 16
    """Requests in flight over all replicas."""
    break_after: int = 3
    """Failures in a row after which a replica is left alone for a while, where there are others."""


@dataclass(frozen=True)
class Reply:
    """What a server said, status 200."""

    url: str
    """Of the replica that said it."""
    status: int
    headers: Mapping[str, str]
    content: bytes

    def json(self) -> Any:
        """Raises BadReply for what is no JSON."""
        raise NotImplementedError


class Refused(Exception):  # noqa: N818 (caught where it is known what was asked)
    """A status that no retry will change."""


class BadReply(Exception):  # noqa: N818 (caught by the wire, which asks again)
    """A reply that is not what was asked for: half a body, no JSON, other tokens."""


class Wire:
    """Replicas of one server behind one front: connections are kept, and closed by `close`."""

    def __init__(
        self, urls: Sequence[str], *, name: str, patience: Patience, api_key_env: str = "", seed: int = 0
    ) -> None:
        raise NotImplementedError

    def request(
        self,
        path: str,
        read: Callable[[Reply], Result],
        *,
        key: str,
        json: Any = None,
        content: bytes | None = None,
        method: str = "POST",
        replica: int | None = None,
    ) -> Result:
        """`read` of the reply of the first replica that gives a right one."""
        raise NotImplementedError

    def each(self, items: Sequence[Item], ask: Callable[[Item], Result]) -> list[Result]:
        """Results in the order of the items, `max_concurrency` asked at a time; the first error stops the rest."""
        raise NotImplementedError

    def close(self) -> None:
        """Gives up what is in flight and leaves no thread and no connection."""
        raise NotImplementedError
