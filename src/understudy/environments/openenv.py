"""An environment behind a URL, with the interface of OpenEnv: reset, step, an observation with a reward, done.

Each episode is a session of its own over a WebSocket, `URL/ws`, as OpenEnv's own client has it. Messages are
`{"type": "reset" | "step" | "close", "data": {...}}`, the answers
`{"type": "observation", "data": {"observation": {...}, "reward": number or null, "done": bool}}` or of type "error". Any
server that speaks so will do, such as a Gymnasium environment behind a few lines.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from understudy.environments.base import Step
from understudy.errors import EngineError, RecipeError, check_range
from understudy.http.replies import check_address
from understudy.types import Message

MAX_MESSAGE_BYTES = 16 * 2**20
_CLOSE_S = 2.0


@dataclass(frozen=True)
class Seen:
    """The environment's answer to a reset or a step."""

    observation: Mapping[str, Any]
    reward: float | None
    done: bool


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server of environments, and how strings become actions and observations become strings."""

    url: str
    """The base, such as http://host:8000."""
    action_field: str = "message"
    """The field of an action that holds what the student says."""
    action: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further fields of every action."""
    observation_field: str | None = None
    """The field of an observation that the student reads; null: all of it as JSON."""
    timeout_s: float = 60.0
    """Seconds for an answer."""

    def __post_init__(self) -> None:
        check_address(self.url, "url", "http://host:8000")
        check_range(self, 0, "timeout_s", above=True)

    def text(self, seen: Seen) -> str:
        """Returns the text that the student reads. Raises EngineError where the observation has no such field."""
        if self.observation_field is None:
            return json.dumps(dict(seen.observation), ensure_ascii=False)
        if self.observation_field not in seen.observation:
            known = ", ".join(seen.observation) or "none"
            raise EngineError(f"the observation of {self.url} has no field {self.observation_field!r}; fields: {known}")
        value = seen.observation[self.observation_field]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class Session:
    """One episode at a server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._open = ExitStack()
        self._socket: Any = None

    def reset(self, data: Mapping[str, Any]) -> Seen:
        """Begins an episode. Raises EngineError."""
        return self._ask("reset", data)

    def step(self, text: str) -> Seen:
        """Acts. Raises EngineError."""
        return self._ask("step", {**self._server.action, self._server.action_field: text})

    def close(self) -> None:
        """Ends the session."""
        if self._socket is not None:
            with suppress(Exception), self._open:
                self._socket.send(json.dumps({"type": "close"}))

    def _ask(self, kind: str, data: Mapping[str, Any]) -> Seen:
        server, deadline = self._server, time.monotonic() + self._server.timeout_s
        try:
            if self._socket is None:
                self._socket = self._open.enter_context(_connect(server))
            self._socket.send(json.dumps({"type": kind, "data": dict(data)}))
            reply = json.loads(self._socket.recv(timeout=max(0.0, deadline - time.monotonic())))
        except RecipeError:
            raise
        except TimeoutError:
            raise EngineError(f"{server.url} gave no answer to a {kind} within {server.timeout_s:g} s") from None
        # the library raises its own, of the system and ValueError
        except Exception as error:
            raise EngineError(f"{server.url} cannot be asked for a {kind}: {type(error).__name__} {error}") from error
        return _seen(reply, server.url)


def check_package() -> None:
    """Raises RecipeError where `websockets` is not installed."""
    if find_spec("websockets") is None:
        raise RecipeError("environments by URL need the package websockets; run: pip install 'understudy[openenv]'")


def _connect(server: Server) -> AbstractContextManager[Any]:
    check_package()
    from websockets.sync.client import connect

    address = f"{server.url.rstrip('/')}/ws".replace("http", "ws", 1)
    # loopback is never behind a proxy of the environment
    proxy = None if any(f"//{host}" in address for host in ("127.0.0.1", "localhost", "[::1]")) else True
    connection: AbstractContextManager[Any] = connect(
        address, open_timeout=server.timeout_s, close_timeout=_CLOSE_S, max_size=MAX_MESSAGE_BYTES, proxy=proxy
    )
    return connection


def _seen(reply: object, url: str) -> Seen:
    data = reply.get("data") if isinstance(reply, dict) else None
    if isinstance(reply, dict) and reply.get("type") == "error":
        raise EngineError(f"{url} says: {str(data)[:200]}")
    observation = data.get("observation") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(observation, dict):
        raise EngineError(f"{url} sent no observation: {str(reply)[:200]}")
    reward = data.get("reward")
    if not (reward is None or isinstance(reward, int | float)):
        raise EngineError(f"{url} sent the reward {str(reward)[:80]}, which is no number")
    return Seen(observation, None if reward is None else float(reward), bool(data.get("done")))


class Remote:
    """One episode: the student's messages are the actions, the sum of their rewards between `low` and `high` is its score."""

    def __init__(
        self,
        server: Server,
        reset: Mapping[str, Any],
        *,
        low: float = 0.0,
        high: float = 1.0,
        max_turns: int = 10,
    ) -> None:
        self.max_turns = max_turns
        # a first message also begins the episode
        self.deadline_s = 3 * server.timeout_s + 10.0
        self._server, self._reset, self._low, self._high = server, reset, low, high
        self._session: Session | None = None
        self._total: float | None = None

    def step(self, message: Message) -> Step:
        """The observation, and the score so far where there were rewards. Raises EngineError."""
        if self._session is None:
            self._session = Session(self._server)
            self._session.reset(self._reset)
        seen = self._session.step(message.content)
        if seen.reward is not None:
            self._total = (self._total or 0.0) + seen.reward
        score = None if self._total is None else (self._total - self._low) / (self._high - self._low)
        if score is not None and not 0.0 <= score <= 1.0:
            raise EngineError(
                f"the rewards of an episode at {self._server.url} sum to {self._total:g}, which is not between reward_low = "
                f"{self._low:g} and reward_high = {self._high:g}"
            )
        messages = () if seen.done else ({"role": "user", "content": self._server.text(seen)},)
        return Step(messages, done=seen.done, reward=score)

    def close(self) -> None:
        """Ends the session."""
        if self._session is not None:
            self._session.close()
