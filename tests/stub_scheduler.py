"""When a stub's requests run: vLLM's pauses, a limit on how many at a time, and delays drawn from a seed."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition

_LOOK_S = 0.05
"""Between looks at whether a client has left."""
_PAUSE_S = 60.0

Latency = Callable[[int], float]
"""From the number of a completions request, in the order of arrival, to seconds."""


def uniform(low_s: float, high_s: float, *, seed: int = 0) -> Latency:
    return lambda number: random.Random(f"{seed}/{number}").uniform(low_s, high_s)


def lognormal(median_s: float, sigma: float, *, seed: int = 0) -> Latency:
    return lambda number: median_s * random.Random(f"{seed}/{number}").lognormvariate(0.0, sigma)


class ClientGone(Exception):  # noqa: N818 (nothing is wrong)
    """Nobody waits for the reply."""


@dataclass(eq=False)
class Ticket:
    """A request on its way through the scheduler."""

    gone: Callable[[], bool]
    aborted: bool = False


class Scheduler:
    """Who may take a step, and pauses in vLLM's three modes. A new request waits while there is any pause."""

    def __init__(self, concurrency: int | None) -> None:
        self.concurrency = concurrency
        self.paused: str | None = None
        self.running: set[Ticket] = set()
        self.waiting: set[Ticket] = set()
        self._changed = Condition()
        self._closing = False

    def admit(self, ticket: Ticket) -> None:
        with self._changed:
            self.waiting.add(ticket)
            try:
                while not ticket.aborted and (self.paused or len(self.running) >= (self.concurrency or sys.maxsize)):
                    self._look(ticket)
                self.running.add(ticket)
            finally:
                self.waiting.discard(ticket)

    def rest(self, ticket: Ticket, seconds: float) -> bool:
        """Waits that long, and longer while everything is kept still; whether the request goes on."""
        until = time.monotonic() + seconds
        with self._changed:
            while not ticket.aborted and (self.paused == "keep" or time.monotonic() < until):
                self._look(ticket, max(0.0, until - time.monotonic()) if self.paused != "keep" else _LOOK_S)
            self._check(ticket)
            return not ticket.aborted

    def leave(self, ticket: Ticket) -> None:
        with self._changed:
            self.running.discard(ticket)
            self._changed.notify_all()

    def pause(self, mode: str) -> None:
        """Returns when nothing that has to end is running."""
        until = time.monotonic() + _PAUSE_S
        with self._changed:
            self.paused = mode
            if mode == "abort":
                for ticket in self.running | self.waiting:
                    ticket.aborted = True
            self._changed.notify_all()
            while mode != "keep" and self.running and time.monotonic() < until:
                self._changed.wait(_LOOK_S)

    def resume(self) -> None:
        with self._changed:
            self.paused = None
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _look(self, ticket: Ticket, seconds: float = _LOOK_S) -> None:
        self._changed.wait(min(seconds, _LOOK_S))
        self._check(ticket)

    def _check(self, ticket: Ticket) -> None:
        if self._closing or ticket.gone():
            raise ClientGone
