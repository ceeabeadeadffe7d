"""A customer that a chat model plays, behind any endpoint of the OpenAI kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from understudy.errors import check_range
from understudy.http.client import HttpClient, RetryOptions
from understudy.http.replies import BadReply, Reply, check_address, check_variable

OVER = "###DONE###"
"""A customer writes this when there is nothing more to say."""
INSTRUCTION = f"""You play a customer who talks to a service agent.

This is your situation and what you want:
{{instruction}}

- Write one short message at a time, as the customer would. Never write the agent's words.
- Say only what the next step needs, and not all that you want at once.
- Say nothing that is not in your situation. If you are asked for something that it does not tell, say that you do not know it.
- Use words of your own, and stay in the role.
- When all that you want is done, or you are handed over to somebody else, write {OVER} and nothing else."""
_GREETING = "Hi! How can I help you today?"
"""Chats begin with the other side, which is the agent here."""


@dataclass(frozen=True, kw_only=True)
class UserModel(RetryOptions):
    """The section of a recipe for a model that plays the customer."""

    url: str
    """The base, such as http://host:8000/v1."""
    model: str
    """Its name at the server."""
    api_key_env: str = "OPENAI_API_KEY"
    """The NAME of the environment variable with the key; this one may be unset, and then none is sent."""
    temperature: float = 1.0
    """Sampling temperature of the customer's words; 0 to hear the same again."""
    max_tokens: int = 512
    """Limit of one message."""
    extra_body: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Added to every request, such as `chat_template_kwargs: {enable_thinking: false}`."""

    def __post_init__(self) -> None:
        _ = self.retry_policy
        check_variable(self.api_key_env, "api_key_env")
        check_address(self.url, "user.url", "http://host:8000/v1")
        check_range(self, 1, "max_tokens")
        check_range(self, 0, "temperature")

    def say(self, instruction: str, said: Sequence[Mapping[str, Any]], key: str) -> str | None:
        """The customer's next words after messages of "assistant" and "user"; None: nothing more. Raises EngineError.

        To the model the roles are exchanged: it plays the user.
        """
        roles = {"assistant": "user", "user": "assistant"}
        turned = [{"role": roles[str(message["role"])], "content": message["content"]} for message in said]
        messages = [
            {"role": "system", "content": INSTRUCTION.format(instruction=instruction)},
            {"role": "user", "content": _GREETING},
            *turned,
        ]
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            **self.extra_body,
        }
        client = _client(self.url, self.api_key_env, self.retry_policy)
        text = client.request("/chat/completions", _read, json=body, key=key)
        return None if OVER in text else text


@lru_cache(maxsize=8)
def _client(url: str, api_key_env: str, retry_policy: Any) -> HttpClient:
    """One for all episodes; its thread is a daemon."""
    return HttpClient([url], name="user", retry_policy=retry_policy, api_key_env=api_key_env)


def _read(reply: Reply) -> str:
    try:
        text = reply.json()["choices"][0]["message"]["content"]
    except (LookupError, TypeError, AttributeError):
        text = None
    if not isinstance(text, str) or not text.strip():
        raise BadReply(f"a reply that is no message of a chat: {reply.text}")
    return text.strip()
