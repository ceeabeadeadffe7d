"""Makes text from outside (a model, a data set, the environment) safe to show: visible characters only, no secrets."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

_ESCAPE_SEQUENCE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor moves (ECMA-48, section 5.4)
    r"|\x1b[\]PX^_][^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)"  # OSC, DCS, SOS, PM, APC: titles, links, clipboard
    r"|\x1b[ -/]*[0-~]?"  # every other escape, also a lone one
)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""C0 and C1 controls but tab and newline; a carriage return overwrites its line."""
_UNSEEN = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
    "\ufff9-\ufffb\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
    # a variation selector belongs to one symbol before it; a row of them carries text that nobody sees
    "|(?<![#*0-9\u00a1-\ufdff\ufe10-\uffff\U00010000-\U0010ffff])[\ufe00-\ufe0f]"
    # joiners shape Indic and Arabic letters and join emoji; beside plain letters they only hide
    "|(?<![\u0590-\ufffd\U00010000-\U000dffff])[\u200c\u200d]|[\u200c\u200d](?![\u0590-\ufffd\U00010000-\U000dffff])"
)
"""Characters of no width, and those that reorder what is read (CVE-2021-42574) or carry text that nobody sees (tags)."""
_SURROGATE = re.compile("[\ud800-\udfff]")

HIDDEN = "[hidden]"
_SECRET_WORDS = frozenset(
    {"apikey", "secret", "secrets", "password", "passwd", "passphrase", "passcode", "pwd", "credential", "credentials"}
    | {"bearer", "authorization", "auth", "cookie", "jwt"}
)
_SECRET_ENDING = re.compile(r"(password|passwd|passphrase|secret|apikey|credentials?)$")
_VARIABLE_ENDING = re.compile(
    r"(KEYS?|TOKENS?|SECRETS?|PASS|PWD|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|AUTH|COOKIE|JWT)$"
)
"""Ends of names in capitals, as environment variables have: DBPASS, MY_TOKEN."""
_ORDINARY_BEFORE = {
    "token": re.compile(
        r"eos|bos|pad|unk|sep|cls|mask|stop|end|start|image|video|audio|vision|special|next|new|last|first|per|each|one|any|no|the"
        r"|a|every|this|that|same|other|extra|control|sampled|turn|think|tool"
    ),
    "key": re.compile(
        r"|limit|primary|foreign|sort|cache|sample|prompt|group|image|row|data|dict|public|unknown|unique|the|a|this|that|each"
        r"|every|other|another|same|first|last|no|json|yaml|arguments"
    ),
    "pass": re.compile(r"|forward|backward|first|second|one|each|every|single|extra"),
}
"""Words before a `token`, a `key` or a `pass` that is no secret; nothing too, but for a token."""
# in all of these a text of any length takes time in proportion to it
_NAME = re.compile(r"(?<![\w.-])([\w.-]+)([\"']?\s*[:=]\s*)")
_FLAG = re.compile(r"(?<![\w-])--?([A-Za-z][\w-]*)[\"']?,?\s+(?:-\s+)?(?=[^\s-])")
_VALUE = re.compile(
    r"""(?:(?:bearer|basic|token)\s+)?(?:"(?:[^"\\\n]|\\.)*"|'(?:[^'\n]|'')*'|[^\s,}\]&'"]+)""", re.IGNORECASE
)
_NO_SECRET = re.compile(
    r"""["']?(?:\[hidden\]|null\b|~|None\b|unknown key;|\{(?:env|file):[^}]*\}|(?:Bearer|Basic)[]).,;]|["']{2})"""
)
"""Values that need not be hidden: none at all, and the name of a variable or a file."""
_VARIABLES = re.compile(r"(\benv\.\w+=)[^\s'\"]+|(\benv['\"]?\s*[=:]\s*)\{[^{}]*\}?")
"""`launch.env.NAME=VALUE` and `env={NAME: VALUE}` of a command line."""
_USER = re.compile(r"://(?:[^\s\"'<>/?#]{0,200}|[^\s\"'<>/?#:]{0,200}:(?!\d+/)[^\s\"'<>]{0,200})@")
_URL = re.compile(
    r"\b([a-z][a-z0-9+.-]{0,20}://[^\s\"'<>/?#,;)\]}]*)([^\s\"'<>?#,;)\]}]*)(\?[^\s\"'<>#]*)?(#[^\s\"'<>]*)?",
    re.IGNORECASE,
)
_KEY_FORM = re.compile(
    r"\b(?:sk-[\w-]{16,}|hf_\w{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abeprs]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{10,500}\.[\w-]{10,5000}\.[\w-]*)"
)
"""Keys whose form gives them away: OpenAI, Hugging Face, GitHub, GitLab, Slack, AWS, Google, JSON web tokens."""
_MIXED = re.compile(r"(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{12,}|[A-Za-z0-9]{32,}")
_PLAIN_VARIABLE = re.compile(
    r"(?:CUDA|HIP|ROCR|NCCL|GLOO|OMP|MKL|VLLM|SGLANG|TORCH|PYTORCH|TRITON|RAY|HF_HUB|TOKENIZERS)_\w+|PATH"
)
_PLAIN_VALUE = re.compile(
    r"[-+\d.,:]*|true|false|on|off|yes|no|(?:\{(?:server|port|model)\}|\{(?:env|file):[^}]*\})+", re.IGNORECASE
)
_SHORTEST_SECRET = 8
"""Characters. A shorter value of a variable named like a secret would hide ordinary words."""
_known: set[str] = set()
"""Secrets that were read by the name of their variable or file."""


