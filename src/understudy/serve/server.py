"""A served teacher from its settings to its end."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from threading import Thread
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from understudy.errors import EngineError, RecipeError
from understudy.http import is_loopback, read_key
from understudy.models import DType, check_model_dir, load_causal_lm, load_tokenizer, probe_head
from understudy.serve.scorer import HiddenDType, Scorer
from understudy.serve.worker import Worker
from understudy.teachers.remote.protocol import About

if TYPE_CHECKING:
    import uvicorn

MAX_REQUEST_BYTES = 64 * 2**20
"""16 million ids."""
MAX_REPLY_BYTES = 2**30
"""128,000 hidden states of 4,096 numbers in bfloat16."""
START_S = 30.0
STOP_S = 10
"""Time that requests under way have when the server is told to stop."""
BACKLOG = 1_024
MAX_CONNECTIONS = 4_096
"""More connections are answered 503: each takes a file and some memory, whether it asks or not."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of `understudy serve-teacher`."""

    model: str
    """A directory or a hub name."""
    tokenizer: str | None = None
    """For a model that has none beside it."""
    revision: str | None = None
    host: str = "127.0.0.1"
    port: int = 8100
    """0: any that is free."""
    token_env: str = ""
    """The NAME of the environment variable with the token that clients must send."""
    dtype: DType = "auto"
    device: str = "auto"
    hidden_dtype: HiddenDType = "auto"
    """Precision in which hidden states are sent; "auto": the model's own."""
    max_batch_tokens: int | None = None
    """Slots of one forward."""
    max_request_bytes: int = MAX_REQUEST_BYTES
    max_reply_bytes: int = MAX_REPLY_BYTES
    share_prompts: bool = True
    """Read the prompt of several responses once."""

    def check(self) -> None:
        """Raises RecipeError for a number out of range, and for an address that others can reach without a token."""
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
        """Returns the token, "" if none is asked for. Raises RecipeError, without it, if its variable is not set or a header
        cannot carry it."""
        if not self.token_env:
            return ""
        token = read_key(self.token_env)
        if not token:
            raise RecipeError(f"--token-env {self.token_env}: that environment variable is not set, or empty")
        return token


def check_installed() -> None:
    """Raises RecipeError if the extra is missing."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            f"serving a teacher needs {error.name or 'more packages'}: pip install 'understudy[serve]'"
        ) from error


def load(settings: Settings) -> Scorer:
    """Raises RecipeError if the model cannot be loaded, or its head is of an unknown kind."""
    check_model_dir(settings.model)
    tokenizer = load_tokenizer(settings.tokenizer or settings.model, revision=settings.revision)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_causal_lm(settings.model, dtype=settings.dtype, device=device, revision=settings.revision)
    probe_head(model)
    return Scorer(
        model,
        tokenizer,
        name=settings.model,
        hidden_dtype=settings.hidden_dtype,
        max_batch_tokens=settings.max_batch_tokens,
        share_prompts=settings.share_prompts,
    )


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    about: About


def run(settings: Settings, note: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM. Raises RecipeError before anything is loaded if it cannot be served."""
    check_installed()
    settings.check()
    with closing(_bind(settings)) as listening:
        scorer = load(settings)
        with _serving(scorer, settings, listening, note) as (server, running):
            about, guard = running.about, "asks for a token" if settings.token_env else "asks for no token"
            note(f"{running.url} serves {about.model} ({about.dtype}, {guard}), fingerprint {about.fingerprint}")
            with _signals_end_quietly():
                server.run(sockets=[listening])
    note("stopped")


@contextmanager
def serve_beside(scorer: Scorer, settings: Settings) -> Iterator[Running]:
    """Serves in a thread of this process for as long as the block runs. Raises RecipeError as `run`."""
    check_installed()
    settings.check()
    with (
        closing(_bind(settings)) as listening,
        _serving(scorer, settings, listening, None) as (server, running),
    ):
        thread = Thread(target=server.run, kwargs={"sockets": [listening]}, name="understudy-serve", daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + START_S
            while not server.started:
                if time.monotonic() > deadline or not thread.is_alive():
                    raise EngineError(f"the server at {running.url} did not start within {START_S:.0f} s")
                time.sleep(0.005)
            yield running
        finally:
            server.should_exit = True
            thread.join(2 * STOP_S)


@contextmanager
def _serving(
    scorer: Scorer, settings: Settings, listening: socket.socket, note: Callable[[str], None] | None
) -> Iterator[tuple[uvicorn.Server, Running]]:
    """Worker and application behind a listening socket; the worker ends with the block."""
    import uvicorn

    from understudy.serve.app import Connection, build_app

    about = scorer.about(request_bytes=settings.max_request_bytes, reply_bytes=settings.max_reply_bytes)
    worker = Worker(scorer, reply_bytes=settings.max_reply_bytes, note=note)
    try:
        config = uvicorn.Config(
            build_app(scorer, worker, about, token=settings.token()),
            http=Connection,
            ws="none",
            limit_concurrency=MAX_CONNECTIONS,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=STOP_S,
        )
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        yield uvicorn.Server(config), Running(f"http://{shown}:{port}", about)
    finally:
        worker.close()


def _bind(settings: Settings) -> socket.socket:
    """Raises RecipeError for an address that is taken or not of this machine."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, address = found[0][0], found[0][4]
        return socket.create_server((address[0], address[1]), family=family, backlog=BACKLOG)
    except OSError as error:
        raise RecipeError(
            f"cannot listen at {settings.host} port {settings.port} ({error.strerror or error}); choose another --port "
            "(0: any that is free) or --host"
        ) from error


@contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """Swallows the signal that ended the server: uvicorn raises it once more when it has stopped."""

    def done(number: int, frame: FrameType | None) -> None:
        pass

    before: dict[int, Any] = {number: signal.signal(number, done) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
