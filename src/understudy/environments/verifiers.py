"""Environments of the package `verifiers` (0.4 and later), whose model the student is.

Such an environment has a loop of its own, which asks an endpoint (`environments.endpoint`) for every message; the end of the
loop ends the episode with its reward.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import re
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice
from threading import Thread
from types import ModuleType
from typing import Any

from understudy.environments.endpoint import MODEL, Asked, Conversation, Over, Seat
from understudy.errors import DataError, EngineError, RecipeError, nearest

HARNESS = "understudy_chat"
"""The program of an agent for which the recipe names none: it makes the student's tool calls until a message has none."""
_INSTALL = (
    "environments of verifiers need the package verifiers, 0.4 or later; run: pip install 'understudy[verifiers]'"
)
_CLOSE_S = 10.0


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
            episode = await self._env.run_episode(task, vf.ModelContext(model=MODEL, client=client))
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
            body = {"model": MODEL, "messages": messages} | ({"tools": tools} if tools else {})
            reply = await client.post(f"{endpoint}/chat/completions", json=body)
            reply.raise_for_status()
            said = reply.json()["choices"][0]["message"]
            messages.append({key: value for key, value in said.items() if value is not None})
            for call in said.get("tool_calls") or ():
                found = {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"]}
                messages.append({**found, "content": await result(call)})
            if not said.get("tool_calls"):
                return
