"""The HTTP client: concurrent requests to one or several replicas of a server, with retries and deadlines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from json import dumps
from typing import TYPE_CHECKING, Any, TypeVar

from understudy.errors import EngineError, check_range
from understudy.http.background import SCOPE, Background, Closed, Scope, Stopped
from understudy.http.replicas import Attempts, Permit, Replica, Replicas
from understudy.http.replies import (
    MAX_WAIT_S,
    BadReply,
    Failure,
    Refused,
    Reply,
    check_address,
    clip,
    is_unreachable,
    read_key,
)
from understudy.randomness import keyed_uniform

if TYPE_CHECKING:
    import httpx

Item = TypeVar("Item")
Result = TypeVar("Result")

_GRACE_S = 10.0
"""Time beyond its deadline for the loop to report that a request is late."""
MAX_REPLY_BYTES = 4 * 2**30
"""Default limit of one reply: the largest head of a large vocabulary fits several times."""
MAX_ERROR_BYTES = 2**20
"""Maximum length of an error status's message; the rest is cut off."""
PROBE_S = 5.0
"""Timeout of a health probe."""


@dataclass(frozen=True, kw_only=True)
class RetryOptions:
    """Timeouts and retries, as the sections of remote teachers have them."""

    timeout_s: float = 120.0
    """Seconds for one attempt."""
    deadline_s: float = 600.0
    """Seconds for one request with all its attempts and waits."""
    max_retries: int = 5
    """Retries after a timeout, a lost connection, status 500 and above, or a malformed reply; 0: asked once."""
    backoff_s: float = 0.5
    """Wait before the first retry; doubled with each, up to a minute, with jitter."""
    max_concurrency: int = 16
    """Requests in flight over all replicas."""

    @property
    def retry_policy(self) -> RetryPolicy:
        """Raises ValueError for a value out of range."""
        names = [item.name for item in fields(RetryPolicy)]
        return RetryPolicy(**{name: getattr(self, name) for name in names if hasattr(self, name)})


@dataclass(frozen=True, kw_only=True)
class RetryPolicy(RetryOptions):
    """A client's timeouts, retries and concurrency."""

    break_after: int = 3
    """Consecutive failures after which a replica is left alone for a while, if there are others."""
    waits: bool = True
    """Whether to retry an unreachable or busy (429, 503) server until `deadline_s`, as it may be
    restarting; otherwise these count against `max_retries`."""

    def __post_init__(self) -> None:
        check_range(self, 0, "max_retries", "backoff_s")
        check_range(self, 1, "max_concurrency")
        check_range(self, 1, "break_after", off="a large number leaves no replica alone")
        check_range(self, 0, "timeout_s", "deadline_s", above=True, off="a large number waits as long")

    def wait_s(self, seed: int, key: str, attempt: int) -> float:
        """Returns 50 to 100 % of `backoff_s * 2^(attempt - 1)`: jitter keeps many requests from returning at once."""
        uniform = float(keyed_uniform(seed, "retry", attempt, [key], 1))
        full: float = self.backoff_s * 2.0 ** min(attempt - 1, 60)
        return min(MAX_WAIT_S, full) * (0.5 + uniform / 2)


@dataclass(frozen=True)
class _Request:
    """One request, the same at each attempt."""

    key: str
    method: str
    path: str
    content: bytes
    content_type: str
    deadline: float
    """On the clock of `time.monotonic`."""
    attempts: Attempts

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()


