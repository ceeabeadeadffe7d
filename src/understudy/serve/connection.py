"""One connection of a served teacher, which ends where its client neither asks nor takes."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

QUIET_S = 30.0
"""Between two looks at a connection. Nothing that moved between them ends it: half a header, or a reply that nobody takes,
which would hold its memory for ever."""


class Connection(H11Protocol):
    """uvicorn's own closes a connection between two requests, and waits for ever inside one."""

    _looking: asyncio.TimerHandle | None = None
    _last: tuple[Any, ...] | None = None
    _num_resumed = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override, unused-ignore]
        super().connection_made(transport)
        self._looking = self.loop.call_later(QUIET_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._looking is not None:
            self._looking.cancel()
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        self._num_resumed += 1
        super().resume_writing()

    def _look(self) -> None:
        state = self._waits_for_client()
        if state is not None and state == self._last:
            self.transport.abort()
            return
        self._last = state
        self._looking = self.loop.call_later(QUIET_S, self._look)

    def _waits_for_client(self) -> tuple[Any, ...] | None:
        """Equal twice where nothing has moved; None: it is the server's turn, or the body's, which has its own time."""
        done = self.cycle is None or self.cycle.response_complete
        unsent = self.transport.get_write_buffer_size()
        if unsent and (done or self.flow.write_paused):
            return "reply", unsent, self._num_resumed, id(self.cycle)
        if done and self.conn.their_state is h11.IDLE:
            return "header", id(self.cycle)
        return None
