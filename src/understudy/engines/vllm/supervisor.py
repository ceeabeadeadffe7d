"""Stands between a process and a server that it has started, and ends the server when the process is gone.

Run by its path, so that nothing is imported but Python's own modules: `python -I supervisor.py PARENT STOP_S COMMAND...`
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

KILL_S = 10.0
"""What the kernel may take to end processes that were killed, before that is an error."""
POLL_S = 0.1
LOOK_S = 5.0
"""Between looks at which shared memory the server has: a kill leaves it behind, and then nobody knows whose it was."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (where the kernel keeps it)
MADE_BY_PYTHON = ("psm_", "sem.mp-")
"""How `multiprocessing` names its segments and semaphores."""
SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of linux/prctl.h: processes that lose their parent become ours."""


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
    signal_group(leader.pid, signal.SIGTERM)
    if not _wait(lambda: _is_gone(leader), stop_s):
        segments |= _segments(_members(leader.pid))
        signal_group(leader.pid, signal.SIGKILL)
        _wait(lambda: _is_gone(leader), KILL_S)
    for pid in _children():
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    _wait(lambda: _is_gone(leader) and not _children(), KILL_S)
    for path in segments:
        with suppress(OSError):
            path.unlink()


def signal_group(group: int, number: int) -> None:
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
