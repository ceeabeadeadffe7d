"""URLs and API keys of servers, and what their replies mean: a result, a failure to retry, or a refusal."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from json import loads
from pathlib import Path
from ssl import SSLError
from typing import Any
from urllib.parse import urlsplit

from understudy.errors import RecipeError
from understudy.text import hide, looks_like_key, printable

MAX_WAIT_S = 60.0
"""Upper limit of a backoff, and of the wait that a server may ask for."""
_SHOWN_CHARS = 300
_READ_CHARS = 65_536
"""Characters of a message that are searched for keys before it is clipped."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BY_NAME = re.compile(r"\{(env|file):([^{}]+)\}")
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
    is_name = _VARIABLE.fullmatch(name) and (name in os.environ or (name.isupper() and not looks_like_key(name)))
    if name and not is_name:
        raise ValueError(
            f"{key} must be the NAME of an environment variable (in capitals, unless it is set), not the key itself"
        )


def read_key(variable: str) -> str:
    """Returns the key in an environment variable, "" if unset. Raises RecipeError if a header cannot carry it."""
    key = os.environ.get(variable, "").strip() if variable else ""
    if not (key.isascii() and key.isprintable()):
        raise RecipeError(f"the environment variable {variable} holds characters that no key has; set it again")
    hide(key)
    return key


def check_key(variable: str, optional: str = "") -> None:
    """Raises RecipeError, before anything is sent, for a key whose variable is named and not set; `optional` may be unset."""
    if variable not in ("", optional) and not read_key(variable):
        raise RecipeError(f"the environment variable {variable}, which is to hold a key, is not set, or empty")


def fill(text: str, place: str) -> str:
    """Returns `text` with `{env:NAME}` and `{file:PATH}` replaced by what that variable or file holds.

    Raises RecipeError for a variable that is not set and a file that cannot be read. What is filled in is hidden in every
    message from then on.
    """

    def found(match: re.Match[str]) -> str:
        kind, name = match.groups()
        try:
            value = os.environ[name] if kind == "env" else Path(name).expanduser().read_text(encoding="utf-8").strip()
        except KeyError:
            raise RecipeError(f"{place}: the environment variable {name} is not set") from None
        except (OSError, ValueError, RuntimeError):
            raise RecipeError(f"{place}: the file {name} cannot be read") from None
        hide(value)
        return value

    return _BY_NAME.sub(found, text)


def clip(text: str) -> str:
    """Returns the beginning of a server's message on one line, printable."""
    return " ".join(printable(text[:_READ_CHARS]).split())[:_SHOWN_CHARS]


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

    def outcome(self) -> Reply | Refused | Failure:
        """Returns the reply itself on success, else what its status means."""
        if 200 <= self.status < 300:
            return self
        try:
            values = loads(self.content)
            error = values.get("error", values)
            said = error if isinstance(error, str) else error.get("message") or error.get("detail")
        except (ValueError, AttributeError, RecursionError):
            said = None
        message = clip(said if isinstance(said, str) else self.text or "no more is said")
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
