"""The routes of a served teacher and its connections. Imported late: starlette and uvicorn come with the extra `serve`."""

from __future__ import annotations

import asyncio
import hmac
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

import h11
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from understudy.http.replies import is_loopback
from understudy.serve.scorer import Refusal, Scorer
from understudy.serve.worker import DEAD, Worker
from understudy.teachers.remote.protocol import (
    ABOUT,
    CONTENT_TYPE,
    HEAD,
    SCORE,
    About,
    ProtocolError,
    ScoreReply,
    ScoreRequest,
)

FIRST_BYTE_S = 5.0
"""Time that a new connection has for its first byte."""
BODY_S = 120.0
"""Time that a body has to arrive."""
MAX_BODIES = 2**30
"""Bytes of all bodies that have begun to arrive."""
STALLED_S = 2.0
"""A body of which nothing came for so long, or a reply of which nothing was taken, idles."""
PIECE_BYTES = 256 * 1024
"""Bytes of a reply that are handed on at a time: the memory that a slow client costs beside the reply itself."""
QUIET_S = 30.0
"""Interval at which a connection is looked at. If nothing moved since the last look it is closed: half a header, or a reply
that nobody takes, would hold its memory for ever."""
CLOSE = {"Connection": "close"}
"""The rest of a body that is not read would be taken for the next request."""


def build_app(scorer: Scorer, worker: Worker, about: About, door: Door, *, token: str) -> Starlette:
    """Returns the application. Without a `token` everyone who reaches it may ask."""
    expected = f"Bearer {token}".encode()

    def guarded(
        answer: Callable[[Request], Awaitable[Response]], *, open_to_all: bool = False
    ) -> Callable[[Request], Awaitable[Response]]:
        async def route(request: Request) -> Response:
            said = request.headers.get("authorization", "").encode()
            if not token and not _is_local(request.headers.get("host", "")):
                # DNS rebinding: a page of another site may let its own name lead here
                raise Refusal(421, "without a token this teacher answers to localhost and 127.0.0.1 alone", CLOSE)
            if token and not open_to_all and not hmac.compare_digest(said, expected):
                headers = {"WWW-Authenticate": "Bearer"} | CLOSE
                raise Refusal(401, "this teacher asks for a token (Authorization: Bearer)", headers)
            return await answer(request)

        return route

    async def health(request: Request) -> Response:
        if not worker.alive:
            raise Refusal(503, DEAD)
        return JSONResponse({"status": "ok"})

    async def describe(request: Request) -> Response:
        return JSONResponse(asdict(about))

    async def head(request: Request) -> Response:
        return _binary(await asyncio.to_thread(scorer.head))

    async def score(request: Request) -> Response:
        body = await _read_body(request, about.request_bytes, door)
        # decoding a large body takes a while, and the loop answers others meanwhile
        future = await asyncio.to_thread(submit, body)
        return _binary(await asyncio.to_thread((await _wait_for(request, future)).encode))

    def submit(body: bytes) -> Future[ScoreReply]:
        try:
            return worker.submit(ScoreRequest.decode(body))
        except ProtocolError as error:
            raise Refusal(400, str(error)) from error

    async def on_error(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = Refusal(error.status_code, str(error.detail), error.headers)
        elif not isinstance(error, Refusal):
            # the text of an unexpected error may hold what a client must not see
            error = Refusal(500, f"the teacher failed ({type(error).__name__}); its log says more")
        return JSONResponse({"error": {"message": error.message}}, error.status, error.headers)

    return Starlette(
        routes=[
            Route("/health", guarded(health, open_to_all=True)),
            Route(ABOUT, guarded(describe)),
            Route(HEAD, guarded(head)),
            Route(SCORE, guarded(score), methods=["POST"]),
        ],
        exception_handlers=dict.fromkeys((HTTPException, Refusal, Exception), on_error),
    )


def _binary(body: bytes) -> Response:
    """Returns a reply in pieces. Each waits until the client has taken those before, so a slow one costs no copy."""

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), PIECE_BYTES):
            yield body[start : start + PIECE_BYTES]
            # sending to a client that has gone never waits, so others would not get their turn
            await asyncio.sleep(0)

    return StreamingResponse(pieces(), media_type=CONTENT_TYPE, headers={"Content-Length": str(len(body))})


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine by itself: localhost or a loopback address, with any port."""
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


async def _read_body(request: Request, limit: int, door: Door) -> bytes:
    """Raises Refusal before more than `limit` bytes are read, for a body that does not arrive, and where there is no room."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip() != CONTENT_TYPE:
        raise Refusal(415, f"the body must be {CONTENT_TYPE} (safetensors)", CLOSE)
    too_large = Refusal(413, f"the body has more than {limit:,} bytes (--max-request-bytes): send fewer samples", CLOSE)
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > limit:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_large
                parts.append(part)
                door.held_bytes += len(part)
                if door.held_bytes > MAX_BODIES and door.close_idle():
                    # those that were closed let go of their bytes
                    await asyncio.sleep(0.01)
                if door.held_bytes > MAX_BODIES:
                    raise Refusal(503, "too many large bodies arrive at once: ask later", {"Retry-After": "1"} | CLOSE)
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {BODY_S:.0f} s", CLOSE) from None
    except ClientDisconnect:
        raise Refusal(400, "the client went away", CLOSE) from None
    finally:
        door.held_bytes -= sum(map(len, parts))
    return b"".join(parts)


