"""URLs and API keys of servers, and what their replies mean: a result, a failure to retry, or a refusal."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from json import loads
from ssl import SSLError
from typing import Any
from urllib.parse import urlsplit

from understudy.errors import RecipeError
from understudy.text import HIDDEN, visible

MAX_WAIT_S = 60.0
"""Upper limit of a backoff, and of the wait that a server may ask for."""
_SHOWN_CHARS = 300
_READ_CHARS = 65_536
"""Characters of a message that are searched for the key before it is clipped."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TRANSIENT = frozenset({408, 409, 425, 429})
"""Statuses below 500 that may change with a retry."""
_DOES_NOT_FIT = frozenset({400, 413, 422})
_TOO_LONG = re.compile(
    r"context.?length|maximum context|too long|too many tokens"
    # vLLM, for a sequence that leaves no position for the one token that is generated
    r"|maximum model length|max_tokens must be at least 1",
    re.IGNORECASE,
)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; of all names, only localhost is known to be one."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(url: str, what: str, example: str = "http://host:8000") -> None:
    """Raises RecipeError if `url` is not an HTTP URL, or contains a password. `what`: its name in the recipe."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise RecipeError(f"{what} is not a URL; write it as {example}") from error
    if parts.username is not None or parts.password is not None:
        raise RecipeError(f"{what} holds a user or password; put a key into an environment variable and name that")
    if parts.scheme not in ("http", "https") or not host or not url.isprintable() or " " in url:
        raise RecipeError(f"{what} is {url!r}; write it as {example}")
    if parts.query or parts.fragment:
        raise RecipeError(f"{what} is {url!r}; give the base that paths are added to, such as {example}")


def check_variable(name: str, key: str) -> None:
    """Raises ValueError if the value of `key` is not the name of an environment variable; the value is not shown."""
    if name and not _VARIABLE.fullmatch(name):
        raise ValueError(f"{key} must be the NAME of an environment variable, not the key itself")


def read_key(variable: str) -> str:
    """Returns the key in an environment variable, "" if unset. Raises RecipeError if a header cannot carry it."""
    key = os.environ.get(variable, "").strip() if variable else ""
    if not (key.isascii() and key.isprintable()):
        raise RecipeError(f"the environment variable {variable} holds characters that no key has; set it again")
    return key


def without_key(text: str, variable: str) -> str:
    """Returns a server's message with the key removed and control characters made visible."""
    key = read_key(variable)
    shown = visible(text)
    return shown.replace(key, HIDDEN) if key else shown


def clip(text: str, variable: str) -> str:
    """Returns the beginning of `without_key` on one line."""
    return " ".join(without_key(text[:_READ_CHARS], variable).split())[:_SHOWN_CHARS]


class BadReply(Exception):  # noqa: N818 (the client catches it and asks again)
    """A malformed reply: truncated, not JSON, or about other tokens than were sent."""


class Refused(Exception):  # noqa: N818 (caught where it is known what was asked)
    """A status that a retry does not change."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"status {status}: {message}")
        self.status = status
        self.message = message

    @property
    def too_long(self) -> bool:
        """Whether the input is longer than the model's context."""
        return self.status in _DOES_NOT_FIT and bool(_TOO_LONG.search(self.message))


@dataclass(frozen=True)
class Failure:
    """A failed attempt that is worth a retry."""

    text: str
    wait_s: float = 0.0
    """Wait that the server asked for."""
    counts: bool = True
    """Counts against the retries. False if the server is busy, or not started yet."""


@dataclass(frozen=True)
class Reply:
    """The reply of one replica. `HttpClient.request` only hands on those with status 200 to 299."""

    url: str
    """Base URL of the replica."""
    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def text(self) -> str:
        """The content as UTF-8, with U+FFFD for invalid bytes."""
        return self.content.decode("utf-8", "replace")

    def json(self) -> Any:
        """Raises BadReply if the content is not JSON."""
        try:
            return loads(self.content)
        except (ValueError, RecursionError):
            raise BadReply(f"a reply that is not JSON: {self.text}") from None

    def outcome(self, variable: str) -> Reply | Refused | Failure:
        """Returns the reply itself on success, else what its status means. `variable` names the key to hide."""
        if 200 <= self.status < 300:
            return self
        try:
            values = loads(self.content)
            error = values.get("error", values)
            said = error if isinstance(error, str) else error.get("message") or error.get("detail")
        except (ValueError, AttributeError, RecursionError):
            said = None
        message = clip(said if isinstance(said, str) else self.text or "no more is said", variable)
        if self.status not in _TRANSIENT and self.status < 500:
            return Refused(self.status, message)
        try:
            asked_s = float(self.headers.get("retry-after", "0"))
        except ValueError:
            # a date, which the header may be as well: our own backoff is used
            asked_s = 0.0
        wait_s = min(MAX_WAIT_S, asked_s) if asked_s > 0 else 0.0
        return Failure(f"status {self.status}: {message}", wait_s, counts=self.status not in (429, 503))


def is_unreachable(error: BaseException) -> bool:
    """Whether no connection was made, so that the server may be starting. A bad certificate does not pass with time."""
    import httpx

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SSLError):
            return False
        cause = cause.__cause__ or cause.__context__
    return isinstance(error, httpx.ConnectError)
