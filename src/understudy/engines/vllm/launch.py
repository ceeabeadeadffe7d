"""A server process: started, waited for, watched, and stopped with everything that it started.

Between this process and the server stands a supervisor, a process that imports nothing heavy and ends the server's process
group when its pipe to this process closes: also when this process is killed.
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
from contextlib import ExitStack, closing, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType

from understudy.engines.vllm import supervisor
from understudy.engines.vllm.supervisor import KILL_S, POLL_S, signal_group
from understudy.errors import EngineError

STOP_S = 15.0
"""From SIGTERM to SIGKILL: vLLM on a GPU frees its memory in 2 to 5 seconds."""
TAIL_LINES = 20
ERROR_LINES = 10
LINE_BYTES = 500
_ERROR = re.compile(rb"\w*(?:Error|Exception): .*")
OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells the ranks of a trainer; a server that reads it takes itself for one of them."""


class ServerProcess:
    """One server on loopback. Inside a `with`, or between `start` and `stop`.

    `args`: the command. `env`: beside the environment of this process; its values appear in no message.
    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        name: str,
        port: int,
        log: Path,
        env: Mapping[str, str] | None = None,
        health: str = "/health",
        ready_timeout_s: float = 600.0,
        stop_s: float = STOP_S,
    ) -> None:
        self.name = name
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._args = list(args)
        self._log = log
        self._env = dict(env or {})
        self._health = health
        self._ready_timeout_s = ready_timeout_s
        self._stop_s = stop_s
        self._process: subprocess.Popen[bytes] | None = None
        self._pid: int | None = None
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        """Of the server, which leads a process group of its own; None before it is started."""
        return self._pid

    def start(self) -> None:
        """Starts the command. Raises EngineError for a port in use and a command that cannot be run."""
        if self._process is not None:
            raise RuntimeError(f"{self.name} was started already")
        if not port_is_free(self.port):
            raise EngineError(
                f"{self.name}: port {self.port} is in use by another process; choose another, or 0 for any"
            )
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(  # noqa: S603 (the recipe's own command)
                [sys.executable, "-I", supervisor.__file__, str(os.getpid()), str(self._stop_s), *self._args],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={name: value for name, value in os.environ.items() if name not in OF_TORCHRUN} | self._env,
                start_new_session=True,  # a Ctrl-C at the terminal is for the trainer, which then stops its servers
            )
        self._pid = self._read_pid()

    def wait_ready(self) -> None:
        """Returns when the server is healthy. Raises EngineError, with the end of its log, when it dies or is late."""
        deadline = time.monotonic() + self._ready_timeout_s
        while True:
            self.check()
            if self._is_healthy():
                self.check()
                return
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{self.name} was not ready at {self.url}{self._health} after {self._ready_timeout_s:g} s; raise "
                    f"ready_timeout_s or see what holds it up.\n{self._tail()}"
                )
            time.sleep(POLL_S)

    def check(self, within_s: float = 0.0) -> None:
        """Raises EngineError, with the end of its log, for a server that does not run, or ends within so many seconds."""
        if self._process is None:
            raise EngineError(f"{self.name} is not started")
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(within_s)
        status = self._process.returncode
        if status is not None:
            how = f"was killed by signal {status - 128}" if 128 < status < 193 else f"ended with status {status}"
            raise EngineError(f"{self.name} {how}.\n{self._tail()}")

    def ask_to_stop(self) -> None:
        """Begins what `stop` waits for."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()

    def stop(self) -> None:
        """SIGTERM, then SIGKILL, to the whole group; returns when it is gone. Once is enough, twice does no harm."""
        process = self._process
        if process is None:
            return
        self.ask_to_stop()
        try:
            process.wait(timeout=self._stop_s + 2 * KILL_S)
        except subprocess.TimeoutExpired:
            if self._pid is not None:
                signal_group(self._pid, signal.SIGKILL)
            process.kill()
            process.wait(timeout=KILL_S)
        if process.stdout is not None:
            process.stdout.close()

    def __enter__(self) -> ServerProcess:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _read_pid(self) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], self._ready_timeout_s)
        line = self._process.stdout.readline() if ready else b""
        if not line.strip():
            self.stop()
            raise EngineError(f"{self.name} could not be started with {self._args[0]!r}.\n{self._tail()}")
        return int(line)

    def _is_healthy(self) -> bool:
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=2.0)) as connection:
            try:
                connection.request("GET", self._health)
                return connection.getresponse().status == 200
            except (OSError, HTTPException):
                return False

    def _tail(self) -> str:
        """The last lines of the log, and before them the errors that it speaks of: a server says more while it goes down."""
        last: deque[bytes] = deque(maxlen=TAIL_LINES)
        errors: dict[bytes, None] = {}
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            for line in log:
                if len(last) == TAIL_LINES and (found := _ERROR.search(last[0])):
                    errors[found[0] + b"\n"] = None
                last.append(line[:LINE_BYTES].rstrip() + b"\n")
        text = b"".join([*list(errors)[-ERROR_LINES:], *last]).decode(errors="replace").rstrip()
        return f"From the end of {self._log}:\n{text}" if text else f"{self._log} is empty"


def port_is_free(port: int) -> bool:
    """Whether nothing listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was left a moment ago is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_ports(num: int) -> list[int]:
    """Different ports on which nothing listens now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(num)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]
