"""What a server says of itself before anything is scored."""

from __future__ import annotations

from typing import Any

from understudy.errors import EngineError
from understudy.http import BadReply, HttpClient, Refused, Reply


def look(client: HttpClient, model: str, version_path: str | None) -> dict[str, Any]:
    """`models` that every replica has, `max_length` in tokens and `version`, None where none is told.

    Raises EngineError for a replica that does not answer, and one that lacks the model.
    """
    seen = [_look(client, number, model) for number in range(len(client.urls))]
    told = [_version(client, number, version_path) for number in range(len(client.urls))]
    lengths = [found["max_length"] for found in seen if found["max_length"] is not None]
    return {
        "models": [name for name in seen[0]["models"] if all(name in found["models"] for found in seen)],
        "max_length": min(lengths, default=None),
        "version": ", ".join(sorted({version for version in told if version is not None})) or None,
    }


def _look(client: HttpClient, number: int, model: str) -> dict[str, Any]:
    url = client.urls[number]

    def read(reply: Reply) -> dict[str, Any]:
        try:
            cards = reply.json()["data"]
            lengths = [card.get("max_model_len") for card in cards if card["id"] == model]
            return {"models": [card["id"] for card in cards], "max_length": lengths[0] if lengths else None}
        except (LookupError, TypeError, AttributeError):
            raise BadReply("/v1/models lists no models") from None

    try:
        found = client.request("/v1/models", read, key="/v1/models", method="GET", replica=number)
    except Refused as refused:
        hint = "check teacher.url and teacher.api_key_env"
        raise EngineError(f"{url} refuses /v1/models with {refused}; {hint}") from None
    if model not in found["models"]:
        raise EngineError(f"{url} has no model {model!r}; it has: {', '.join(map(str, found['models'])) or 'none'}")
    return found


def _version(client: HttpClient, number: int, path: str | None) -> str | None:
    """What it says of itself; None where it says nothing."""

    def read(reply: Reply) -> str | None:
        try:
            return str(reply.json()["version"])
        except (BadReply, LookupError, TypeError):
            return None

    try:
        return None if path is None else client.request(path, read, key=path, method="GET", replica=number)
    except Refused:
        return None
