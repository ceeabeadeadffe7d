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
from pathlib import Path
from types import TracebackType

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
TORCHRUN_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Set by torchrun for the ranks of a trainer. vLLM reads them too, and would take itself for one of these ranks."""


class ServerProcess:
    """One server on loopback. Runs inside a `with`, or between `start` and `stop`.

    `args`: the command. `env`: added to the environment of this process; its values appear in no message.
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
        """The server's process id; None before it is started."""
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
                env={name: value for name, value in os.environ.items() if name not in TORCHRUN_VARIABLES} | self._env,
                # a Ctrl-C at the terminal goes to the trainer alone, which then stops its servers in order
                start_new_session=True,
            )
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], self._ready_timeout_s)
        line = self._process.stdout.readline() if ready else b""
        if not line.strip():
            self.stop()
            raise EngineError(f"{self.name} could not be started with {self._args[0]!r}.\n{self._tail()}")
        self._pid = int(line)

    def wait_ready(self) -> None:
        """Returns when the server is healthy. Raises EngineError with the end of its log when it dies or is late."""
        deadline = time.monotonic() + self._ready_timeout_s
        while True:
            self.check()
            with suppress(httpx.HTTPError):
                # no proxy of the environment stands before loopback
                if httpx.get(self.url + self._health, timeout=2.0, trust_env=False).status_code == 200:
                    # another process may have taken the port after this one died
                    self.check()
                    return
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{self.name} was not ready at {self.url}{self._health} after {self._ready_timeout_s:g} s; raise "
                    f"ready_timeout_s or see what holds it up.\n{self._tail()}"
                )
            time.sleep(POLL_S)

    def check(self, within_s: float = 0.0) -> None:
        """Raises EngineError with the end of its log if the server does not run, or ends within so many seconds."""
        if self._process is None:
            raise EngineError(f"{self.name} is not started")
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(within_s)
        status = self._process.returncode
        if status is not None:
            how = f"was killed by signal {status - 128}" if 128 < status < 193 else f"ended with status {status}"
            raise EngineError(f"{self.name} {how}.\n{self._tail()}")

    def ask_to_stop(self) -> None:
        """Asks the supervisor to end the server; `stop` waits for it."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()

    def stop(self) -> None:
        """Ends the server with everything it started; returns when all of it is gone. A second call does nothing."""
        process = self._process
        if process is None:
            return
        self.ask_to_stop()
        try:
            process.wait(timeout=self._stop_s + 3 * KILL_S)
        except subprocess.TimeoutExpired:
            # only a supervisor that is stopped itself takes so long
            for pid in (self._pid, process.pid):
                if pid is not None:
                    with suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
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

    def _tail(self) -> str:
        """The last lines of the log, after the errors above them: a server writes more while it goes down."""
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
        # a port that was in use a moment ago is free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_ports(num: int) -> list[int]:
    """Returns different ports on which nothing listens now."""
    with ExitStack() as stack:
        # all stay bound until the last is chosen, so that no two are the same
        probes = [stack.enter_context(socket.socket()) for _ in range(num)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def free_port() -> int:
    """Returns a port on which nothing listens now."""
    return free_ports(1)[0]
