"""A thread with an event loop: blocking calls from any thread, given up together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from contextvars import ContextVar
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import httpx

Result = TypeVar("Result")

_CLOSE_S = 5.0
"""How long is waited for tasks that were given up, and for the thread."""


class Stopped(Exception):  # noqa: N818 (leaves a client only into a worker of `HttpClient.each`)
    """Another request has failed, so this one is given up."""


class Closed(Exception):  # noqa: N818 (becomes an EngineError where the server's name is known)
    """Nothing can be asked any more."""


class _Cancellable(Protocol):
    def cancel(self) -> bool: ...


class Scope:
    """What is given up together, also by way of an outer scope. A thread's own is in `SCOPE`."""

    def __init__(self) -> None:
        self.stopped = False
        self._lock = Lock()
        self._held: set[_Cancellable] = set()

    def add(self, one: _Cancellable) -> None:
        """Given up at once where the scope is."""
        with self._lock:
            self._held.add(one)
            stopped = self.stopped
        if stopped:
            one.cancel()

    def remove(self, one: _Cancellable) -> None:
        """It has ended."""
        with self._lock:
            self._held.discard(one)

    def cancel(self) -> bool:
        """Gives up all that it holds, and all that comes."""
        with self._lock:
            self.stopped = True
            held = list(self._held)
        for one in held:
            one.cancel()
        return True


SCOPE: ContextVar[Scope | None] = ContextVar("SCOPE", default=None)


class Line:
    """What requests share: connections, and how many may be in flight."""

    def __init__(self, client: httpx.AsyncClient, slots: int) -> None:
        self.client = client
        self.slots = asyncio.Semaphore(slots)
        self._beside: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs beside the requests, in their loop, and is given up with it."""
        task = asyncio.ensure_future(work)
        # the loop itself holds no task
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)


class Background:
    """Starts at the first `run`, ends with `close`. The thread is a daemon: no exit waits for it."""

    def __init__(self, name: str, make_line: Callable[[], Line]) -> None:
        self._name = name
        self._make_line = make_line
        self._lock = Lock()
        self._closed = False
        self._running: tuple[asyncio.AbstractEventLoop, Thread, Line] | None = None

    def run(self, ask: Callable[[Line], Coroutine[Any, Any, Result]], *, within_s: float) -> Result:
        """What the coroutine returns. Raises Stopped or Closed where it was given up, TimeoutError after `within_s`."""
        scope = SCOPE.get() or Scope()
        if scope.stopped:
            raise Stopped
        future = self._submit(ask)
        scope.add(future)
        try:
            return future.result(within_s)
        except CancelledError:
            raise (Stopped if scope.stopped else Closed) from None
        finally:
            future.cancel()
            scope.remove(future)

    def _submit(self, ask: Callable[[Line], Coroutine[Any, Any, Result]]) -> Future[Result]:
        # under the lock, so that the loop meets every task before it is told to end
        with self._lock:
            if self._closed:
                raise Closed
            if self._running is None:
                self._running = self._start()
            loop, _, line = self._running
            return asyncio.run_coroutine_threadsafe(ask(line), loop)

    def _start(self) -> tuple[asyncio.AbstractEventLoop, Thread, Line]:
        line = self._make_line()
        loop = asyncio.new_event_loop()
        thread = Thread(target=_serve, args=(loop,), name=f"client-{self._name}", daemon=True)
        thread.start()
        return loop, thread, line

    def close(self) -> None:
        """Gives up what runs, ends the thread. A second call does nothing."""
        with self._lock:
            running, self._running, self._closed = self._running, None, True
        if running is None:
            return
        loop, thread, line = running
        ended = asyncio.run_coroutine_threadsafe(_end(line), loop)
        try:
            with suppress(TimeoutError):
                ended.result(2 * _CLOSE_S)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(_CLOSE_S)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _end(line: Line) -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_CLOSE_S)
    await line.client.aclose()
    loop = asyncio.get_running_loop()
    await loop.shutdown_asyncgens()
    # host names are looked up in threads of their own
    await loop.shutdown_default_executor()
