"""The section `rollout` of type `vllm`: its keys, and the modes of vLLM's log-probabilities."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from understudy.engines.base import Weights
from understudy.engines.sections import EngineSection, EngineSetup, ServerCommand
from understudy.errors import RecipeError, check_range
from understudy.http.client import RetryPolicy
from understudy.http.replies import check_address, check_key, check_variable, fill, is_loopback
from understudy.lazy import nn
from understudy.models.lora import merged_state_dict
from understudy.models.parallel import shards_of, stream
from understudy.text import is_secret_name, plain_tree, without_secrets
from understudy.types import Sampling

if TYPE_CHECKING:
    from understudy.engines.vllm.engine import VLLMEngine

PROCESSED, RAW = "processed_logprobs", "raw_logprobs"
"""Modes of vLLM: of the distribution that tokens are drawn from, and of the model's own at temperature 1."""
LOWEST_TEMPERATURE = 0.01
"""vLLM draws at this temperature whatever is below."""
PATIENCE_S = 900.0
"""Seconds for a response of any length, which may wait behind others."""
SLOWEST = 10.0
"""Tokens a second of one response in a large batch, beneath which something is wrong: 36 are usual."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The section `rollout.launch`: servers that are started with the run and stopped with it."""

    python: str = "python"
    """An interpreter that has vLLM, which as a rule is in an environment of its own."""
    command: tuple[str, ...] | None = None
    """The whole command in its place, `{model}`, `{host}`, `{port}` and `{server}`, the number from 0, filled in."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Beside the environment of the run, such as `CUDA_VISIBLE_DEVICES: "{server}"`; the server's number is filled in. A secret
    is named, never written: `{env:NAME}` is the value of a variable, `{file:PATH}` the content of a file."""
    args: tuple[str, ...] = ()
    """Further arguments of vLLM, such as `[--max-model-len, "4096"]`."""
    port: int = 0
    """0: a free one. Several servers take this one and those that follow."""
    num_servers: int = 1
    """Servers to start, each with the whole model."""
    ready_timeout_s: float = 900.0
    """Loading, compiling and capturing graphs takes minutes for a large model."""

    def __post_init__(self) -> None:
        check_range(self, 1, "num_servers", off="with url in place of launch the run starts none")
        if self.command is not None and not any("{port}" in word for word in self.command):
            raise ValueError("command does not say {port}, so nobody knows where its server listens")
        for name, value in self.env.items():
            if is_secret_name(name) and value and without_secrets(f"{name}={value}") != f"{name}={value}":
                raise ValueError(
                    f"env.{name} holds a secret, which a recipe must not; write {{env:NAME}} with the name of a variable, or "
                    "{file:PATH}. Servers also inherit the variables of the run"
                )
        for key, words in (("args", self.args), ("command", self.command or ())):
            if plain_tree(words) != list(words):
                raise ValueError(
                    f"{key} holds a key, which everybody on the machine sees on a command line; set it in the environment, "
                    "which servers inherit (vLLM reads VLLM_API_KEY), or in env as {env:NAME} or {file:PATH}"
                )
        if not 0 <= self.port <= 65_535 - self.num_servers:
            raise ValueError(f"port is {self.port}; it must lie in [0, {65_535 - self.num_servers}]")

    def filled(self, number: int) -> dict[str, str]:
        """Returns the variables of the server with that number. Raises RecipeError for one that is named and not set."""
        place = "rollout.launch.env"
        return {
            name: fill(value.replace("{server}", str(number)), f"{place}.{name}") for name, value in self.env.items()
        }


