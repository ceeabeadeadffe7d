"""A thread with an event loop: blocking calls from any thread, cancelled together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextvars import ContextVar
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import httpx

Result = TypeVar("Result")

_CLOSE_S = 5.0
"""Time that cancelled tasks have to end."""


class Stopped(Exception):  # noqa: N818 (leaves a client only into a worker of `HttpClient.each`)
    """This request is cancelled because another one has failed."""


class Closed(Exception):  # noqa: N818 (becomes an EngineError where the server's name is known)
    """The background thread has ended."""


class Scope:
    """Requests, and inner scopes, that are cancelled together. `SCOPE` holds that of the current thread."""

    def __init__(self) -> None:
        self.stopped = False
        self._lock = Lock()
        self._held: set[Future[Any] | Scope] = set()

    def add(self, one: Future[Any] | Scope) -> None:
        """Cancels it at once if the scope is cancelled already."""
        with self._lock:
            self._held.add(one)
            stopped = self.stopped
        if stopped:
            one.cancel()

    def remove(self, one: Future[Any] | Scope) -> None:
        """Forgets what has ended."""
        with self._lock:
            self._held.discard(one)

    def cancel(self) -> None:
        """Cancels everything in the scope, now and later."""
        with self._lock:
            self.stopped = True
            held = list(self._held)
        for one in held:
            one.cancel()


SCOPE: ContextVar[Scope | None] = ContextVar("SCOPE", default=None)


class Background:
    """Connections, and how many requests may use them at once, in a thread that starts at the first `run`.

    The thread is a daemon, so that no exit of the process waits for it. anyio's BlockingPortal does nearly the same, but its
    exit joins the thread without a limit, and a lookup of a host name can hold that for minutes.
    """

    client: httpx.AsyncClient

    def __init__(self, name: str, make_client: Callable[[], httpx.AsyncClient], slots: int) -> None:
        self.slots = asyncio.Semaphore(slots)
        self._name = name
        self._make_client = make_client
        self._lock = Lock()
        self._closed = False
        self._thread: Thread | None = None
        self._loop: asyncio.AbstractEventLoop
        self._end: asyncio.Event
        self._tasks: set[asyncio.Task[None]] = set()

    def run(self, ask: Callable[[], Coroutine[Any, Any, Result]], *, within_s: float) -> Result:
        """Returns the coroutine's result. Raises Stopped or Closed if it was cancelled, TimeoutError after `within_s`."""
        scope = SCOPE.get() or Scope()
        if scope.stopped:
            raise Stopped
        # under the lock, so that every task is known to the loop before `close` cancels them all
        with self._lock:
            if self._closed:
                raise Closed
            if self._thread is None:
                self._start()
            future = asyncio.run_coroutine_threadsafe(ask(), self._loop)
        scope.add(future)
        try:
            return future.result(within_s)
        except CancelledError:
            raise (Stopped if scope.stopped else Closed) from None
        finally:
            future.cancel()
            scope.remove(future)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs beside the requests; called from the loop's own thread."""
        task = asyncio.ensure_future(work)
        # the loop itself keeps no reference to a task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _start(self) -> None:
        self.client = self._make_client()
        started: Future[None] = Future()

        async def serve() -> None:
            self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
            started.set_result(None)
            await self._end.wait()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=_CLOSE_S)
            await self.client.aclose()

        self._thread = Thread(target=lambda: asyncio.run(serve()), name=f"client-{self._name}", daemon=True)
        self._thread.start()
        started.result()

    def close(self) -> None:
        """Cancels what runs and ends the thread. A second call does nothing."""
        with self._lock:
            thread, self._thread, self._closed = self._thread, None, True
            if thread is None:
                return
            self._loop.call_soon_threadsafe(self._end.set)
        thread.join(3 * _CLOSE_S)