async def _wait_for(request: Request, future: Future[ScoreReply]) -> ScoreReply:
    """Returns the worker's answer. If the client goes away it is cancelled, and not computed. Raises Refusal."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, gone = asyncio.wrap_future(future), asyncio.ensure_future(disconnected())
    try:
        waiting: set[asyncio.Future[Any]] = {answer, gone}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise Refusal(400, "the client went away", CLOSE)
        return answer.result()
    finally:
        gone.cancel()
        answer.cancel()


class Door:
    """The connections of a server. Where there is no room for one more, those that idle make it.

    First go those of the client with the most, of these those that idle the longest; one that works stays. A new connection is
    refused only where all others work.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._inside: set[Connection] = set()
        self.held_bytes = 0
        """Bytes of the bodies that have begun to arrive."""

    def enter(self, connection: Connection) -> bool:
        """Whether there is room for it."""
        if len(self._inside) >= self._most and not self.close_idle():
            return False
        self._inside.add(connection)
        return True

    def leave(self, connection: Connection) -> None:
        self._inside.discard(connection)

    def close_idle(self) -> int:
        """Closes a sixteenth of the room, so that the next ones need not look; returns how many there were."""
        num_of = Counter(one.peer for one in self._inside)
        idle = [one for one in self._inside if one.idles()]
        idle.sort(key=lambda one: (-num_of[one.peer], one.moved))
        closed = idle[: max(1, self._most // 16)]
        for one in closed:
            self.leave(one)
            one.transport.abort()
        return len(closed)


class Connection(H11Protocol):
    """A connection that ends when its client neither asks nor takes; uvicorn waits for ever inside a request or reply."""

    peer = ""
    """The address of the client, without its port."""
    moved = 0.0
    """When the client last sent or took something, by the clock of the loop."""
    _timer: asyncio.TimerHandle | None = None
    _last: tuple[Any, ...] | None = None
    _num_resumed = 0
    _has_sent = False

    def __init__(self, *given: Any, door: Door, **named: Any) -> None:
        super().__init__(*given, **named)
        self._door = door

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override, unused-ignore]
        super().connection_made(transport)
        self.peer, self.moved = self.client[0] if self.client else "", self.loop.time()
        if not self._door.enter(self):
            said = {"error": {"message": "all connections are in use: ask later"}}
            self.app = JSONResponse(said, 503, {"Retry-After": "1"} | CLOSE)
        self._timer = self.loop.call_later(FIRST_BYTE_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._door.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.moved, self._has_sent = self.loop.time(), True
        super().data_received(data)

    def resume_writing(self) -> None:
        self.moved = self.loop.time()
        self._num_resumed += 1
        super().resume_writing()

    def idles(self) -> bool:
        """Whether the client has not asked, or neither sends the rest nor takes the reply."""
        if self.cycle is None or self.cycle.response_complete:
            return True
        its_turn = self.cycle.more_body or self.flow.write_paused
        return its_turn and self.loop.time() - self.moved > STALLED_S

    def _look(self) -> None:
        # a state that is equal at two looks has not moved; None: it is the server's turn, or the body's (`BODY_S`)
        state: tuple[Any, ...] | None = None
        done = self.cycle is None or self.cycle.response_complete
        unsent = self.transport.get_write_buffer_size()
        if unsent and (done or self.flow.write_paused):
            state = "reply", unsent, self._num_resumed, id(self.cycle)
        elif done and self.conn.their_state is h11.IDLE:
            state = "header", id(self.cycle)
        if not self._has_sent or (state is not None and state == self._last):
            self.transport.abort()
            return
        self._last = state
        self._timer = self.loop.call_later(QUIET_S, self._look)
