"""Holds requests back while the weights change, and tells each which version answers it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition

from understudy.errors import EngineError

REMIND_S = 0.5
"""Between two requests to pause while the last replies are waited for."""


class Gate:
    """Open: requests pass, and learn the version that answers them. Closed: they wait until it is open or broken."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._changed = Condition()
        self._open = False
        self._error: str | None = None
        self._num_inside = 0
        self.version = -1
        """Version of the weights; -1 before the first push."""

    @contextmanager
    def passing(self) -> Iterator[int]:
        """Yields the version. Raises EngineError if the gate is broken, or does not open in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._open or self._error is not None, self._timeout_s)
            if self._error is not None:
                raise EngineError(self._error)
            if not self._open:
                raise EngineError(f"no weights were pushed to the rollout engine within {self._timeout_s:g} s")
            self._num_inside += 1
            version = self.version
        try:
            yield version
        finally:
            with self._changed:
                self._num_inside -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Lets nothing pass any more; requests that are inside go on."""
        with self._changed:
            self._open = False

    def drain(self, remind: Callable[[], None]) -> None:
        """Returns when nothing is inside; calls `remind` every `REMIND_S`. Raises EngineError when that takes too long."""
        until = time.monotonic() + self._timeout_s
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._num_inside == 0, REMIND_S):
                    return
                if self._error is not None:
                    raise EngineError(self._error)
            if time.monotonic() > until:
                raise EngineError(
                    f"{self._num_inside} requests to the rollout engine did not end in {self._timeout_s:g} s"
                )
            remind()

    def open(self, version: int) -> None:
        """Lets requests pass again, unless it is broken."""
        with self._changed:
            self.version, self._open = version, self._error is None
            self._changed.notify_all()

    def break_with(self, error: str) -> None:
        """Raises EngineError for all who wait or come later. The first reason stays."""
        with self._changed:
            self._open = False
            self._error = self._error or error
            self._changed.notify_all()