@dataclass(frozen=True, kw_only=True)
class VLLM(EngineSection):
    """vLLM servers, version 0.20 or later, with `VLLM_SERVER_DEV_MODE=1`, which opens the routes that replace weights."""

    url: str | tuple[str, ...] | None = None
    """URL of a server that you start; requests are shared out over several."""
    launch: Launch | None = None
    """In place of `url`: servers of the run's own."""
    model: str | None = None
    """Its name at the server; None: the first that the server lists."""
    weights: Literal["auto", "shm", "directory", "nccl"] = "auto"
    """How they travel: through /dev/shm (`auto` where it has room and the server is on this machine), a directory that both
    sides see, or from GPU to GPU."""
    weights_dir: str | None = None
    """None: `weights` in the run directory."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the engine; auto: that of the student's weights."""
    sleep: bool = False
    """Whether servers give up weights and cache while the student is trained, for servers on the GPUs of the trainer."""
    check_tolerance: float | None = None
    """Nats that the engine's log-probabilities may differ from the trainer's, on average, after a push; None: by precision."""
    probe_tokens: int = 1024
    """The most that are compared after a push."""
    grouped: bool = False
    """Whether samples of one prompt are one request with `n`. Their draws then depend on which samples are written together."""
    api_key_env: str = ""
    """The environment variable that holds the key, where the server wants one."""
    timeout_s: float | None = None
    """Seconds for one whole response; None: 900, or one for every 10 tokens of `max_new_tokens` where that is more."""
    deadline_s: float | None = None
    """Seconds for one request with all its attempts; None: four times `timeout_s`."""
    max_retries: int = 5
    """Further attempts of a request that failed in a way that may pass."""
    max_concurrency: int = 256
    """Requests in flight over all servers; they batch what they get."""

    def __post_init__(self) -> None:
        check_variable(self.api_key_env, "api_key_env")
        if (self.url is None) == (self.launch is None):
            raise ValueError("give either url (servers that you start) or launch (servers of the run's own)")
        if self.launch is None and not self.urls:
            raise ValueError("url is an empty list; give at least one")
        for url in self.urls:
            check_address(url, "rollout.url")
        if self.weights == "shm" and not self.is_local:
            raise ValueError(
                f"weights is shm, but {', '.join(self.urls)} need not be on this machine: use weights: directory with a "
                "weights_dir that both sides see"
            )
        if self.weights_dir is not None and self.weights not in ("auto", "directory"):
            raise ValueError(f"weights_dir is given, but weights is {self.weights}; keep one")
        if self.sleep and self.weights == "nccl":
            raise ValueError(
                "weights is nccl, which joins no two processes on one GPU, and sleep is for servers there; use auto"
            )
        check_range(
            self, 1, "probe_tokens", off="1 compares the least, and a large check_tolerance accepts any difference"
        )
        check_range(
            self, 0, "check_tolerance", above=True, off="null goes by precision, a large number accepts any difference"
        )
        # checks the limits
        self.retry_policy()

    @property
    def urls(self) -> tuple[str, ...]:
        """URLs of the servers that the user starts, without a path."""
        given = () if self.url is None else (self.url,) if isinstance(self.url, str) else self.url
        return tuple(url.rstrip("/").removesuffix("/v1") for url in given)

    @property
    def is_local(self) -> bool:
        """Whether every server surely sees this machine's memory."""
        return all(is_loopback(urlsplit(url).hostname or "") for url in self.urls)

    def retry_policy(self, max_new_tokens: int = 0) -> RetryPolicy:
        """Limits of requests for responses of this length. Raises ValueError for a limit out of range."""
        timeout_s = max(PATIENCE_S, max_new_tokens / SLOWEST) if self.timeout_s is None else self.timeout_s
        return RetryPolicy(
            timeout_s=timeout_s,
            deadline_s=4 * timeout_s if self.deadline_s is None else self.deadline_s,
            max_retries=self.max_retries,
            max_concurrency=self.max_concurrency,
        )

    def open(self, setup: EngineSetup) -> VLLMEngine:
        from understudy.engines.vllm.engine import VLLMEngine

        return VLLMEngine(self, setup)

    def pushed(self, model: nn.Module) -> Callable[[], Weights]:
        return lambda: merged_state_dict(model).items() if shards_of(model) is None else stream(model)

    @property
    def launches(self) -> bool:
        return self.launch is not None

    def elsewhere(self, model: str, dtype: str, sampling: Sampling) -> list[ServerCommand]:
        from understudy.engines.vllm.servers import DEV_MODE, server_command

        if (launch := self.launch) is None:
            return []
        own = dtype if self.dtype == "auto" else self.dtype
        found = []
        for number in range(launch.num_servers):
            names = {"model": model, "host": "{host}", "port": "{port}", "server": str(number)}
            found.append(
                ServerCommand(
                    command=server_command(self, names, dtype=own, mode=logprobs_modes(sampling)[0]),
                    env=DEV_MODE | launch.filled(number),
                    port=launch.port + number if launch.port else 0,
                    ready_timeout_s=launch.ready_timeout_s,
                )
            )
        return found

    def check_sampling(self, sampling: Sampling) -> None:
        """Raises RecipeError for a temperature that vLLM replaces, and filters that falsify its log-probabilities."""
        check_temperature(sampling)
        if not logprobs_modes(sampling):
            raise RecipeError(
                f"sampling.temperature is {sampling.temperature:g} with top_p, top_k or min_p: vLLM gives log-probabilities of "
                "the untempered or of the filtered distribution, never of the unfiltered distribution at this temperature, "
                "which training needs. Drop the filter, use temperature 1, or use rollout.type: hf"
            )

    def check(self) -> str:
        """A line for the dry run. Raises RecipeError for a key, a variable or a program that is not there."""
        check_key(self.api_key_env)
        if self.launch is None:
            return f"rollout: vLLM at {', '.join(self.urls)}"
        _ = self.launch.filled(0)
        program = self.launch.command[0] if self.launch.command else self.launch.python
        if shutil.which(Path(program).expanduser()) is None:
            raise RecipeError(
                f"rollout.launch: there is no program {program!r}; python is the interpreter of the environment that vLLM is in"
            )
        look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
        words = [str(Path(program).expanduser()), "-c", look]
        if self.launch.command is None and subprocess.run(words, check=False).returncode:  # noqa: S603 (as the recipe says)
            raise RecipeError(
                f"rollout.launch: {program} has no package vllm; let rollout.launch.python be the interpreter of an "
                "environment that has it"
            )
        return f"rollout: {self.launch.num_servers} vLLM server(s) of its own"


def check_temperature(sampling: Sampling) -> None:
    """Raises RecipeError for a temperature that vLLM replaces by another."""
    if 0 < sampling.temperature < LOWEST_TEMPERATURE:
        raise RecipeError(
            f"sampling.temperature is {sampling.temperature:g}; vLLM draws at {LOWEST_TEMPERATURE:g} whatever is below, so use "
            f"0 (greedy) or at least {LOWEST_TEMPERATURE:g}"
        )


def logprobs_modes(sampling: Sampling) -> tuple[str, ...]:
    """The modes in which vLLM gives the log-probabilities that `Sample.rollout_logprob` promises; none where none does."""
    plain = sampling.temperature in (0.0, 1.0)
    if sampling.filtered:
        return (RAW,) if plain else ()
    return (RAW, PROCESSED) if plain else (PROCESSED,)


def promises(mode: str | None, sampling: Sampling) -> bool:
    """Whether a server in this mode (None: unknown, and trusted) gives what `Sample.rollout_logprob` promises."""
    modes = logprobs_modes(sampling)
    return bool(modes) and mode in (*modes, None)
