"""Environments of the package `verifiers` (0.4 and later), whose model the student is.

Such an environment has a loop of its own, which asks an endpoint of the OpenAI kind for every message. Here each episode has an
endpoint of its own on the loopback interface: a request is what the student reads next, the student's message is the reply, and
the end of the loop ends the episode with its reward.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice
from queue import Empty, Queue
from secrets import token_urlsafe
from threading import Thread
from types import ModuleType
from typing import Any

from understudy.config import load_json
from understudy.environments.base import Step
from understudy.errors import DataError, EngineError, RecipeError, nearest
from understudy.types import Message

HARNESS = "understudy_chat"
"""The program of an agent for which the recipe names none: it makes the student's tool calls until a message has none."""
_INSTALL = (
    "environments of verifiers need the package verifiers, 0.4 or later; run: pip install 'understudy[verifiers]'"
)
_MODEL = "student"
_CLOSE_S = 10.0

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
        "model": _MODEL,
        "choices": [{"index": 0, "message": dict(message), "finish_reason": _finish(message)}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }


def _streamed(message: Mapping[str, Any]) -> str:
    """The reply as the events of a stream, all at once."""
    calls = [{"index": index, **call} for index, call in enumerate(message.get("tool_calls", ()))]
    delta: dict[str, Any] = {**message, "tool_calls": calls} if calls else dict(message)
    frame = {"id": "understudy", "object": "chat.completion.chunk", "created": int(time.time()), "model": _MODEL}
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


@dataclass(frozen=True, kw_only=True)
class Hosted:
    """An environment of verifiers, as its own configuration has it."""

    taskset: str
    """The tasks: the name of an installed package, such as gsm8k-v1."""
    env: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Further keys of the environment's configuration, as in `[env]` of the package's files."""
    timeout_s: float = 120.0
    """Seconds for an answer of the environment."""


def check_package() -> None:
    """Raises RecipeError where the package is missing or too old."""
    try:
        found = version("verifiers")
    except PackageNotFoundError:
        raise RecipeError(_INSTALL) from None
    number = re.match(r"(\d+)\.(\d+)", found)
    if number is None or (int(number[1]), int(number[2])) < (0, 4) or find_spec("verifiers.v1") is None:
        raise RecipeError(f"{_INSTALL} (found {found})")


class World:
    """An environment with its tasks, opened once in a process: it runs in a thread of its own."""

    def __init__(self, hosted: Hosted) -> None:
        check_package()
        self._hosted = hosted
        self._seat = Seat()
        self._running: dict[Conversation, Any] = {}
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, daemon=True, name="understudy-verifiers").start()
        try:
            # this may start its shared tools
            self._call(self._open(), hosted.timeout_s)
        except Exception as error:
            self._stop()
            if isinstance(error, RecipeError):
                raise
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, TimeoutError):
                reason = f"it takes more than task.timeout_s = {hosted.timeout_s:g} s"
            raise RecipeError(f"the environment {hosted.taskset} cannot be opened: {reason}") from error
        self._tasks: list[Any] = []
        self._source = iter(self._env.taskset)
        # its tools are processes, which end with it
        atexit.register(self.close)

    async def _open(self) -> None:
        import verifiers.v1 as vf

        _provide_harness(vf)
        values = {**self._hosted.env, "taskset": {**self._hosted.env.get("taskset", {}), "id": self._hosted.taskset}}
        config = vf.resolve_env_config(values)
        seats = {name: seat for name, seat in config if isinstance(seat, vf.AgentConfig)}
        for name, seat in seats.items():
            given = self._hosted.env.get(name, {})
            # the package's own defaults are a program that runs what the student writes, on a machine of its maker
            runtime = seat.runtime if "runtime" in given else vf.SubprocessConfig()
            harness = seat.harness
            if harness is None and vf.default_harness_id(self._hosted.taskset) == "bash":
                harness = vf.harness_config_type(HARNESS)(id=HARNESS)
            setattr(config, name, seat.model_copy(update={"runtime": runtime, "harness": harness}))
        self._env = vf.load_environment(config)
        for name, seat in seats.items():
            seat = getattr(config, name)
            program = vf.load_harness(
                seat.harness or vf.harness_config_type(self._hosted.taskset)(id=self._hosted.taskset)
            )
            if program.EXECUTES_CODE and isinstance(seat.runtime, vf.SubprocessConfig):
                raise RecipeError(
                    f"task.env.{name}: the harness {program.config.id} runs what the student writes on this machine; give it "
                    f"a runtime, such as `runtime: {{type: docker}}`"
                )
        self._serving = self._env.serving()
        await self._serving.__aenter__()

    def num_tasks(self, at_most: int | None) -> int:
        """The number of tasks, as far as they are wanted. Raises DataError for an endless taskset without a limit."""
        if at_most is None and not self._env.taskset.bounded:
            raise DataError(f"the taskset {self._hosted.taskset} has no end; set task.episodes")
        self._tasks += islice(self._source, None if at_most is None else max(0, at_most - len(self._tasks)))
        return len(self._tasks)

    def begin(self, number: int) -> Conversation:
        """Starts an episode of a task."""
        self.num_tasks(number + 1)
        url, conversation = self._seat.take()
        playing = asyncio.run_coroutine_threadsafe(self._run(self._tasks[number], url, conversation), self._loop)
        self._running[conversation] = playing
        return conversation

    def opening(self, number: int) -> Asked:
        """Returns what the student reads first in an episode of a task. Raises EngineError where it ends before."""
        conversation = self.begin(number)
        try:
            first = conversation.next(self._hosted.timeout_s)
        finally:
            self.leave(conversation)
        if isinstance(first, Over):
            raise EngineError(
                f"an episode of {self._hosted.taskset} ended before it asked: {first.error or first.reward}"
            )
        return first

    def leave(self, conversation: Conversation) -> None:
        """Gives an episode up."""
        self._seat.leave(conversation)
        playing = self._running.pop(conversation, None)
        if playing is not None:
            playing.cancel()

    def close(self) -> None:
        """Ends all episodes and the environment."""
        atexit.unregister(self.close)
        for conversation in list(self._running):
            self.leave(conversation)
        with suppress(Exception):
            self._call(self._serving.__aexit__(None, None, None), _CLOSE_S)
        self._stop()

    def _stop(self) -> None:
        self._seat.close()
        # what was cancelled has a second to end
        self._loop.call_soon_threadsafe(self._loop.call_later, 1.0, self._loop.stop)

    def _call(self, work: Any, timeout_s: float) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        finally:
            future.cancel()

    async def _run(self, task: Any, url: str, conversation: Conversation) -> None:
        import verifiers.v1 as vf

        # the endpoint is on loopback and wants no key
        client = vf.EvalClientConfig(base_url=url, api_key_var="UNDERSTUDY_NO_KEY")
        try:
            episode = await self._env.run_episode(task, vf.ModelContext(model=_MODEL, client=client))
        except Exception as error:
            conversation.events.put(Over(error=f"{type(error).__name__}: {error}"))
            return
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        # agents without a model of their own
        played = [trace for trace in episode.traces if trace.agent.config.client.base_url == url]
        if not episode.ok:
            conversation.events.put(
                Over(error=f"{errors[0].type}: {errors[0].message}" if errors else "it gives no reason")
            )
        elif len(played) != 1:
            conversation.events.put(Over(error=f"the student plays {len(played)} of its agents; it can be one"))
        else:
            conversation.events.put(Over(float(played[0].reward)))


@lru_cache(maxsize=8)
def open_world(hosted: Hosted) -> World:
    """The environment of a section, opened once in a process. Raises RecipeError."""
    return World(hosted)


def _provide_harness(vf: Any) -> None:
    """Makes `HARNESS` known to the package, which finds programs by the name of their module."""
    if HARNESS in sys.modules:
        return

    class ChatHarness(vf.Harness[vf.HarnessConfig]):  # type: ignore[misc]
        """A loop of chat and tools in this process; it runs nothing of the student's."""

        APPENDS_SYSTEM_PROMPT = SUPPORTS_MCP = SUPPORTS_RESUME = SUPPORTS_TOOL_INTERCEPTION = True
        EXECUTES_CODE = NEEDS_CONTAINER = False

        async def launch(
            self,
            ctx: Any,
            trace: Any,
            runtime: Any,
            endpoint: str,
            secret: str,
            mcp_urls: Mapping[str, str],
            data: Any,
            tool_interception_url: str | None = None,
        ) -> Any:
            system, prompt = self.resolve_prompt(data)
            messages = [{"role": "system", "content": system}] if system else []
            if isinstance(prompt, str):
                messages.append({"role": "user", "content": prompt})
            else:
                messages += [message.model_dump(exclude_none=True) for message in prompt or ()]
            timeout = self.config.tool_timeout
            servers = {name: {"url": url, "timeout": timeout} for name, url in mcp_urls.items()}
            await _chat(endpoint, secret, messages, servers, tool_interception_url)
            return vf.ProgramResult(exit_code=0, stdout="", stderr="")

    module = ModuleType(HARNESS)
    ChatHarness.__module__ = HARNESS
    module.ChatHarness = ChatHarness  # type: ignore[attr-defined]
    module.__all__ = ["ChatHarness"]  # type: ignore[attr-defined]
    sys.modules[HARNESS] = module


