"""Makes text from outside (a model, a data set, the environment) safe to show: visible characters only, no secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

_ESCAPE_SEQUENCE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor moves (ECMA-48, section 5.4)
    r"|\x1b[\]PX^_][^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)"  # OSC, DCS, SOS, PM, APC: titles, links, clipboard
    r"|\x1b[ -/]*[0-~]?"  # every other escape, also a lone one
)
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 controls but tab and newline; a carriage return overwrites its line
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"  # bidirectional controls reorder what is read (CVE-2021-42574)
)
_SURROGATE = re.compile("[\ud800-\udfff]")

HIDDEN = "[hidden]"
_NAMES_TO_HIDE = r"(?:api_?key|secret|passw(?:or)?d|credential|(?:access|auth|hub|hf|bearer)_?token)"
_SECRET_NAME = re.compile(_NAMES_TO_HIDE + "$", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$")
_SECRET_ITEM = re.compile(
    r"(\b[\w.-]*" + _NAMES_TO_HIDE + r"['\"]?\s*[:=]\s*['\"]?)(?!null\b|~|None\b)[^\s,}\]&'\"]+", re.IGNORECASE
)
_URL_PASSWORD = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@:]*:[^\s/@]*@", re.IGNORECASE)
_SHORTEST_SECRET = 8
"""Characters. A shorter value of a variable named like a secret would hide ordinary words."""


def visible(text: str) -> str:
    """Without terminal escape sequences, control characters (but tab and newline) and bidirectional overrides.

    Lone surrogates, which no encoding can write, become U+FFFD. An escape sequence without an end, which would make a
    terminal swallow all that follows, loses only its beginning.
    """
    return encodable(_ESCAPE_SEQUENCE.sub("", text.replace("\r\n", "\n")))


def encodable(text: str) -> str:
    """Does what `visible` does, but removes only the escape character itself: everything after it stays."""
    return _SURROGATE.sub("\ufffd", _INVISIBLE.sub("", text))


def without_secrets(text: str) -> str:
    """Hides passwords in URLs, values after a key named like a secret, and values of environment variables named so."""
    text = _SECRET_ITEM.sub(rf"\1{HIDDEN}", _URL_PASSWORD.sub(rf"\1{HIDDEN}@", text))
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_VARIABLE.search(name.upper()):
            text = text.replace(value, HIDDEN)
    return text


def plain_tree(value: object, name: str = "") -> object:
    """A recipe or facts as plain values with secrets hidden and keys as strings, to be stored elsewhere."""
    if _SECRET_NAME.search(name) and value is not None:
        return HIDDEN
    if isinstance(value, Mapping):
        return {str(key): plain_tree(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_tree(item) for item in value]
    if isinstance(value, bool | int | float) or value is None:
        return value
    return without_secrets(str(value))
