"""Whether something is left behind: threads, child processes, listening ports, segments of shared memory."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

WAIT_S = 5.0
"""For what is on its way out."""
OWN_SEGMENTS = "understudy"
_LOOK_S = 0.05
_THREADS_OF_OTHERS = re.compile(r"tqdm|TMonitor|execnet|pydev|Dummy|_run_read|SubprocPool|QueueFeeder|asyncio_\d+$")
"""Started once by a library and kept: progress bars, test workers, compilers, the loop that reads remote files."""
_PROCESSES_OF_OTHERS = re.compile(r"multiprocessing[./](resource_tracker|forkserver)|compile_worker")
_SHM = Path("/dev/shm")


@contextmanager
def nothing_left(wait_s: float = WAIT_S, segments: str = OWN_SEGMENTS) -> Iterator[None]:
    """Raises AssertionError with the names of what a block has started and not ended within `wait_s` of its end.

    `segments`: of which shared memory, a pattern of names; nobody can say whose one without an owner is, and tests run side
    by side. An error of the block goes before.
    """
    before = existing(segments)
    yield
    until = time.monotonic() + wait_s
    while (
        left := [name for key, name in existing(segments).items() if key not in before]
    ) and time.monotonic() < until:
        time.sleep(_LOOK_S)
    assert not left, "left behind: " + "; ".join(left)


def existing(segments: str = OWN_SEGMENTS) -> dict[str, str]:
    """Everything that could be left, by what identifies it: its name."""
    tree = _processes()
    found: dict[str, str] = {
        f"thread {id(thread)} {thread.name}": f"thread {thread.name}"
        for thread in threading.enumerate()
        if not _THREADS_OF_OTHERS.search(thread.name)
    }
    for process in tree:
        with suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if process.pid != psutil.Process().pid and not _PROCESSES_OF_OTHERS.search(command):
                found[f"process {process.pid} {process.create_time()}"] = (
                    f"process {process.pid} ({process.status()}) {command}"
                )
        with suppress(psutil.Error):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    port = connection.laddr.port
                    found[f"port {process.pid} {port}"] = f"process {process.pid} listens on port {port}"
    if _SHM.is_dir():
        named = [entry for entry in _SHM.iterdir() if re.match(segments, entry.name)]
        found |= {f"shm {entry.name}": str(entry) for entry in named if not _of_others(entry, tree)}
    return found


def _processes() -> list[psutil.Process]:
    """This one and all below it."""
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


def _of_others(entry: Path, tree: list[psutil.Process]) -> bool:
    """Whether a living process outside this one's tree owns it: by a number in its name, or by a lock that it holds."""
    own = {process.pid for process in tree}
    owners = [int(part) for part in re.split(r"[-_.]", entry.name) if part.isdecimal() and len(part) < 10]
    with suppress(OSError):
        inode = f":{(entry / 'lock').stat().st_ino}"
        held = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        owners += [int(words[4]) for words in held if words[5].endswith(inode)]
    return any(owner not in own and psutil.pid_exists(owner) for owner in owners)
