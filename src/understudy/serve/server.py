"""A served teacher from its settings to its end."""

from __future__ import annotations

import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from understudy.errors import RecipeError
from understudy.http.replies import is_loopback, read_key
from understudy.lazy import torch
from understudy.models import DType, check_model_dir, load_causal_lm, load_tokenizer, probe_head
from understudy.serve.scorer import HiddenDType, Scorer
from understudy.serve.worker import Worker
from understudy.teachers.remote.protocol import About

if TYPE_CHECKING:
    import uvicorn

STOP_S = 10
"""Time that requests under way have when the server is told to stop."""
MAX_CONNECTIONS = 4_096
"""Each takes a file and some memory, whether it asks or not."""
ACCEPTED_AT_ONCE = 128
SPARE_FILES = 128
"""Files that are no connections, and room for connections that are being closed."""


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
    max_request_bytes: int = 64 * 2**20
    """16 million ids."""
    max_reply_bytes: int = 2**30
    """128,000 hidden states of 4,096 numbers in bfloat16."""
    share_prompts: bool = True
    """Compute once what several samples begin with."""

    def check(self) -> None:
        """Raises RecipeError for a number out of range, and for an address that others can reach without a token."""
        if not 0 <= self.port <= 65_535:
            raise RecipeError(f"--port is {self.port}; it must lie in [0, 65535], 0 for any that is free")
        for name in ("max_batch_tokens", "max_request_bytes", "max_reply_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(
                    f"--{name.replace('_', '-')} is {value}; it must be at least 1; leave it out for the default"
                )
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


def run(settings: Settings, note: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM.

    Raises RecipeError before anything is loaded if it cannot be served, then if the model cannot be loaded, or its head is
    of an unknown kind.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            f"serving a teacher needs {error.name or 'more packages'}: pip install 'understudy[serve]'"
        ) from error
    settings.check()
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + SPARE_FILES
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most)
        )
    with closing(bind(settings)) as listening:
        check_model_dir(settings.model)
        tokenizer = load_tokenizer(settings.tokenizer or settings.model, revision=settings.revision)
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_causal_lm(settings.model, dtype=settings.dtype, device=device, revision=settings.revision)
        probe_head(model)
        scorer = Scorer(
            model,
            tokenizer,
            name=settings.model,
            hidden_dtype=settings.hidden_dtype,
            max_batch_tokens=settings.max_batch_tokens,
            share_prompts=settings.share_prompts,
        )
        with serving(scorer, settings, listening, note) as (server, url, about):
            guard = "asks for a token" if settings.token_env else "asks for no token"
            note(f"{url} serves {about.model} ({about.dtype}, {guard}), fingerprint {about.fingerprint}")
            # uvicorn raises the signal that ended it once more when it has stopped
            before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                server.run(sockets=[listening])
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
    note("stopped")


@contextmanager
def serving(
    scorer: Scorer, settings: Settings, listening: socket.socket, note: Callable[[str], None] | None = None
) -> Iterator[tuple[uvicorn.Server, str, About]]:
    """The server for a listening socket, its URL and its description. The worker ends with the block."""
    import uvicorn

    from understudy.serve.app import Connection, Door, build_app

    about = scorer.about(request_bytes=settings.max_request_bytes, reply_bytes=settings.max_reply_bytes)
    worker = Worker(scorer, reply_bytes=settings.max_reply_bytes, note=note)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room = MAX_CONNECTIONS if files == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, max(1, files - SPARE_FILES))
    door = Door(room)
    try:
        config = uvicorn.Config(
            build_app(scorer, worker, about, door, token=settings.token()),
            http=partial(Connection, door=door),  # type: ignore[arg-type]  # all that uvicorn does with it is call it
            ws="none",
            # as many are accepted at a time, so that their first bytes are read before the next ones come
            backlog=ACCEPTED_AT_ONCE,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=STOP_S,
        )
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        yield uvicorn.Server(config), f"http://{shown}:{port}", about
    finally:
        worker.close()


def bind(settings: Settings) -> socket.socket:
    """Raises RecipeError for an address that is taken or not of this machine."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, address = found[0][0], found[0][4]
        return socket.create_server((address[0], address[1]), family=family, backlog=1_024)
    except OSError as error:
        raise RecipeError(
            f"cannot listen at {settings.host} port {settings.port} ({error.strerror or error}); choose another --port "
            "(0: any that is free) or --host"
        ) from error
