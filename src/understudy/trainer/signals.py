"""SIGINT and SIGTERM: leave what can be done again, save, end. A second one ends the process at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does, so that what was opened is closed; for the main thread only."""
    with ExitStack() as restored:
        _handle(restored, signal.SIGTERM, signal.default_int_handler)
        yield


class Stopped(BaseException):
    """The first signal, where what is being done may be left in the middle."""


class Abandoned(KeyboardInterrupt):
    """A further signal: leave at once, and save nothing."""


class StopSignal(ExitStack):
    """A context in which the first signal sets `received`, and raises Stopped inside `breaks`; a second raises Abandoned."""

    def __init__(self) -> None:
        super().__init__()
        self.received = self._breaks = False
        for number in (signal.SIGINT, signal.SIGTERM):
            _handle(self, number, self._receive)

    @contextmanager
    def breaks(self) -> Iterator[None]:
        """Raises Stopped where the first signal comes inside, or came before."""
        if self.received:
            raise Stopped
        self._breaks = True
        try:
            yield
        finally:
            self._breaks = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise Abandoned
        self.received = True
        if self._breaks:
            raise Stopped


def _handle(restored: ExitStack, number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> None:
    """Sets a handler until the context ends. Python delivers signals to the main thread only, which alone may set handlers."""
    if threading.current_thread() is threading.main_thread():
        restored.callback(signal.signal, number, signal.signal(number, handler))
