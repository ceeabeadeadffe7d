"""Worker processes that compare expressions under limits of time and memory, from any thread.

Sympy can be made to compute for hours or to fill the memory by a dozen characters, and math-verify's own limit (SIGALRM
and a Python handler) works in the main thread only and not inside a long C call. So the comparison runs in a process of
its own, which is kept for the next one and dies when a limit is reached.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import BoundedSemaphore
from typing import IO, cast

from understudy.errors import UnderstudyError

WALL_FACTOR = 10.0
"""Wall-clock limit over processor-time limit: on a busy machine the verdict must not depend on the load."""
_PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "HOME", "TMPDIR")
"""All that the worker sees of the environment: it reads model text and needs no key."""


class _EndedError(Exception):
    """The worker ended without a reply; carries its exit status."""

    def __init__(self, returncode: int) -> None:
        super().__init__(returncode)
        self.returncode = returncode


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
        try:
            hello = self._receive()
        except _EndedError as error:
            hello = {"error": f"the process ended with status {error.returncode}"}
        if "error" in hello:
            self.kill()
            raise UnderstudyError(f"math-verify cannot be started: {hello['error']}; is `math-verify` installed?")

    def ask(self, request: dict[str, object]) -> dict[str, object]:
        pipe = cast("IO[bytes]", self.process.stdin)
        try:
            pipe.write(json.dumps(request).encode() + b"\n")
            pipe.flush()
        except BrokenPipeError:
            raise _EndedError(self.process.wait()) from None
        return self._receive()

    def _receive(self) -> dict[str, object]:
        line = cast("IO[bytes]", self.process.stdout).readline()
        if not line.endswith(b"\n"):
            raise _EndedError(self.process.wait())
        return cast("dict[str, object]", json.loads(line))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # a request that was never read is still in the buffer
                    continue


_turns = BoundedSemaphore(os.cpu_count() or 1)
"""Comparisons at a time: more would only wait for each other, each in a process of its own."""
_idle: list[_Worker] = []
"""Workers that wait for the next comparison. `append` and `pop` of a list are atomic, so threads need no lock."""


def compare(reference: str, answer: str, timeout_s: float) -> tuple[bool, str]:
    """Whether the answer equals the reference, and if that could not be found out, why.

    `timeout_s` is processor time of the comparison; ten times as much wall-clock time is allowed. Safe from any thread;
    threads that call at the same time get workers of their own.
    """
    request: dict[str, object] = {"reference": reference, "answer": answer}
    request |= {"cpu_s": timeout_s, "wall_s": WALL_FACTOR * timeout_s}
    try:
        return _compare_once(request)
    except _EndedError as first:
        if -first.returncode in (signal.SIGPROF, signal.SIGALRM):
            return False, f"the comparison took more than {timeout_s:g} s"
    try:  # somebody else may have ended the worker: only a second death is the expression's fault
        return _compare_once(request)
    except _EndedError as second:
        if -second.returncode in (signal.SIGPROF, signal.SIGALRM):
            return False, f"the comparison took more than {timeout_s:g} s"
        return False, f"the comparison ended its process with status {second.returncode}"


def _compare_once(request: dict[str, object]) -> tuple[bool, str]:
    with _turns:
        return _ask_worker(request)


def _ask_worker(request: dict[str, object]) -> tuple[bool, str]:
    worker = _idle_worker() or _Worker()
    try:
        reply = worker.ask(request)
    except BaseException:  # also an interrupt: a late reply must never be read as that of the next question
        worker.kill()
        raise
    _idle.append(worker)
    if "error" in reply:
        return False, f"not comparable: {reply['error']}"
    return bool(reply["equal"]), ""


def _idle_worker() -> _Worker | None:
    """One that is alive; somebody else may have ended it while it waited."""
    while True:
        try:
            worker = _idle.pop()
        except IndexError:
            return None
        if worker.process.poll() is None:
            return worker
        worker.kill()


def close_workers() -> None:
    """End the idle workers; new ones start when they are needed."""
    while _idle:
        _idle.pop().kill()


atexit.register(close_workers)


def _start_anew() -> None:
    """A forked child must not share its parent's pipes, nor wait for its threads."""
    global _turns  # noqa: PLW0603 (a semaphore cannot be emptied)
    _idle.clear()
    _turns = BoundedSemaphore(os.cpu_count() or 1)


os.register_at_fork(after_in_child=_start_anew)
