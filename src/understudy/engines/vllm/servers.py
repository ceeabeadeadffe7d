"""vLLM's servers: started or found, and what must happen to all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

from understudy.engines.sections import VLLM, Launch
from understudy.engines.vllm.launch import ServerProcess, free_ports
from understudy.engines.vllm.replies import read_scores
from understudy.errors import EngineError, RecipeError
from understudy.http import BadReply, HttpClient, Refused, Reply, RetryPolicy

Result = TypeVar("Result")

SERVED_NAME = "student"
DEV_MODE = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
"""The first opens the routes that pause a server and replace its weights."""
DYING_S = 3.0
"""Between a server's last reply and the end of its process."""
CONTROL_RETRIES = 3
"""Of what is said to one server; its failures are not those of a crowded one."""


@dataclass(frozen=True)
class Facts:
    """What a server says about itself; None: it does not say."""

    model: str
    max_length: int | None
    logprobs_mode: str | None
    cuts_prompts_on_cpu: bool = False
    """Whether it computes on a CPU and reads long prompts in chunks."""


class Servers:
    """Servers that are asked for samples through `client`, and told about weights one by one.

    `start` comes before everything else. Raises EngineError, naming the server, for what fails.
    """

    def __init__(self, section: VLLM, run_dir: Path, *, dtype: str, mode: str, seed: int) -> None:
        """`dtype` and `mode` (of log-probabilities): for servers that are started here."""
        self._section = section
        self._run_dir = run_dir
        self._dtype = dtype
        self._mode = mode
        self._seed = seed
        self._processes: list[ServerProcess] = []
        self._unpausable: set[int] = set()
        self._paused: set[int] = set()
        """Servers that were asked to, whether they answered or not."""
        self.client: HttpClient | None = None
        self._control: HttpClient | None = None
        self.facts: Facts | None = None

    @property
    def urls(self) -> tuple[str, ...]:
        """Of the servers, in the order of their numbers."""
        return () if self._control is None else self._control.urls

    @property
    def launches(self) -> bool:
        """Whether the servers are ours, so that their first weights are those that they are started with."""
        return self._section.launch is not None

    def start(self, model_dir: Path | None) -> None:
        """Starts the servers with the weights in `model_dir`, or finds those of the user. Ends with all of them known."""
        try:
            self._start(model_dir)
        except BaseException:
            self.close()
            self._processes = []
            raise

    def _start(self, model_dir: Path | None) -> None:
        if self._section.launch is not None:
            assert model_dir is not None
            self._start_processes(self._section.launch, model_dir)
        urls = [process.url for process in self._processes] or list(self._section.urls)
        # nobody starts a server of ours again
        retry_policy = replace(self._section.retry_policy, waits=self._section.launch is None)
        # what is said to a server must not wait behind the samples that it is to end
        control = replace(
            retry_policy,
            max_retries=min(CONTROL_RETRIES, retry_policy.max_retries),
            max_concurrency=max(8, len(urls)),
        )
        self.client = self._open_client(urls, retry_policy)
        # one that is not there at the start has another address; later it may be starting again
        self._control = self._open_client(urls, replace(control, waits=False))
        facts = self._agree(self._each(self._read_facts))
        if control.waits:
            self._control.close()
            self._control = self._open_client(urls, control)
        self.facts = facts

    def _open_client(self, urls: Sequence[str], retry_policy: RetryPolicy) -> HttpClient:
        key = self._section.api_key_env
        return HttpClient(urls, name="rollout engine", retry_policy=retry_policy, api_key_env=key, seed=self._seed)

    def check(self) -> None:
        """Raises EngineError, with the end of its log, for a server of ours that does not run any more."""
        for process in self._processes:
            process.check()

    def explain(self) -> None:
        """After a failure: raises EngineError for a server that died of it, perhaps a moment ago."""
        for process in self._processes:
            process.check(DYING_S)

    def health(self) -> str:
        """Which of them answer: all, else it raises."""
        self.check()
        return "vLLM at " + ", ".join(self._each(lambda server: self._get(server, "/health", lambda reply: reply.url)))

    def pause(self) -> None:
        """Ends what every server is writing: the replies come with what is there, and "abort". What comes later waits.

        Where a server cannot (no route), its requests run to their end.
        """

        def ask(server: int) -> None:
            if server in self._unpausable:
                return
            self._paused.add(server)
            try:
                self._post(server, f"/pause?{urlencode({'mode': 'abort'})}", _nothing)
            except _NoRouteError:
                self._paused.discard(server)
                self._unpausable.add(server)

        self._each_to_the_end(ask)

    def reload(self, directory: Path) -> None:
        """Every server reads its weights from a directory."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
        self.post_all("/collective_rpc", body)

    def post_all(self, path: str, body: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """To every server, side by side: the same, or to each its own."""
        bodies = [body] * len(self.urls) if isinstance(body, dict) else body
        self._each(lambda server: self._post(server, path, _nothing, bodies[server]))

    def world_sizes(self) -> list[int]:
        """GPUs of each server."""
        return self._each(lambda server: self._get(server, "/get_world_size", _world_size))

    def forget(self) -> None:
        """Every server drops what it computed with the old weights; a prefix that it kept would be read without a word."""
        self._each(lambda server: self._post(server, "/reset_prefix_cache", _success))

    def resume(self) -> None:
        """Every server that was paused goes on, also where another fails."""

        def ask(server: int) -> None:
            if server in self._paused:
                self._post(server, "/resume", _nothing)
                self._paused.discard(server)

        self._each_to_the_end(ask)

    def score(self, sequences: Sequence[list[int]]) -> dict[str, list[list[float]]]:
        """By server: of each sequence the log-probabilities of all tokens but the first, at temperature 1."""
        assert self.facts is not None
        body = {"model": self.facts.model, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "n": 1}

        def ask(server: int) -> list[list[float]]:
            return [
                self._post(
                    server,
                    "/v1/completions",
                    lambda reply, ids=ids: read_scores(reply, ids),  # type: ignore[misc]
                    body | {"prompt": ids},
                )
                for ids in sequences
            ]

        return dict(zip(self.urls, self._each(ask), strict=True))

    def close(self) -> None:
        """Gives up what is in flight, and stops the servers that are ours."""
        with ExitStack() as stack:
            for process in self._processes:
                stack.callback(process.stop)
            # all are told before any is waited for
            for process in self._processes:
                stack.callback(process.ask_to_stop)
            for client in (self._control, self.client):
                if client is not None:
                    stack.callback(client.close)

    def _start_processes(self, launch: Launch, model_dir: Path) -> None:
        given = range(launch.port, launch.port + launch.num_servers)
        for number, port in enumerate(given if launch.port else free_ports(launch.num_servers)):
            process = ServerProcess(
                self._command(launch, model_dir, port, number),
                name=f"rollout engine {number}",
                port=port,
                log=self._run_dir / f"engine_{number}.log",
                env=DEV_MODE | {name: value.replace("{server}", str(number)) for name, value in launch.env.items()},
                ready_timeout_s=launch.ready_timeout_s,
            )
            self._processes.append(process)
            process.start()
        for process in self._processes:
            process.wait_ready()

    def _command(self, launch: Launch, model_dir: Path, port: int, number: int) -> list[str]:
        if launch.command is not None:
            known = {"{model}": str(model_dir), "{port}": str(port), "{server}": str(number)}
            words = [str(Path(launch.command[0]).expanduser()), *launch.command[1:]]
            for name, value in known.items():
                words = [word.replace(name, value) for word in words]
            return words
        options = {
            "model": str(model_dir),
            "served-model-name": SERVED_NAME,
            "host": "127.0.0.1",
            "port": str(port),
            "dtype": self._dtype,
            "logprobs-mode": self._mode,
            # else the model's own temperature, penalties and so on would join those of the recipe
            "generation-config": "vllm",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        # ids go in and out, so no text is ever made
        start = [
            str(Path(launch.python).expanduser()),
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--skip-tokenizer-init",
            # else a line for each request, in a log that nobody cuts
            "--disable-uvicorn-access-log",
        ]
        if self._section.weights == "nccl":
            start += ["--weight-transfer-config", '{"backend": "nccl"}']
        return [*start, *words, *launch.args]

    def _read_facts(self, server: int) -> Facts:
        def read(reply: Reply) -> Facts:
            cards = reply.json().get("data") or []
            names = [card.get("id") for card in cards]
            wanted = self._section.model or (names[0] if names else None)
            if wanted not in names:
                raise RecipeError(
                    f"{reply.url} has no model {wanted!r}; it has {', '.join(map(repr, names)) or 'none'}"
                )
            return Facts(str(wanted), cards[names.index(wanted)].get("max_model_len"), None)

        found = self._get(server, "/v1/models", read)
        try:
            config = self._get(server, "/server_info?config_format=json", _config)
        except _NoRouteError:
            return found
        mode = _inside(config, "model_config", "logprobs_mode")
        on_cpu = _inside(config, "device_config", "device_type") == "cpu"
        chunks = _inside(config, "scheduler_config", "enable_chunked_prefill") is True
        return Facts(found.model, found.max_length, mode if isinstance(mode, str) else None, on_cpu and chunks)

    def _agree(self, found: Sequence[Facts]) -> Facts:
        """What holds for all servers."""
        for url, facts in zip(self.urls, found, strict=True):
            if (facts.model, facts.logprobs_mode) != (found[0].model, found[0].logprobs_mode):
                raise RecipeError(
                    f"{url} serves {facts.model!r} with logprobs mode {facts.logprobs_mode}, {self.urls[0]} serves "
                    f"{found[0].model!r} with {found[0].logprobs_mode}; start all rollout engines alike"
                )
            if facts.cuts_prompts_on_cpu:
                # its worker rewinds the generator of a seeded request after each chunk, which a CPU's cannot
                raise RecipeError(
                    f"{url}: vLLM on a CPU dies of a request with a seed whose prompt it reads in chunks; start it with "
                    "--no-enable-chunked-prefill (rollout.launch.args)"
                )
        lengths = [facts.max_length for facts in found if facts.max_length is not None]
        return Facts(found[0].model, min(lengths, default=None), found[0].logprobs_mode)

    def _each(self, ask: Callable[[int], Result]) -> list[Result]:
        assert self._control is not None
        return self._control.each(range(len(self.urls)), ask)

    def _each_to_the_end(self, ask: Callable[[int], None]) -> None:
        """The first error is raised when all were asked: a request that is given up may still be obeyed."""

        def attempt(server: int) -> EngineError | None:
            try:
                ask(server)
            except EngineError as error:
                return error
            return None

        errors = [error for error in self._each(attempt) if error is not None]
        if errors:
            raise errors[0]

    def _get(self, server: int, path: str, read: Callable[[Reply], Result]) -> Result:
        return self._ask(server, path, read, None, "GET")

    def _post(self, server: int, path: str, read: Callable[[Reply], Result], body: Any = None) -> Result:
        return self._ask(server, path, read, body, "POST")

    def _ask(self, server: int, path: str, read: Callable[[Reply], Result], body: Any, method: str) -> Result:
        assert self._control is not None
        name = path.partition("?")[0]
        key = f"{method} {name}" + (f" ({body['method']})" if name == "/collective_rpc" else "")
        try:
            return self._control.request(path, read, key=key, json=body, method=method, replica=server)
        except Refused as refused:
            kind = _NoRouteError if refused.status in (404, 405) else EngineError
            hint = "; start it with VLLM_SERVER_DEV_MODE=1" if kind is _NoRouteError else ""
            raise kind(f"rollout engine {self.urls[server]}: {key} was refused: {refused}{hint}") from refused


class _NoRouteError(EngineError):
    """The server does not know the path."""


def _nothing(reply: Reply) -> None:
    """The status says it all."""


def _success(reply: Reply) -> None:
    """`{"success": false}`: something still holds blocks. Before that existed the reply was empty."""
    if reply.content.strip() and reply.json().get("success") is False:
        raise BadReply("the prefix cache is still in use")


def _world_size(reply: Reply) -> int:
    size = reply.json().get("world_size")
    if not isinstance(size, int) or size < 1:
        raise BadReply(f"the world size {size!r}")
    return size


def _config(reply: Reply) -> Any:
    values = reply.json()
    return values.get("vllm_config") if isinstance(values, dict) else None


def _inside(values: Any, *names: str) -> Any:
    """None where there is no such entry."""
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values
