"""An endpoint of the OpenAI kind for environments with a loop of their own, which ask a model for every message.

Each episode has an endpoint of its own on the loopback interface: a request is what the student reads next, and the student's
message is the reply.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, Queue
from secrets import token_urlsafe
from threading import Thread
from typing import Any

from understudy.config import load_json
from understudy.environments.base import Step
from understudy.errors import EngineError
from understudy.types import Message

MODEL = "student"
"""The model's name at the endpoint."""

Messages = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Asked:
    """A message is wanted from the student: the whole conversation, and the tools that it may call."""

    messages: Messages
    tools: Messages


@dataclass(frozen=True)
class Over:
    """The end of an episode: its reward, or why it has none."""

    reward: float | None = None
    error: str = ""


class Conversation:
    """Questions of an environment to the student in one episode, and the answers. Any thread may call it."""

    def __init__(self) -> None:
        self.events: Queue[Asked | Over] = Queue()
        self._answers: Queue[Mapping[str, Any] | None] = Queue()
        self._session: str | None = None

    def ask(self, body: Mapping[str, Any], session: str) -> Mapping[str, Any] | None:
        """Returns the student's message, for which it waits; None where the episode is given up.

        One agent speaks for the student: another one's request ends the episode.
        """
        if self._session not in (None, session):
            self.events.put(
                Over(error="the student plays two agents of the environment; give the others models of their own")
            )
            return None
        self._session = session
        try:
            messages = tuple(_plain(message) for message in body["messages"])
            tools = tuple(dict(tool) for tool in body.get("tools") or ())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self.events.put(Over(error=f"a request that the student cannot read: {error}"))
            return None
        self.events.put(Asked(messages, tools))
        return self._answers.get()

    def answer(self, message: Mapping[str, Any] | None) -> None:
        """Replies to the request that waits."""
        self._answers.put(message)

    def next(self, timeout_s: float) -> Asked | Over:
        """The next request or the end. Raises EngineError where neither comes in time."""
        try:
            return self.events.get(timeout=timeout_s)
        except Empty:
            raise EngineError(f"the environment asked for no message and did not end within {timeout_s:g} s") from None