class HttpClient:
    """Replicas of one server behind one interface. Any thread may ask; `close` ends all connections.

    A closed client raises EngineError. No object holds the key: it is read for each attempt, and cut from all messages.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        name: str,
        retry_policy: RetryPolicy,
        api_key_env: str = "",
        seed: int = 0,
        max_reply_bytes: int = MAX_REPLY_BYTES,
    ) -> None:
        if not urls:
            raise ValueError(f"{name} has no address")
        for url in urls:
            check_address(url, f"the address of {name}")
        self.name = name
        self.urls = tuple(dict.fromkeys(url.rstrip("/") for url in urls))
        self._retry_policy = retry_policy
        self._api_key_env = api_key_env
        self._seed = seed
        self._max_reply_bytes = max_reply_bytes
        self._replicas = Replicas(
            self.urls, break_after=retry_policy.break_after, cool_down_s=retry_policy.backoff_s, clock=time.monotonic
        )
        self._background = Background(name, self._make_client, retry_policy.max_concurrency)

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels requests in flight; leaves no thread and no connection."""
        self._background.close()

    def stats(self) -> dict[str, Any]:
        """HTTP requests without probes, retries and failures among them, bytes of bodies; "replicas": the same by URL."""
        return self._replicas.stats()

    def request(
        self,
        path: str,
        read: Callable[[Reply], Result],
        *,
        key: str,
        json: Any = None,
        content: bytes | None = None,
        method: str = "POST",
        replica: int | None = None,
    ) -> Result:
        """Returns `read` of the first valid reply; `replica` asks only that one.

        `read` runs in the calling thread, and raises BadReply for a reply that a retry may improve. `key` names the request
        in messages and draws its waits. Raises Refused for a status that a retry does not change, EngineError where attempts
        or time are spent.
        """
        if json is not None:
            content = dumps(json).encode("ascii")
        kind = "application/octet-stream" if json is None else "application/json"
        deadline = time.monotonic() + self._retry_policy.deadline_s
        request = _Request(key, method, path, content or b"", kind, deadline, Attempts(replica))
        permits = request.attempts.permits
        failure = Failure("nothing was sent: all places were taken")
        attempt = counted = 0
        while counted <= self._retry_policy.max_retries:
            pause_s = self._retry_policy.wait_s(self._seed, key, attempt) if attempt else 0.0
            try:
                outcome = self._run(request, pause_s)
            except TimeoutError:
                raise self._error(request, failure, late=True) from None
            if isinstance(outcome, Refused):
                raise outcome
            if isinstance(outcome, Reply):
                try:
                    result = read(outcome)
                    self._replicas.settle(permits[-1], right=True)
                    return result
                except BadReply as error:
                    self._replicas.settle(permits[-1], right=False)
                    outcome = Failure(str(error))
                finally:
                    self._replicas.settle(permits[-1], right=None)
            failure = outcome
            attempt += 1
            counted += failure.counts or not (self._retry_policy.waits and self._retry_policy.max_retries)
        raise self._error(request, failure, late=request.left_s <= 0)

    def _run(self, request: _Request, pause_s: float) -> Reply | Refused | Failure:
        """One attempt, from the calling thread. Raises TimeoutError if the deadline comes first."""
        if request.left_s <= pause_s:
            raise TimeoutError
        try:
            return self._background.run(lambda: self._attempt(request, pause_s), within_s=request.left_s + _GRACE_S)
        except BaseException as error:
            # a reply may have come in the moment of the cancellation, and its permit is still open then
            if request.attempts.permits:
                self._replicas.settle(request.attempts.permits[-1], right=None)
            if isinstance(error, Closed):
                raise EngineError(f"{self.name} is closed: nothing more can be asked of it") from None
            raise

    async def _attempt(self, request: _Request, pause_s: float) -> Reply | Refused | Failure:
        permit = await self._acquire(request, pause_s)
        try:
            outcome = await self._send(request, permit)
        except BaseException:
            self._replicas.settle(permit, right=None)
            raise
        finally:
            self._background.slots.release()
            self._replicas.release(permit, sent=len(request.content))
        if isinstance(outcome, Failure):
            self._replicas.settle(permit, right=False)
            request.attempts.not_before[permit.replica.url] = time.monotonic() + outcome.wait_s
        elif isinstance(outcome, Refused):
            self._replicas.settle(permit, right=True)
        return outcome

    async def _acquire(self, request: _Request, pause_s: float) -> Permit:
        """Returns with one of the background's slots, which the caller releases. Raises TimeoutError at the deadline."""
        slots = self._background.slots
        async with asyncio.timeout(request.left_s):
            await asyncio.sleep(pause_s)
            while True:
                await slots.acquire()
                for replica in self._replicas.due_for_probe():
                    self._background.spawn(self._probe(replica))
                found = self._replicas.acquire(request.attempts)
                if isinstance(found, Permit):
                    return found
                slots.release()
                if found >= request.left_s:
                    raise TimeoutError
                await asyncio.sleep(found)

    async def _send(self, request: _Request, permit: Permit) -> Reply | Refused | Failure:
        """A body that is too long or compressed is a failure; an error's body is cut instead."""
        import httpx

        url = permit.replica.url
        timeout_s = max(0.0, min(self._retry_policy.timeout_s, request.left_s))
        parts = []
        try:
            # one limit for the whole exchange: httpx's own are for each read, which a slow server never exceeds
            async with (
                asyncio.timeout(timeout_s),
                self._background.client.stream(
                    request.method,
                    f"{url}/{request.path.lstrip('/')}",
                    content=request.content,
                    headers=self._headers() | {"Content-Type": request.content_type},
                ) as response,
            ):
                headers, right = response.headers, response.is_success
                limit = self._max_reply_bytes if right else MAX_ERROR_BYTES
                coding = headers.get("content-encoding", "identity").strip().lower()
                if right and coding not in ("", "identity"):
                    return Failure(f"{url} sent a body compressed with {coding[:20]}, although the request forbids it")
                announced = headers.get("content-length", "")
                size = int(announced[:20]) if announced.isascii() and announced.isdigit() else 0
                if not right or size <= limit:
                    # raw: decompression would let a small body grow without end
                    async for part in response.aiter_raw():
                        permit.received += len(part)
                        parts.append(part)
                        size = max(size, permit.received)
                        if permit.received > limit:
                            break
                if right and size > limit:
                    return Failure(f"{url} sent a reply of more than {limit:,} bytes, the most that are read")
        except TimeoutError:
            return Failure(f"nothing came within {timeout_s:.3g} s")
        except httpx.RequestError as error:
            text = clip(f"{type(error).__name__} {error}")
            return Failure(text, counts=not is_unreachable(error))
        return Reply(url, response.status_code, headers, b"".join(parts)[:limit]).outcome()

    async def _probe(self, replica: Replica) -> None:
        """Asks a replica that was left alone for its health; any status below 500 will do, as many servers lack the path."""
        alive: bool | None = None
        try:
            async with asyncio.timeout(PROBE_S):
                address = f"{replica.url}/health"
                async with self._background.client.stream("GET", address, headers=self._headers()) as response:
                    alive = response.status_code < 500 or response.status_code == 501
        except Exception:  # nobody awaits this task, so an error would only be logged
            alive = False
        finally:
            self._replicas.record_probe(replica, alive=alive)

    def _headers(self) -> dict[str, str]:
        key = read_key(self._api_key_env)
        return {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def _make_client(self) -> httpx.AsyncClient:
        import httpx

        slots = self._retry_policy.max_concurrency
        return httpx.AsyncClient(
            timeout=None,  # noqa: S113 (`_send` limits each attempt as a whole)
            # probes need connections of their own, so that they wait for no request
            limits=httpx.Limits(max_connections=slots + len(self.urls), max_keepalive_connections=slots),
            # loopback addresses never use the environment's proxy
            mounts=dict.fromkeys(("all://127.0.0.1", "all://localhost", "all://[::1]")),
            # certificates take a while to read, and plain http needs none
            verify=any(url.lower().startswith("https:") for url in self.urls),
        )

    def _error(self, request: _Request, failure: Failure, *, late: bool) -> EngineError:
        num = len(request.attempts.permits)
        within = f" within deadline_s = {self._retry_policy.deadline_s:g}" if late else ""
        return EngineError(
            f"{self.name} ({', '.join(request.attempts.urls or self.urls)}) gave no answer to "
            f"{clip(request.key)} in {num} attempt{'s' * (num != 1)}{within}, the last time: "
            f"{clip(failure.text)}; check that the server is up, lower max_concurrency, or raise "
            "timeout_s, deadline_s or max_retries"
        )

    def each(self, items: Sequence[Item], ask: Callable[[Item], Result]) -> list[Result]:
        """Returns results in the order of the items, `max_concurrency` at a time; the first error cancels the rest."""
        if not items:
            return []
        outer, scope = SCOPE.get(), Scope()
        if outer is not None:
            outer.add(scope)
        errors: list[BaseException] = []

        def run(item: Item) -> Result:
            SCOPE.set(scope)
            try:
                if scope.stopped:
                    raise Stopped
                return ask(item)
            except BaseException as error:
                # in this order, so that the first error is the cause and not one that it cancelled; and here, not where
                # results are gathered, because this worker would begin the next item first
                errors.append(error)
                scope.cancel()
                raise

        pool = ThreadPoolExecutor(min(self._retry_policy.max_concurrency, len(items)), thread_name_prefix=self.name)
        try:
            futures = [pool.submit(run, item) for item in items]
            wait(futures, return_when=FIRST_EXCEPTION)
            if errors:
                raise errors[0]
            return [future.result() for future in futures]
        finally:
            scope.cancel()
            pool.shutdown(wait=True, cancel_futures=True)
            if outer is not None:
                outer.remove(scope)
