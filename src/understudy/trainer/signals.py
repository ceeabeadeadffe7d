"""SIGINT, SIGTERM and SIGHUP: leave what can be done again, save, end. A second one ends the process at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

ENDING = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
"""Those that end a process, beside Ctrl-C; SIGHUP comes when a terminal or a connection closes."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, so that what was opened is closed; in the main thread."""
    with ExitStack() as restored:
        for number in ENDING:
            _handle(restored, number, signal.default_int_handler)
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
        for number in (signal.SIGINT, *ENDING):
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
            raise Abandoned("stopped at once by a second signal; what came after the last checkpoint is not saved")
        self.received = True
        if self._breaks:
            raise Stopped


def _handle(restored: ExitStack, number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> None:
    """Sets a handler until the context ends. Python delivers signals to the main thread only, which alone may set handlers."""
    # nohup starts a process that ignores SIGHUP, and means it
    kept = number not in (signal.SIGINT, signal.SIGTERM) and signal.getsignal(number) is signal.SIG_IGN
    if threading.current_thread() is threading.main_thread() and not kept:
        restored.callback(signal.signal, number, signal.signal(number, handler))