def _plain(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message with a string as content and nothing null. Raises ValueError for content that is no text."""
    content = message.get("content")
    if isinstance(content, list):
        if unread := [part.get("type") for part in content if part.get("type") != "text"]:
            raise ValueError(f"a message of the role {message['role']} has a part of type {unread[0]!r}, not text")
        content = "\n".join(part["text"] for part in content)
    return {key: value for key, value in message.items() if value is not None} | {"content": content or ""}


class Seat:
    """The endpoints at which environments find the student, one for each episode, at an address that nobody guesses."""

    def __init__(self) -> None:
        self._taken: dict[str, Conversation] = {}
        taken = self._taken

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # a header and a body written apart would wait 40 ms for each other
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                conversation = taken.get(self.path.split("/")[1]) if "/" in self.path else None
                try:
                    asked = load_json(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
                except ValueError as error:
                    self._send(400, "application/json", json.dumps({"error": {"message": f"no JSON: {error}"}}))
                    return
                said = None
                if conversation is not None and self.path.endswith("/chat/completions"):
                    said = conversation.ask(asked, self.headers.get("X-Session-ID") or "")
                if said is None:
                    self._send(410, "application/json", '{"error": {"message": "the episode is over"}}')
                elif asked.get("stream"):
                    self._send(200, "text/event-stream", _streamed(said))
                else:
                    self._send(200, "application/json", json.dumps(_completion(said)))

            def _send(self, status: int, kind: str, text: str) -> None:
                data = text.encode()
                # whoever asked may have left by now
                with suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        Thread(target=self._server.serve_forever, args=(0.05,), daemon=True, name="understudy-seat").start()

    def take(self) -> tuple[str, Conversation]:
        """A new episode: its base URL, and its conversation."""
        name, conversation = token_urlsafe(16), Conversation()
        self._taken[name] = conversation
        return f"http://127.0.0.1:{self._server.server_port}/{name}/v1", conversation

    def leave(self, conversation: Conversation) -> None:
        """Ends an episode: requests that still wait, or come later, are refused."""
        for name in [name for name, one in self._taken.items() if one is conversation]:
            self._taken.pop(name, None)
        conversation.answer(None)

    def close(self) -> None:
        """Ends all episodes."""
        for conversation in list(self._taken.values()):
            self.leave(conversation)
        self._server.shutdown()
        self._server.server_close()


def _completion(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "id": "understudy",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [{"index": 0, "message": dict(message), "finish_reason": _finish(message)}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }


def _streamed(message: Mapping[str, Any]) -> str:
    """The reply as the events of a stream, all at once."""
    calls = [{"index": index, **call} for index, call in enumerate(message.get("tool_calls", ()))]
    delta: dict[str, Any] = {**message, "tool_calls": calls} if calls else dict(message)
    frame = {"id": "understudy", "object": "chat.completion.chunk", "created": int(time.time()), "model": MODEL}
    chunks: list[dict[str, Any]] = [
        {"delta": delta, "finish_reason": None},
        {"delta": {}, "finish_reason": _finish(message)},
    ]
    events = [json.dumps({**frame, "choices": [{"index": 0, **chunk}]}) for chunk in chunks]
    return "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])


def _finish(message: Mapping[str, Any]) -> str:
    return "tool_calls" if message.get("tool_calls") else "stop"


class Played:
    """One episode of an environment that asks. `begin` starts it, and `leave` gives it up."""

    def __init__(
        self,
        begin: Callable[[], Conversation],
        leave: Callable[[Conversation], None],
        opening: Asked,
        *,
        low: float,
        high: float,
        max_turns: int,
        timeout_s: float,
    ) -> None:
        self.max_turns = max_turns
        # a first message also begins the episode
        self.deadline_s = 2 * timeout_s + 10.0
        self._begin, self._leave, self._asked = begin, leave, opening
        self._low, self._high, self._timeout_s = low, high, timeout_s
        self._conversation: Conversation | None = None
        self._num_calls = 0

    def step(self, message: Message) -> Step:
        """Returns the reply of the environment to the message, or its reward. Raises EngineError."""
        if self._conversation is None:
            self._conversation = self._begin()
            first = self._conversation.next(self._timeout_s)
            if first != self._asked:
                raise EngineError(
                    first.error if isinstance(first, Over) else "the episode begins otherwise than its prompt"
                )
        self._conversation.answer(self._wire(message))
        event = self._conversation.next(self._timeout_s)
        if isinstance(event, Over):
            return Step(done=True, reward=self._score(event))
        known = len(self._asked.messages)
        said, new = event.messages[known : known + 1], event.messages[known + 1 :]
        if event.messages[:known] != self._asked.messages or [one["role"] for one in said] != ["assistant"]:
            raise EngineError("the environment changes what was said before, which a student's tokens cannot")
        if event.tools != self._asked.tools:
            raise EngineError("the environment offers other tools than at the beginning of the episode")
        if not new or any(one["role"] == "assistant" for one in new):
            raise EngineError("the environment speaks for the student, or asks again for the same message")
        self._asked = event
        return Step(new)

    def close(self) -> None:
        """Gives the episode up."""
        if self._conversation is not None:
            self._leave(self._conversation)

    def _wire(self, message: Message) -> Mapping[str, Any]:
        calls = []
        for call in message.tool_calls:
            self._num_calls += 1
            # a call that cannot be read goes there as it is: the environment says what is wrong with it
            arguments = call.text if call.error else json.dumps(dict(call.arguments), ensure_ascii=False)
            function = {"name": call.name or "unreadable", "arguments": arguments}
            calls.append({"id": f"call{self._num_calls:05d}", "type": "function", "function": function})
        said: dict[str, Any] = {"role": "assistant", "content": message.content}
        said |= {} if message.reasoning is None else {"reasoning_content": message.reasoning}
        return {**said, "tool_calls": calls} if calls else said

    def _score(self, over: Over) -> float | None:
        if over.error:
            raise EngineError(f"the environment failed: {over.error}")
        if over.reward is None:
            return None
        score = (over.reward - self._low) / (self._high - self._low)
        if not 0.0 <= score <= 1.0:
            raise EngineError(
                f"the reward of an episode is {over.reward:g}, which is not between reward_low = {self._low:g} and "
                f"reward_high = {self._high:g}"
            )
        return score
