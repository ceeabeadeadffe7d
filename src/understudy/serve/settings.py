"""How a teacher is served."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from understudy.errors import RecipeError
from understudy.http import read_key
from understudy.models import DType
from understudy.serve.scorer import HiddenDType

MAX_REQUEST_BYTES = 64 * 2**20
"""16 million ids."""
MAX_REPLY_BYTES = 2**30
"""128,000 hidden states of 4,096 numbers in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of `understudy serve-teacher`."""

    model: str
    """A directory or a hub name."""
    tokenizer: str | None = None
    """Of the model, where it has none beside it."""
    revision: str | None = None
    host: str = "127.0.0.1"
    port: int = 8100
    """0: any that is free."""
    token_env: str = ""
    """The NAME of the environment variable with the token that clients must send."""
    dtype: DType = "auto"
    device: str = "auto"
    hidden_dtype: HiddenDType = "auto"
    """In which hidden states are sent; "auto": the model's own."""
    max_batch_tokens: int | None = None
    """Slots of one forward."""
    max_request_bytes: int = MAX_REQUEST_BYTES
    max_reply_bytes: int = MAX_REPLY_BYTES
    share_prompts: bool = True
    """Read the prompt of several responses once."""

    def check(self) -> None:
        """Raises RecipeError for a number that cannot be, and for an address that others reach without a token."""
        if not 0 <= self.port <= 65_535:
            raise RecipeError(f"--port is {self.port}; it must lie in [0, 65535], 0 for any that is free")
        for name in ("max_batch_tokens", "max_request_bytes", "max_reply_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if not self.token() and not is_loopback(self.host):
            raise RecipeError(
                f"--host {self.host} can be reached from other machines: name a variable with a token for clients "
                "(--token-env NAME), or keep to 127.0.0.1"
            )

    def token(self) -> str:
        """Empty where none is asked for. Raises RecipeError, without it, for a variable that is not set or no header can
        carry."""
        if not self.token_env:
            return ""
        token = read_key(self.token_env)
        if not token:
            raise RecipeError(f"--token-env {self.token_env}: that environment variable is not set, or empty")
        return token


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; of names, only localhost is known to be so."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
