"""Programs, their results, and the limits that all kinds of sandboxes share."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Literal

from understudy.errors import RecipeError, check_range

Outcome = Literal["passed", "failed", "timed out", "out of memory", "refused"]

MAX_CODE_BYTES = 2**20
"""Longer programs are refused."""


@dataclass(frozen=True)
class Program:
    """Python code, and what to do with it.

    Without `tests` it runs as a script with `stdin`. Otherwise the tests call its functions from a separate process;
    see `understudy.sandbox.inside`.
    """

    code: str
    stdin: str = ""
    tests: str | None = None
    """Python code; the program passes if execution reaches its end."""
    names: tuple[str, ...] = ()
    """Names that the tests take from the program; all else in them is their own."""


@dataclass(frozen=True)
class Result:
    """How a program ended."""

    outcome: Outcome
    """passed: every test did, or without tests, the exit status is 0. Refused: it was not run."""
    stdout: str = ""
    """Output of a program without tests; with tests it is discarded."""
    stderr: str = ""
    note: str = ""
    """Why it did not pass."""
    seconds: float = 0.0
    """Wall-clock time from its start to its end."""

    @property
    def passed(self) -> bool:
        """Whether it passed."""
        return self.outcome == "passed"


@dataclass(frozen=True, kw_only=True)
class Sandbox(ABC):
    """Runs programs that a model wrote; also its section of a recipe. Thread-safe; keeps nothing between runs."""

    cpu_s: int = 10
    """CPU seconds of a program; its tests get the same amount separately."""
    wall_s: float = 60.0
    """Seconds from start to end. More than `cpu_s`, so that the verdict does not depend on the load."""
    memory_mb: int = 1024
    """Address space of a process, in MiB."""
    output_kb: int = 1024
    """Maximum output in KiB; a program that exceeds it is killed."""
    workers: int | None = None
    """Concurrent programs; null: one per processor."""

    def __post_init__(self) -> None:
        check_range(self, 1, "cpu_s", "output_kb", "workers")
        check_range(self, 64, "memory_mb")
        check_range(self, 0, "wall_s", above=True)

    @abstractmethod
    def check(self) -> str:
        """Returns a line for the dry run. Raises RecipeError, with a remedy, if programs cannot run."""

    @abstractmethod
    def _run(self, program: Program) -> Result:
        """Runs one program now."""

    def run(self, program: Program) -> Result:
        """Runs one program, as soon as one of `workers` is free. Raises RecipeError or EngineError if the sandbox fails."""
        for text in (program.code, program.stdin, program.tests or ""):
            try:
                text.encode()
            except UnicodeEncodeError:
                return Result("refused", note="the program is no text: it has half a character (a lone surrogate)")
        if len(program.code.encode()) > MAX_CODE_BYTES:
            return Result("refused", note=f"the program is longer than {MAX_CODE_BYTES:,} bytes")
        if "\0" in program.code:
            return Result("refused", note="the program is no text: it has a null character")
        with _turns(self.num_workers):
            return self._run(program)

    def run_many(self, programs: Sequence[Program]) -> list[Result]:
        """The results in the order of the programs, `workers` at a time. Raises as `run`."""
        if not programs:
            return []
        with ThreadPoolExecutor(min(self.num_workers, len(programs)), "understudy-sandbox") as pool:
            futures = [pool.submit(self.run, program) for program in programs]
            try:
                return [future.result() for future in futures]
            finally:
                for future in futures:
                    future.cancel()

    @property
    def num_workers(self) -> int:
        """Number of concurrent programs."""
        return self.workers or len(os.sched_getaffinity(0))


@cache
def _turns(num: int) -> threading.BoundedSemaphore:
    """The semaphore shared by all sandboxes with this limit."""
    return threading.BoundedSemaphore(num)


# a forked child must not wait for its parent's threads
os.register_at_fork(after_in_child=_turns.cache_clear)


def need_linux(kind: str) -> None:
    """Raises RecipeError on other systems."""
    if not hasattr(os, "memfd_create"):
        raise RecipeError(f"a sandbox of type {kind} needs Linux; elsewhere take a remote one: type: remote, url: ...")