def visible(text: str) -> str:
    """Without terminal escape sequences and control characters (but tab and newline); what has no width or reorders the text
    is written out, as \\u200b.

    Lone surrogates, which no encoding can write, become U+FFFD. An escape sequence without an end, which would make a
    terminal swallow all that follows, loses only its beginning.
    """
    return encodable(_ESCAPE_SEQUENCE.sub("", text.replace("\r\n", "\n")))


def encodable(text: str) -> str:
    """Does what `visible` does, but removes only the escape character itself: everything after it stays."""
    seen = _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), _CONTROL.sub("", text))
    return _SURROGATE.sub("\ufffd", seen)


def printable(text: str) -> str:
    """Text for a terminal, a log or a message: visible, and without secrets."""
    return visible(without_secrets(text))


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a value of this name is to be hidden: api_key, hub-token, MY_TOKEN, DBPASS; not eos_token, api_key_env or PWD."""
    words = [word for word in re.split(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])", name) if word]
    # a shell's working directories
    if not words or name in ("PWD", "OLDPWD"):
        return False
    last, before = words[-1].lower(), words[-2].lower() if len(words) > 1 else ""
    if last in _ORDINARY_BEFORE:
        return not _ORDINARY_BEFORE[last].fullmatch(before)
    in_capitals = words[-1].isupper() and words[-1] != "KEY" and bool(_VARIABLE_ENDING.search(words[-1]))
    return last in _SECRET_WORDS or bool(_SECRET_ENDING.search(last)) or in_capitals


def looks_like_key(text: str) -> bool:
    """Whether a word is a key by its form: a known prefix, or letters and digits without end."""
    return bool(_KEY_FORM.search(text) or _MIXED.search(text))


def hide(secret: str) -> None:
    """From now on `without_secrets` hides this value, whatever it is named."""
    if len(secret) > 2:
        _known.add(secret)


def without_secrets(text: str) -> str:
    """Hides what nobody else may read.

    Those are: user, query and fragment of a URL, and what looks like a key in its path; keys of well-known forms; values after
    a name or a flag like those of secrets (`is_secret_name`); variables for another process; the values of environment
    variables named so, and those that `hide` was told.
    """
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    if "://" in text:
        text = _URL.sub(_shown_url, _USER.sub(f"://{HIDDEN}@", text))
    text = _KEY_FORM.sub(HIDDEN, text)
    text = _VARIABLES.sub(lambda found: f"{found[1] or found[2]}{HIDDEN}", text)
    return _after(_FLAG, _after(_NAME, text))


def _secrets() -> Iterator[str]:
    values = {os.environ.get(name, "") for name in os.environ if is_secret_name(name)}
    for value in {value for value in values if len(value) >= _SHORTEST_SECRET} | _known:
        yield from _spellings(value)


@lru_cache(maxsize=256)
def _spellings(secret: str) -> frozenset[str]:
    """A secret as itself, in a URL, and in a string of JSON or Python."""
    return frozenset({secret, quote(secret, safe=""), json.dumps(secret)[1:-1], repr(secret)[1:-1]})


def _shown_url(found: re.Match[str]) -> str:
    host, path, query, fragment = found.groups()
    parts = path.split("/")
    for index, part in enumerate(map(unquote, parts)):
        if looks_like_key(part) or any(is_secret_name(f"x {word}") for word in re.split(r"[\W_]+", part)):
            parts[index] = HIDDEN
    tail = (f"?{HIDDEN}" if query and query != "?" else query or "") + (
        f"#{HIDDEN}" if fragment and fragment != "#" else ""
    )
    return f"{host}{'/'.join(parts)}{tail}"


def _after(named: re.Pattern[str], text: str) -> str:
    """The text with the values hidden that follow a name of a secret."""
    parts, done = [], 0
    for found in named.finditer(text):
        if found.start() < done or not is_secret_name(found[1]) or _NO_SECRET.match(text, found.end()):
            continue
        if "." in found[1] and found[0].endswith(": ") and found[0][len(found[1])] == ":":
            # a path in the recipe, behind which a message goes on
            continue
        if value := _VALUE.match(text, found.end()):
            quoted = value[0][0] if value[0][0] in "\"'" else ""
            parts += [text[done : found.end()], quoted, HIDDEN, quoted]
            done = value.end()
    return "".join([*parts, text[done:]])


def plain_tree(value: object, name: str = "") -> Any:
    """A recipe or facts as plain values with secrets hidden and keys as strings, to be stored where others may read.

    Hidden are values under a name like those of secrets, words after such a flag (`[--api-key, ...]`), `headers` and variables
    of `env` but numbers and those of CUDA, NCCL, vLLM and the like, and what `without_secrets` finds. Twice is as once.
    """
    if isinstance(value, Mapping):
        if is_secret_name(name) and value:
            return HIDDEN
        if name in ("env", "headers"):
            return {str(key): _shown_variable(str(key), item) for key, item in value.items()}
        return {without_secrets(str(key)): plain_tree(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        flags = ["", *(item if isinstance(item, str) and item.startswith("-") else "" for item in value)]
        return [plain_tree(item, flag or name) for item, flag in zip(value, flags, strict=False)]
    if value is None or isinstance(value, bool) or value == "":
        return value
    if is_secret_name(name) or name in ("env", "headers"):
        return value if isinstance(value, str) and _NO_SECRET.match(value) else HIDDEN
    return value if isinstance(value, int | float) else without_secrets(str(value))


def _shown_variable(name: str, value: object) -> object:
    """A variable of another process: none is told but plain numbers and settings of known libraries."""
    if isinstance(value, Mapping | list | tuple) and not is_secret_name(name):
        # settings of an environment of verifiers
        return plain_tree(value, "env")
    if not is_secret_name(name) and (_PLAIN_VARIABLE.fullmatch(name) or _PLAIN_VALUE.fullmatch(str(value))):
        return plain_tree(value)
    return value if _PLAIN_VALUE.fullmatch(str(value)) and "{" in str(value) else HIDDEN
