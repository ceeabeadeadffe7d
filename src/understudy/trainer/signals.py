"""SIGINT and SIGTERM: finish the step, save, leave. A second one ends the process at once."""

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


class StopSignal(ExitStack):
    """A context in which the first signal only sets `received`."""

    def __init__(self) -> None:
        super().__init__()
        self.received = False
        for number in (signal.SIGINT, signal.SIGTERM):
            _handle(self, number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True


def _handle(restored: ExitStack, number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> None:
    """Sets a handler until the context ends. Python delivers signals to the main thread only, which alone may set handlers."""
    if threading.current_thread() is threading.main_thread():
        restored.callback(signal.signal, number, signal.signal(number, handler))