async def _chat(endpoint: str, secret: str, messages: list[Any], servers: Mapping[str, Any], gate: str | None) -> None:
    """Asks for messages and makes their tool calls until one has none. `gate` may answer in a tool's place."""
    import httpx
    from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp

    headers = {"Authorization": f"Bearer {secret}"}
    # the student takes its time, and loopback is never behind a proxy of the environment
    client = httpx.AsyncClient(headers=headers, timeout=httpx.Timeout(None), trust_env=False)
    async with client, AsyncExitStack() as stack:
        tools, dispatch, connections = await connect_mcp({"mcpServers": servers}, stack)

        async def result(call: Mapping[str, Any]) -> Any:
            name = call["function"]["name"]
            try:
                arguments = json.loads(call["function"]["arguments"] or "{}")
            except ValueError as error:
                return f"Error: the arguments are no JSON ({error})"
            if not isinstance(arguments, dict):
                return "Error: the arguments are no JSON object"
            if gate:
                asked = await client.post(gate, json={"tool_call_id": call["id"], "name": name, "arguments": arguments})
                asked.raise_for_status()
                decision = asked.json()
                if decision["action"] == "stop":
                    raise RuntimeError(decision["reason"])
                if decision["action"] == "deny":
                    return decision["message"]["content"]
            if name not in dispatch:
                return f"Error: there is no tool {name!r}; {nearest(name, dispatch)}"
            return await call_mcp(connections, dispatch, name, arguments)

        while True:
            body = {"model": _MODEL, "messages": messages} | ({"tools": tools} if tools else {})
            reply = await client.post(f"{endpoint}/chat/completions", json=body)
            reply.raise_for_status()
            said = reply.json()["choices"][0]["message"]
            messages.append({key: value for key, value in said.items() if value is not None})
            for call in said.get("tool_calls") or ():
                found = {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"]}
                messages.append({**found, "content": await result(call)})
            if not said.get("tool_calls"):
                return
