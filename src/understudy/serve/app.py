"""The routes of a served teacher."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from understudy.teachers.frames import ABOUT, CONTENT_TYPE, HEAD, SCORE, About, Ask, FrameError

from .scorer import Refusal, Scorer
from .worker import DEAD, Worker

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

HEALTH = "/health"
BODY_S = 120.0
"""How long a body may take to arrive."""
CLOSE = {"Connection": "close"}
"""What is left of a body that is not read would be taken for the next request."""


def build_app(scorer: Scorer, worker: Worker, about: About, *, token: str) -> Starlette:
    """The application; `token` empty: anyone who reaches it may ask."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    expected = f"Bearer {token}".encode()

    def guarded(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def route(request: Request) -> Response:
            said = request.headers.get("authorization", "").encode()
            if token and not hmac.compare_digest(said, expected):
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

    async def head(request: Request) -> Response:
        return Response(await asyncio.to_thread(scorer.head), media_type=CONTENT_TYPE)

    async def score(request: Request) -> Response:
        body = await read_body(request, about.limits.request_bytes)
        try:
            ask = Ask.decode(body)
        except FrameError as error:
            raise Refusal(400, str(error)) from error
        answer = await wait_for(request, worker.submit(ask))
        return Response(await asyncio.to_thread(answer.encode), media_type=CONTENT_TYPE)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refused(Refusal(error.status_code, str(error.detail), error.headers))

    async def on_error(request: Request, error: Exception) -> Response:
        # the text of an unexpected error may hold what a client must not see
        return refused(Refusal(500, f"the teacher failed ({type(error).__name__}); its log says more"))

    return Starlette(
        routes=[
            Route(HEALTH, health),
            Route(ABOUT, guarded(teacher)),
            Route(HEAD, guarded(head)),
            Route(SCORE, guarded(score), methods=["POST"]),
        ],
        exception_handlers={HTTPException: on_http_error, Exception: on_error},
    )


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
