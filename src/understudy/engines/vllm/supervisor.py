"""Runs a server for another process, and ends the server with everything it started when that process is gone.

Run by its path, `python -I supervisor.py PARENT STOP_S COMMAND...`: it imports Python's own modules alone, so it starts at
once, takes little memory, and no PYTHONPATH that is meant for the server can break it.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

KILL_S = 10.0
"""Time for the kernel to end killed processes."""
POLL_S = 0.1
PR_SET_CHILD_SUBREAPER = 36
"""From linux/prctl.h: orphans below this process become its children, so that none escapes by losing its parent."""


def supervise(parent: int, stop_s: float, args: Sequence[str]) -> int:
    """Runs `args` until it ends, `parent` is gone, the pipe from it closes, or a signal asks for the end.

    Prints the pid, and the command's status as soon as it ends by itself, while what it started may still run. Returns the
    status, 128 + n where signal n ended it, 127 where it could not be started.
    """
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.append(number))
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        child = subprocess.Popen(  # noqa: S603 (the recipe's own command)
            args, stdin=subprocess.DEVNULL, stdout=sys.stderr, start_new_session=True
        )
    except OSError as error:
        print(f"{args[0]}: {error.strerror or error}", file=sys.stderr, flush=True)
        return 127
    with suppress(BrokenPipeError):
        print(child.pid, flush=True)
    while child.poll() is None and not signals and os.getppid() == parent:
        readable, _, _ = select.select([sys.stdin], [], [], POLL_S)
        # the kernel closes the pipe when the parent dies, also by SIGKILL
        if readable and not os.read(sys.stdin.fileno(), 1):
            break
    if child.poll() is not None:
        with suppress(BrokenPipeError):
            print(_status(child), flush=True)
    end_tree(child, stop_s)
    return _status(child)


def _status(child: subprocess.Popen[bytes]) -> int:
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def end_tree(child: subprocess.Popen[bytes], stop_s: float) -> None:
    """Sends SIGTERM to the child and all its descendants, and SIGKILL after `stop_s` to those that still run."""
    for number, seconds, spare_trackers in (
        (signal.SIGTERM, stop_s, False),
        # A killed process leaves its shared memory behind. Python's resource tracker removes it when the last process
        # that used it is gone, and then ends by itself.
        (signal.SIGKILL, KILL_S, True),
        (signal.SIGKILL, KILL_S, False),
    ):
        told: set[int] = set()
        until = time.monotonic() + seconds
        while (running := _running(child)) and time.monotonic() < until:
            for pid in running - told:
                told.add(pid)
                with suppress(OSError):
                    if not (spare_trackers and b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()):
                        os.kill(pid, number)
            time.sleep(POLL_S / 2)


def _running(child: subprocess.Popen[bytes]) -> set[int]:
    """The child and all below this process that is not gone. Reaps orphans, which are zombies until then."""
    found = set()
    if child.poll() is None:
        found.add(child.pid)
    else:
        # not before Popen has the child's status, which waitpid(-1) would take
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        # a process may end while it is read
        with suppress(OSError, IndexError):
            # "pid (name) state parent ...", and a name may hold anything
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    left = [os.getpid()]
    while left:
        below = children.get(left.pop(), [])
        found.update(below)
        left += below
    return found


if __name__ == "__main__":
    sys.exit(supervise(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
