"""The routes of a served teacher."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

from understudy.serve.scorer import Refusal, Scorer
from understudy.serve.settings import is_loopback
from understudy.serve.worker import DEAD, Worker
from understudy.teachers.remote.frames import ABOUT, CONTENT_TYPE, HEAD, SCORE, About, Answer, Ask, FrameError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

Said: TypeAlias = "Response | Pieces"
HEALTH = "/health"
BODY_S = 120.0
"""How long a body may take to arrive."""
PIECE_BYTES = 256 * 1024
"""Of a reply that is handed on at a time: what a slow client costs beside the reply itself."""
CLOSE = {"Connection": "close"}
"""What is left of a body that is not read would be taken for the next request."""


def build_app(scorer: Scorer, worker: Worker, about: About, *, token: str) -> Starlette:
    """The application; `token` empty: anyone who reaches it may ask."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    expected = f"Bearer {token}".encode() if token else b""

    def guarded(
        answer: Callable[[Request], Awaitable[Said]], expected: bytes = expected
    ) -> Callable[[Request], Awaitable[Said]]:
        async def route(request: Request) -> Said:
            if not token and not is_local(request.headers.get("host", "")):
                # a page of another site may have its own name lead here
                return refused(
                    Refusal(421, "without a token this teacher answers to localhost and 127.0.0.1 alone", CLOSE)
                )
            said = request.headers.get("authorization", "").encode()
            if expected and not hmac.compare_digest(said, expected):
                headers = {"WWW-Authenticate": "Bearer"} | CLOSE
                return refused(Refusal(401, "this teacher asks for a token (Authorization: Bearer)", headers))
            try:
                return await answer(request)
            except Refusal as refusal:
                return refused(refusal)

        return route

    def refused(refusal: Refusal) -> Response:
        return JSONResponse({"error": {"message": refusal.message}}, refusal.status, refusal.headers)

    async def health(request: Request) -> Response:
        if not worker.alive:
            return refused(Refusal(503, DEAD))
        return JSONResponse({"status": "ok"})

    async def teacher(request: Request) -> Response:
        return JSONResponse(about.encode())

    async def head(request: Request) -> Pieces:
        return Pieces(await asyncio.to_thread(scorer.head))

    async def score(request: Request) -> Pieces:
        body = await read_body(request, about.limits.request_bytes)
        # a large body takes a while, and the loop answers others meanwhile
        answer = await wait_for(request, await asyncio.to_thread(submit, body))
        return Pieces(await asyncio.to_thread(answer.encode))

    def submit(body: bytes) -> Future[Answer]:
        try:
            return worker.submit(Ask.decode(body))
        except FrameError as error:
            raise Refusal(400, str(error)) from error

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refused(Refusal(error.status_code, str(error.detail), error.headers))

    async def on_error(request: Request, error: Exception) -> Response:
        # the text of an unexpected error may hold what a client must not see
        return refused(Refusal(500, f"the teacher failed ({type(error).__name__}); its log says more"))

    return Starlette(
        routes=[
            Route(HEALTH, guarded(health, expected=b"")),
            Route(ABOUT, guarded(teacher)),
            Route(HEAD, guarded(head)),
            Route(SCORE, guarded(score), methods=["POST"]),
        ],
        exception_handlers={HTTPException: on_http_error, Exception: on_error},
    )


@dataclass(frozen=True, eq=False)
class Pieces:
    """A binary reply. Each piece waits until the client has taken those before, so no reply is copied for a slow one."""

    body: bytes

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        """As ASGI asks for."""
        size = len(self.body)
        said = {"content-type": CONTENT_TYPE, "content-length": str(size)}
        headers = [(name.encode(), value.encode()) for name, value in said.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for start in range(0, max(1, size), PIECE_BYTES):
            end = start + PIECE_BYTES
            await send({"type": "http.response.body", "body": self.body[start:end], "more_body": end < size})
            # to send to a client that has gone waits for nothing
            await asyncio.sleep(0)


def is_local(host: str) -> bool:
    """Whether a header Host names this machine by itself: localhost or an address of loopback, with any port."""
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


async def read_body(request: Request, limit: int) -> bytes:
    """Raises Refusal before more than `limit` bytes are read, and for a body that does not arrive."""
    from starlette.requests import ClientDisconnect

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
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {BODY_S:.0f} s", CLOSE) from None
    except ClientDisconnect:
        raise Refusal(400, "the client went away", CLOSE) from None
    return b"".join(parts)


async def wait_for(request: Request, future: Any) -> Any:
    """The worker's answer. What nobody waits for any more is not computed. Raises Refusal."""
    answer = asyncio.wrap_future(future)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise Refusal(400, "the client went away", CLOSE)
        return answer.result()
    finally:
        gone.cancel()
        answer.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
