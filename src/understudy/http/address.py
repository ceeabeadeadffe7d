"""Where is asked, and with which key."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from understudy.errors import RecipeError
from understudy.text import HIDDEN, visible

_SHOWN_CHARS = 300
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_READ_CHARS = 65_536
"""Of a text that is clipped; the rest of a long reply is not looked through."""


def check_address(url: str, what: str, example: str = "http://host:8000") -> None:
    """Raises RecipeError for what is no address of HTTP, or holds a password. `what`: how the recipe names it."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise RecipeError(f"{what} is no address; write it as {example}") from error
    if parts.username is not None or parts.password is not None:
        raise RecipeError(f"{what} holds a user or password; put a key into an environment variable and name that")
    if parts.scheme not in ("http", "https") or not host or not url.isprintable() or " " in url:
        raise RecipeError(f"{what} is {url!r}; write it as {example}")
    if parts.query or parts.fragment:
        raise RecipeError(f"{what} is {url!r}; give the base that paths are added to, such as {example}")


def check_variable(name: str, key: str) -> None:
    """Raises ValueError, without the value, where what is no name of an environment variable stands under `key`."""
    if name and not _VARIABLE.fullmatch(name):
        raise ValueError(f"{key} must be the NAME of an environment variable, not the key itself")


def read_key(variable: str) -> str:
    """The key in a variable, empty where it is not set. Raises RecipeError, without it, for one that no header can carry."""
    key = os.environ.get(variable, "").strip() if variable else ""
    if not (key.isascii() and key.isprintable()):
        raise RecipeError(f"the environment variable {variable} holds characters that no key has; set it again")
    return key


def without_key(text: str, variable: str) -> str:
    """What a server said, without the key and what a terminal would obey."""
    key = read_key(variable)
    shown = visible(text)
    return shown.replace(key, HIDDEN) if key else shown


def clip(text: str, variable: str) -> str:
    """The beginning of `without_key`, on one line."""
    return " ".join(without_key(text[:_READ_CHARS], variable).split())[:_SHOWN_CHARS]
