"""Worker processes that compare expressions under limits of time and memory, from any thread.

Sympy can be made to compute for hours or to fill the memory by a dozen characters, and math-verify's own limit (SIGALRM
and a Python handler) works in the main thread only and not inside a long C call. So the comparison runs in a process of
its own, which is kept for the next one and dies when a limit is reached. A process pool with time limits (`pebble`) would
limit wall-clock time only, so that a verdict would depend on the load, and would give the worker the trainer's environment.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import BoundedSemaphore
from typing import IO, cast

from understudy.errors import UnderstudyError

WALL_FACTOR = 10.0
"""Wall-clock limit over processor-time limit: on a busy machine the verdict must not depend on the load."""
_PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "HOME", "TMPDIR")
"""Variables that the worker inherits. It reads what a model wrote and gets no key."""


class _Worker:
    """One worker process. Used by one thread at a time."""

    def __init__(self) -> None:
        # -P: the script's own folder holds a module named `math` and must not come first on the path.
        # A session of its own: Ctrl-C in the terminal is for the trainer, which decides when it stops.
        self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and script
            [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
            start_new_session=True,
        )
        hello = self._receive()
        if hello is None or "error" in hello:
            self.kill()
            reason = hello["error"] if hello else f"the process ended with status {self.process.returncode}"
            raise UnderstudyError(f"math-verify cannot be started: {reason}; is `math-verify` installed?")

    def ask(self, request: dict[str, object]) -> dict[str, object] | None:
        """Returns the reply; None where the worker ended instead, `process.returncode` is then its exit status."""
        pipe = cast("IO[bytes]", self.process.stdin)
        try:
            pipe.write(json.dumps(request).encode() + b"\n")
            pipe.flush()
        except BrokenPipeError:
            self.process.wait()
            return None
        return self._receive()

    def _receive(self) -> dict[str, object] | None:
        line = cast("IO[bytes]", self.process.stdout).readline()
        if not line.endswith(b"\n"):
            self.process.wait()
            return None
        return cast("dict[str, object]", json.loads(line))

    def kill(self) -> None:
        self.process.kill()
        # leaving the process waits for it and closes its pipes; a request that was never read is still in the buffer
        with suppress(BrokenPipeError), self.process:
            pass


_turns = BoundedSemaphore(os.cpu_count() or 1)
"""Concurrent comparisons: more would only wait for each other, each in a process of its own."""
_idle: list[_Worker] = []
"""Workers that wait for the next comparison. `append` and `pop` of a list are atomic, so threads need no lock."""


def compare(reference: str, answer: str, timeout_s: float) -> tuple[bool, str]:
    """Whether the answer equals the reference, and if that could not be found out, why.

    `timeout_s` is processor time of the comparison; ten times as much wall-clock time is allowed. Safe from any thread;
    threads that call at the same time get workers of their own.
    """
    request: dict[str, object] = {"reference": reference, "answer": answer}
    request |= {"cpu_s": timeout_s, "wall_s": WALL_FACTOR * timeout_s}
    status = 0
    for _ in range(2):  # somebody else may have ended the worker: only a second death is the expression's fault
        with _turns:
            worker = _idle_worker() or _Worker()
            try:
                reply = worker.ask(request)
            except BaseException:  # also an interrupt: a late reply must never be read as that of the next question
                worker.kill()
                raise
            if reply is not None:
                _idle.append(worker)
                return (False, f"not comparable: {reply['error']}") if "error" in reply else (bool(reply["equal"]), "")
            worker.kill()
        status = -worker.process.returncode
        if status in (signal.SIGPROF, signal.SIGALRM):
            return False, f"the comparison took more than {timeout_s:g} s"
    return False, f"the comparison ended its process with status {-status}"


def _idle_worker() -> _Worker | None:
    """An idle worker that is alive; somebody else may have ended it while it waited."""
    while True:
        try:
            worker = _idle.pop()
        except IndexError:
            return None
        if worker.process.poll() is None:
            return worker
        worker.kill()


def close_workers() -> None:
    """Ends the idle workers; new ones start when they are needed."""
    while _idle:
        _idle.pop().kill()


atexit.register(close_workers)


def _start_anew() -> None:
    """A forked child must not share its parent's pipes, nor wait for its threads."""
    global _turns  # noqa: PLW0603 (a semaphore cannot be emptied)
    _idle.clear()
    _turns = BoundedSemaphore(os.cpu_count() or 1)


os.register_at_fork(after_in_child=_start_anew)
