"""vLLM's servers: started or found, and asked one by one or all together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from understudy.engines.sections import EngineSetup
from understudy.engines.vllm.launch import ServerProcess, free_ports
from understudy.engines.vllm.replies import read_scores
from understudy.engines.vllm.settings import VLLM, Launch, logprobs_modes, promises
from understudy.errors import EngineError, RecipeError
from understudy.http.client import HttpClient, RetryPolicy
from understudy.http.replies import BadReply, Refused, Reply
from understudy.lazy import torch

Result = TypeVar("Result")

SERVED_NAME = "student"
DEV_MODE = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
"""The first opens the routes that pause a server and replace its weights."""
DYING_S = 3.0
"""Time from a server's last reply to the end of its process."""
CONTROL_RETRIES = 3
"""Retries of requests that manage a server; a crowded server is no reason for them to fail."""


@dataclass(frozen=True)
class Facts:
    """Facts a server reports about itself; None: it does not say."""

    model: str
    max_length: int | None
    logprobs_mode: str | None


class _NoRouteError(EngineError):
    """The server does not know the path."""


def _success(reply: Reply) -> None:
    """`{"success": false}`: requests still hold blocks of the cache. Older servers reply with nothing."""
    if reply.content.strip() and reply.json().get("success") is False:
        raise BadReply("the prefix cache is still in use")


def _entry(values: Any, *names: str) -> Any:
    """An entry of nested mappings; None if it is not there."""
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values


