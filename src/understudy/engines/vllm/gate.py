"""Which policy version wrote a reply: nothing is asked while the weights change."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition

from understudy.errors import EngineError

_LOOK_S = 0.5
"""Between reminders while the last replies are waited for."""


class Gate:
    """Open: requests pass, and know the version that answers them. Closed: they wait, until it is open or broken."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._changed = Condition()
        self._open = False
        self._error: str | None = None
        self._num_inside = 0
        self._version = -1

    @property
    def version(self) -> int:
        """Of the weights; -1 before the first."""
        return self._version

    @contextmanager
    def passing(self) -> Iterator[int]:
        """The version. Raises EngineError where the gate is broken, or does not open in time."""
        until = time.monotonic() + self._patience_s
        with self._changed:
            while not self._open:
                if self._error is not None:
                    raise EngineError(self._error)
                if not self._changed.wait(max(0.0, until - time.monotonic())):
                    raise EngineError(f"no weights were pushed to the rollout engine within {self._patience_s:g} s")
            self._num_inside += 1
            version = self._version
        try:
            yield version
        finally:
            with self._changed:
                self._num_inside -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Nothing passes any more; what is inside goes on."""
        with self._changed:
            self._open = False

    def drain(self, remind: Callable[[], None]) -> None:
        """Returns when nothing is inside, after `remind` has been called now and then. Raises EngineError when late."""
        until = time.monotonic() + self._patience_s
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._num_inside == 0, _LOOK_S):
                    return
                if self._error is not None:
                    raise EngineError(self._error)
            if time.monotonic() > until:
                raise EngineError(
                    f"{self._num_inside} requests to the rollout engine did not end in {self._patience_s:g} s"
                )
            remind()

    def open(self, version: int) -> None:
        """Lets requests pass again."""
        with self._changed:
            self._version, self._open = version, self._error is None
            self._changed.notify_all()

    def break_with(self, error: str) -> None:
        """Whoever waits or comes later gets an EngineError. The first reason stays."""
        with self._changed:
            self._open = False
            self._error = self._error or error
            self._changed.notify_all()
