"""A server process: started, waited for, watched, and stopped with everything it started.

Between this process and the server stands a supervisor, which ends the server when its pipe to this process closes: also when
this process is killed.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

import httpx

from understudy.engines.vllm import supervisor
from understudy.engines.vllm.supervisor import KILL_S, POLL_S
from understudy.errors import EngineError

STOP_S = 15.0
"""From SIGTERM to SIGKILL: vLLM on a GPU frees its memory in 2 to 5 seconds."""
TAIL_LINES = 20
ERROR_LINES = 10
LINE_BYTES = 500
_ERROR = re.compile(rb"\w*(?:Error|Exception): .*")
TORCHRUN_VARIABLES = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
}
"""Set by torchrun for the ranks of a trainer. vLLM reads them too, and would take itself for one of these ranks."""


@dataclass(eq=False, repr=False)
class ServerProcess:
    """One server. Runs inside a `with`, or between `start` and `stop`; `wait_ready` waits until it answers."""

    args: Sequence[str]
    """The command."""
    _: KW_ONLY
    name: str
    port: int
    log: Path
    host: str = "127.0.0.1"
    """The address that it listens at."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of this process; its values appear in no message."""
    ready_timeout_s: float = 600.0
    stop_s: float = STOP_S
    pid: int | None = field(default=None, init=False)
    """The server's process id; None before it is started."""
    _supervisor: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _status: int | None = field(default=None, init=False)
    """The server's exit status; None while it runs."""
    _log_start: int = field(default=0, init=False)
    """Byte at which this server's part of the log begins: an earlier server may have written to the same file."""

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Starts the command. Raises EngineError for a port in use and a command that cannot be run."""
        if not port_is_free(self.port, self.host):
            raise EngineError(
                f"{self.name}: port {self.port} is in use by another process; choose another, or 0 for any"
            )
        self.log.parent.mkdir(parents=True, exist_ok=True)
        given = {name: value for name, value in os.environ.items() if name not in TORCHRUN_VARIABLES}
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._supervisor = subprocess.Popen(  # noqa: S603 (the recipe's own command)
                [sys.executable, "-I", supervisor.__file__, str(os.getpid()), str(self.stop_s), *self.args],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**given, **self.env},
                # a Ctrl-C at the terminal goes to the trainer alone, which then stops its servers in order
                start_new_session=True,
            )
        assert self._supervisor.stdout is not None
        ready, _, _ = select.select([self._supervisor.stdout], [], [], self.ready_timeout_s)
        line = self._supervisor.stdout.readline() if ready else b""
        if not line.strip():
            self.stop()
            raise EngineError(f"{self.name} could not be started with {self.args[0]!r}.\n{self._tail()}")
        self.pid = int(line)

    def wait_ready(self) -> None:
        """Returns when the server is healthy. Raises EngineError with the end of its log when it dies or is late."""
        deadline = time.monotonic() + self.ready_timeout_s
        while True:
            self.check()
            with suppress(httpx.HTTPError):
                # no proxy of the environment stands before it
                if httpx.get(self.url + "/health", timeout=2.0, trust_env=False).status_code == 200:
                    # another process may have taken the port after this one died
                    self.check()
                    return
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{self.name} was not ready at {self.url}/health after {self.ready_timeout_s:g} s; raise "
                    f"ready_timeout_s or see what holds it up.\n{self._tail()}"
                )
            time.sleep(POLL_S)

    def check(self, within_s: float = 0.0) -> None:
        """Raises EngineError with the end of its log if the server does not run, or ends within so many seconds."""
        if (status := self.poll(within_s)) is not None:
            how = f"was killed by signal {status - 128}" if 128 < status < 193 else f"ended with status {status}"
            raise EngineError(f"{self.name} {how}.\n{self._tail()}")

    def poll(self, within_s: float = 0.0) -> int | None:
        """Returns the exit status, 128 + n after signal n; None if it runs so many seconds longer."""
        assert self._supervisor is not None
        assert self._supervisor.stdout is not None
        if self._status is None and select.select([self._supervisor.stdout], [], [], within_s)[0]:
            # nothing more is printed where the supervisor itself was ended
            self._status = int(self._supervisor.stdout.readline() or self._supervisor.wait())
        return self._status

    def ask_to_stop(self) -> None:
        """Asks the supervisor to end the server; `stop` waits for it."""
        if self._supervisor is not None and self._supervisor.stdin is not None:
            with suppress(BrokenPipeError):
                self._supervisor.stdin.close()

    def stop(self) -> None:
        """Ends the server with everything it started; returns when all of it is gone. A second call does nothing."""
        process = self._supervisor
        if process is None:
            return
        self.ask_to_stop()
        try:
            process.wait(timeout=self.stop_s + 3 * KILL_S)
        except subprocess.TimeoutExpired:
            # only a supervisor that is stopped itself takes so long
            for pid in (self.pid, process.pid):
                if pid is not None:
                    with suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
            process.wait(timeout=KILL_S)
        if self._status is None:
            self._status = process.returncode
        if process.stdout is not None:
            process.stdout.close()

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _tail(self) -> str:
        """The last lines of the log, after the errors above them: a server writes more while it goes down."""
        last: deque[bytes] = deque(maxlen=TAIL_LINES)
        errors: dict[bytes, None] = {}
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            for line in log:
                if len(last) == TAIL_LINES and (found := _ERROR.search(last[0])):
                    errors[found[0] + b"\n"] = None
                last.append(line[:LINE_BYTES].rstrip() + b"\n")
        text = b"".join([*list(errors)[-ERROR_LINES:], *last]).decode(errors="replace").rstrip()
        return f"From the end of {self.log}:\n{text}" if text else f"{self.log} is empty"


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether nothing listens there."""
    with socket.socket() as probe:
        # a port that was in use a moment ago is free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_ports(num: int, host: str = "127.0.0.1") -> list[int]:
    """Returns different ports on which nothing listens now."""
    with ExitStack() as stack:
        # all stay bound until the last is chosen, so that no two are the same
        probes = [stack.enter_context(socket.socket()) for _ in range(num)]
        for probe in probes:
            probe.bind((host, 0))
        return [probe.getsockname()[1] for probe in probes]
