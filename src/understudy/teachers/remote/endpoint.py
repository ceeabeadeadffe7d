"""Chat completions of the OpenAI kind, and what to do about what such a server refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from understudy.errors import EngineError
from understudy.http import BadReply, HttpClient, Refused, Reply, RetryPolicy, read_key, without_key

UNKNOWN_FIELD = (400, 422)
"""What servers say to a field of a request that they do not know; vLLM says nothing."""
_PATH = "/chat/completions"


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An address, and how patiently it is asked."""

    base: str
    api_key_env: str
    retry_policy: RetryPolicy
    seed: int = 0

    def open(self) -> HttpClient:
        """To be closed by whoever opens it; nothing is sent yet."""
        return HttpClient(
            [self.base], name="teacher", retry_policy=self.retry_policy, api_key_env=self.api_key_env, seed=self.seed
        )

    def safe(self, text: str) -> str:
        """What a server said, without the key and what a terminal would obey."""
        return without_key(text, self.api_key_env)

    def error(self, refused: Refused) -> EngineError:
        """What to do about a status."""
        env = self.api_key_env
        key_set = bool(read_key(env))
        hints = {
            401: f"the key in {env} is not accepted" if key_set else f"set {env or 'api_key_env'} to a key",
            403: f"the key in {env} may not use this model" if key_set else f"set {env or 'api_key_env'} to a key",
            404: "check teacher.url (it mostly ends in /v1) and that the server has that model",
        }
        hint = hints.get(refused.status, "check teacher.constrain, teacher.limit_key and teacher.extra_body")
        return EngineError(f"{self.base.rstrip('/')}{_PATH} refuses with {refused}; {hint}")


def complete(client: HttpClient, body: dict[str, Any], key: str) -> dict[str, Any]:
    """The first choice of the reply. Raises as `HttpClient.request`."""
    return client.request(_PATH, _first_choice, json=body, key=key)


def _first_choice(reply: Reply) -> dict[str, Any]:
    try:
        choice = reply.json()["choices"][0]
        content = choice["message"].get("content")
    except (LookupError, TypeError, AttributeError):
        raise _no_completion(reply) from None
    if not isinstance(choice, dict) or not (content is None or isinstance(content, str)):
        raise _no_completion(reply)
    return choice


def _no_completion(reply: Reply) -> BadReply:
    return BadReply(f"a reply that is no chat completion: {reply.text}")
