"""A server process: started, waited for, watched, and stopped with everything that it started.

Between this process and the server stands a supervisor (`python -m understudy.wire.launch`), which imports nothing heavy and
ends the server's process group when its pipe to this process closes: also when this process is killed.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import FrameType, TracebackType

from understudy.errors import EngineError

STOP_S = 15.0
"""From SIGTERM to SIGKILL: vLLM on a GPU frees its memory in 2 to 5 seconds."""
KILL_S = 10.0
"""What the kernel may take to end processes that were killed, before that is an error."""
POLL_S = 0.1
LOOK_S = 5.0
"""Between looks at which shared memory the server has: a kill leaves it behind, and then nobody knows whose it was."""
TAIL_LINES = 20
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (where the kernel keeps it)
MADE_BY_PYTHON = ("psm_", "sem.mp-")
"""How `multiprocessing` names its segments and semaphores."""
SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of linux/prctl.h: processes that lose their parent become ours."""
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
                [sys.executable, "-P", "-m", __name__, str(os.getpid()), str(self._stop_s), *self._args],
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

    def check(self) -> None:
        """Raises EngineError, with the end of its log, for a server that does not run."""
        if self._process is None:
            raise EngineError(f"{self.name} is not started")
        status = self._process.poll()
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
                _signal_group(self._pid, signal.SIGKILL)
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
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            lines = deque(log, maxlen=TAIL_LINES)
        text = b"".join(lines).decode(errors="replace").rstrip()
        return f"The end of {self._log}:\n{text}" if text else f"{self._log} is empty"


def port_is_free(port: int) -> bool:
    """Whether nothing listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was left a moment ago is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def supervise(parent: int, stop_s: float, args: Sequence[str]) -> int:
    """Runs `args` in a process group of its own until it ends, `parent` is gone, or the pipe from it closes.

    Prints the pid. Returns the command's status, 128 + n where signal n ended it, 127 where it could not be started.
    """
    asked: list[int] = []

    def on_signal(number: int, _: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_signal)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    try:
        child = subprocess.Popen(  # noqa: S603 (the recipe's own command)
            args, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True
        )
    except OSError as error:
        print(f"{args[0]}: {error.strerror or error}", file=sys.stderr, flush=True)
        return 127
    with suppress(BrokenPipeError):
        print(child.pid, flush=True)
    segments: set[Path] = set()
    next_look = 0.0
    while child.poll() is None and not asked and os.getppid() == parent:
        if time.monotonic() >= next_look:
            segments |= _segments(_members(child.pid))
            next_look = time.monotonic() + LOOK_S
        readable, _, _ = select.select([sys.stdin], [], [], POLL_S)
        if readable and not os.read(sys.stdin.fileno(), 1):
            break
    end_group(child, stop_s, segments)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def end_group(leader: subprocess.Popen[bytes], stop_s: float, segments: set[Path]) -> None:
    """Ends the group, and whatever else lost its parent to us; removes its shared memory, `segments` of it known."""
    segments |= _segments(_members(leader.pid))
    _signal_group(leader.pid, signal.SIGTERM)
    if not _wait(lambda: _is_gone(leader), stop_s):
        segments |= _segments(_members(leader.pid))
        _signal_group(leader.pid, signal.SIGKILL)
        _wait(lambda: _is_gone(leader), KILL_S)
    for pid in _children():
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    _wait(lambda: _is_gone(leader) and not _children(), KILL_S)
    for path in segments:
        with suppress(OSError):
            path.unlink()


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _is_gone(leader: subprocess.Popen[bytes]) -> bool:
    if leader.poll() is None:
        return False
    # those that lost their parent are ours to bury
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    return not _members(leader.pid)


def _wait(done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S / 2)
    return True


def _members(group: int) -> list[int]:
    """Processes of the group that are not dead yet."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            state, _, member = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(member) == group and state != "Z":
                found.append(int(entry.name))
    return found


def _children() -> list[int]:
    with suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    return []


def _segments(pids: Sequence[int]) -> set[Path]:
    """Shared memory that these processes have mapped and that `multiprocessing` made."""
    found = set()
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                path = Path(line.partition("/")[1] + line.partition("/")[2])
                if path.parent == SHARED_MEMORY and path.name.startswith(MADE_BY_PYTHON):
                    found.add(path)
    return found


if __name__ == "__main__":
    sys.exit(supervise(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