@dataclass(eq=False)
class Servers:
    """Servers that are asked for samples through `client`, and managed through a client of its own.

    `start` comes before everything else. Every failure is an EngineError that names the server.
    """

    section: VLLM
    setup: EngineSetup
    policy: RetryPolicy
    """Limits of requests for samples."""
    dtype: torch.dtype
    """Precision of servers that are started here."""
    mode: str
    """Mode of log-probabilities of servers that are started here."""
    client: HttpClient = field(init=False)
    """Shares requests for samples out between the servers."""
    urls: tuple[str, ...] = field(default=(), init=False)
    """In the order of the servers' numbers."""
    facts: Facts = field(init=False)
    """Common to all servers; read by `start`, as `client` is opened."""
    started: bool = field(default=False, init=False)
    _processes: list[ServerProcess] = field(default_factory=list, init=False)
    _clients: list[HttpClient] = field(default_factory=list, init=False)
    """The last one manages the servers."""
    _unpausable: set[int] = field(default_factory=set, init=False)
    _paused: set[int] = field(default_factory=set, init=False)
    """Servers that were asked to pause, whether they answered or not."""

    def start(self, model_dir: Path | None) -> None:
        """Starts the servers with the weights in `model_dir`, or finds those of the user, and reads their facts.

        Raises RecipeError for servers that do not give the log-probabilities which the recipe's sampling needs.
        """
        try:
            launch = self.section.launch
            if launch is not None:
                assert model_dir is not None
                self._start_processes(launch, model_dir)
            urls = [process.url for process in self._processes] or list(self.section.urls)
            # a server of the run's own that has died does not come back, so nobody waits for it
            policy = replace(self.policy, waits=launch is None)
            self.client = self._open_client(urls, policy)
            self.urls = self.client.urls
            # a client of its own: a request to pause must not wait behind the samples that it is to interrupt
            control = replace(
                policy, max_retries=min(CONTROL_RETRIES, policy.max_retries), max_concurrency=max(8, len(urls))
            )
            # at the start a server that is not there has another address; later it may be restarting
            self._open_client(urls, replace(control, waits=False))
            facts = self.facts = self._read_facts()
            self._clients.pop().close()
            self._open_client(urls, control)
            if not promises(facts.logprobs_mode, self.setup.sampling):
                raise RecipeError(
                    f"the rollout engine {self.urls[0]} is in logprobs mode {facts.logprobs_mode}, and the recipe's sampling "
                    f"needs {logprobs_modes(self.setup.sampling)[0]}: start it with --logprobs-mode"
                )
            self.started = True
        except BaseException:
            self.close()
            raise

    def explain(self, within_s: float = DYING_S) -> None:
        """After a failure: raises EngineError with the end of its log for a server of the run's own that died of it."""
        for process in self._processes:
            process.check(within_s)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pauses every server, and lets all go on that were paused, also where another fails."""
        try:
            self.pause()
            yield
        except BaseException:
            # the first error says more than a server that cannot resume either
            with suppress(EngineError):
                self._switch(pauses=False)
            raise
        self._switch(pauses=False)

    def pause(self) -> None:
        """Interrupts all generation: replies come with the tokens so far and the finish "abort". Later requests wait.

        On a server without that route, requests run to their end.
        """
        self._switch(pauses=True)

    def _switch(self, *, pauses: bool) -> None:
        """Nothing is cancelled where one server fails, as another may still obey a request that is given up."""
        errors: list[EngineError] = []

        def ask(server: int) -> None:
            try:
                if pauses and server not in self._unpausable:
                    self._paused.add(server)
                    self._ask(server, "/pause?mode=abort")
                elif not pauses and server in self._paused:
                    self._ask(server, "/resume")
                    self._paused.discard(server)
            except EngineError as error:
                if pauses and isinstance(error, _NoRouteError):
                    self._paused.discard(server)
                    self._unpausable.add(server)
                else:
                    errors.append(error)

        self._all(ask)
        if errors:
            raise errors[0]

    def reload(self, directory: Path) -> None:
        """Every server reads its weights from a directory."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
        self.everywhere("/collective_rpc", bodies=[body] * len(self.urls))

    def forget(self) -> None:
        """Every server drops its prefix cache: it would answer from keys and values of the old weights, without a word."""
        self.everywhere("/reset_prefix_cache", _success)

    def sleep(self) -> None:
        """Every server gives up the memory of weights and cache."""
        self.everywhere("/sleep?level=2")

    def wake(self, part: str) -> None:
        """Every server that sleeps has memory for its `weights`, or for the `kv_cache`, again."""

        def ask(server: int) -> None:
            # one that was started again meanwhile does not sleep
            if self._ask(server, "/is_sleeping", Reply.json, method="GET").get("is_sleeping"):
                self._ask(server, f"/wake_up?tags={part}")

        self._all(ask)

    def world_sizes(self) -> list[int]:
        """GPUs of each server."""

        def read(reply: Reply) -> int:
            size = reply.json().get("world_size")
            if not isinstance(size, int) or size < 1:
                raise BadReply(f"the world size {size!r}")
            return size

        return self.everywhere("/get_world_size", read, method="GET")

    def everywhere(
        self,
        path: str,
        read: Callable[[Reply], Any] = lambda _: None,
        *,
        bodies: Sequence[dict[str, Any]] | None = None,
        method: str = "POST",
    ) -> list[Any]:
        """Asks all servers at the same time, each with its own body. The first error cancels the rest."""
        return self._all(lambda server: self._ask(server, path, read, bodies and bodies[server], method))

    def score(self, sequences: Sequence[list[int]]) -> dict[str, list[list[float]]]:
        """By server, for each sequence the log-probabilities of all tokens but the first, at temperature 1."""
        body = {"model": self.facts.model, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "n": 1}

        def ask(server: int) -> list[list[float]]:
            return [
                self._ask(server, "/v1/completions", partial(read_scores, ids=ids), body | {"prompt": ids})
                for ids in sequences
            ]

        return dict(zip(self.urls, self._all(ask), strict=True))

    def close(self) -> None:
        """Cancels requests in flight, and stops the run's own servers."""
        # last in, first out: the clients close, then all processes are told, and only then is each waited for
        with ExitStack() as stack:
            stack.callback(self._processes.clear)
            for end in (ServerProcess.stop, ServerProcess.ask_to_stop):
                for process in self._processes:
                    stack.callback(end, process)
            for client in self._clients:
                stack.callback(client.close)

    def _open_client(self, urls: Sequence[str], policy: RetryPolicy) -> HttpClient:
        key = self.section.api_key_env
        client = HttpClient(urls, name="rollout engine", retry_policy=policy, api_key_env=key, seed=self.setup.seed)
        self._clients.append(client)
        return client

    def _start_processes(self, launch: Launch, model_dir: Path) -> None:
        given = range(launch.port, launch.port + launch.num_servers)
        dtype = str(self.dtype).removeprefix("torch.")
        for number, port in enumerate(given if launch.port else free_ports(launch.num_servers)):
            names = {"model": str(model_dir), "host": "127.0.0.1", "port": str(port), "server": str(number)}
            process = ServerProcess(
                server_command(self.section, names, dtype=dtype, mode=self.mode),
                name=f"rollout engine {number}",
                port=port,
                log=self.setup.run_dir / f"engine_{number}.log",
                env=DEV_MODE | launch.filled(number),
                ready_timeout_s=launch.ready_timeout_s,
            )
            self._processes.append(process)
            process.start()
        # all load at the same time
        for process in self._processes:
            process.wait_ready()

    def _read_facts(self) -> Facts:
        """Asks all servers. Raises RecipeError if they differ, lack the model, or would die of a seeded request."""

        def ask(server: int) -> Facts:
            cards = self._ask(server, "/v1/models", Reply.json, method="GET").get("data") or []
            models = {card.get("id"): card for card in cards}
            model = self.section.model or next(iter(models), None)
            if model not in models:
                listed = ", ".join(map(repr, models)) or "none"
                raise RecipeError(f"{self.urls[server]} has no model {model!r}; it has {listed}")
            try:
                info = self._ask(server, "/server_info?config_format=json", Reply.json, method="GET")
            except _NoRouteError:
                info = None
            config = _entry(info, "vllm_config")
            on_cpu = _entry(config, "device_config", "device_type") == "cpu"
            if on_cpu and _entry(config, "scheduler_config", "enable_chunked_prefill") is True:
                # its worker rewinds the generator of a seeded request after each chunk, which a CPU's cannot
                raise RecipeError(
                    f"{self.urls[server]}: vLLM on a CPU dies of a request with a seed whose prompt it reads in chunks; "
                    "start it with --no-enable-chunked-prefill (rollout.launch.args)"
                )
            mode = _entry(config, "model_config", "logprobs_mode")
            max_length = models[model].get("max_model_len")
            return Facts(str(model), max_length, mode if isinstance(mode, str) else None)

        found = self._all(ask)
        first = found[0]
        for url, facts in zip(self.urls, found, strict=True):
            if (facts.model, facts.logprobs_mode) != (first.model, first.logprobs_mode):
                raise RecipeError(
                    f"{url} serves {facts.model!r} with logprobs mode {facts.logprobs_mode}, {self.urls[0]} serves "
                    f"{first.model!r} with {first.logprobs_mode}; start all rollout engines alike"
                )
        lengths = [facts.max_length for facts in found if facts.max_length is not None]
        return replace(first, max_length=min(lengths, default=None))

    def _all(self, ask: Callable[[int], Result]) -> list[Result]:
        """`ask` for every server at the same time; the first error cancels the rest."""
        if not self._clients:
            raise EngineError("the rollout engine has no weights yet")
        return self._clients[-1].each(range(len(self.urls)), ask)

    def _ask(
        self,
        server: int,
        path: str,
        read: Callable[[Reply], Any] = lambda _: None,
        body: Any = None,
        method: str = "POST",
    ) -> Any:
        name = path.partition("?")[0]
        key = f"{method} {name}" + (f" ({body['method']})" if name == "/collective_rpc" else "")
        try:
            return self._clients[-1].request(path, read, key=key, json=body, method=method, replica=server)
        except Refused as refused:
            kind = _NoRouteError if refused.status in (404, 405) else EngineError
            hint = "; start it with VLLM_SERVER_DEV_MODE=1" if kind is _NoRouteError else ""
            raise kind(f"rollout engine {self.urls[server]}: {key} was refused: {refused}{hint}") from refused


def server_command(section: VLLM, names: Mapping[str, str], *, dtype: str, mode: str) -> list[str]:
    """The command that starts a server of `section.launch`; `names`: its model, host, port and number."""
    launch = section.launch
    assert launch is not None
    if launch.command is not None:
        words = [str(Path(launch.command[0]).expanduser()), *launch.command[1:]]
        for name, value in names.items():
            words = [word.replace(f"{{{name}}}", value) for word in words]
        return words
    options = {
        "model": names["model"],
        "served-model-name": SERVED_NAME,
        "host": names["host"],
        "port": names["port"],
        "dtype": dtype,
        "logprobs-mode": mode,
        # else the model's own temperature, penalties and so on would join those of the recipe
        "generation-config": "vllm",
    }
    flags = ["--enable-sleep-mode"] if section.sleep else []
    if section.weights == "nccl":
        options["weight-transfer-config"] = '{"backend": "nccl"}'
    return [
        str(Path(launch.python).expanduser()),
        "-m",
        "vllm.entrypoints.openai.api_server",
        # ids go in and out, so no text is ever made
        "--skip-tokenizer-init",
        # else a line for each request, in a log that nobody cuts
        "--disable-uvicorn-access-log",
        *flags,
        *(word for name, value in options.items() for word in (f"--{name}", value)),
        *launch.args,
    ]
