"""Requests to one or several replicas of a server."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from json import dumps
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from understudy.errors import EngineError
from understudy.http.address import check_address, clip, read_key
from understudy.http.background import SCOPE, Background, Closed, Line, Scope, Stopped
from understudy.http.replicas import Asker, Replica, Replicas, Turn
from understudy.http.reply import (
    MAX_WAIT_S,
    BadReply,
    Refused,
    Reply,
    Trouble,
    asked_to_wait_s,
    check_size,
    is_alive,
    message_of,
    not_there,
    passes,
    read_body,
)
from understudy.randomness import keyed_uniform

if TYPE_CHECKING:
    import httpx

Item = TypeVar("Item")
Result = TypeVar("Result")

_GRACE_S = 10.0
"""Beyond its deadline, for a request to say that it has passed."""
MAX_REPLY_BYTES = 4 * 2**30
"""Of one reply, where nobody knows better: several heads of the largest vocabularies."""
MAX_ERROR_BYTES = 2**20
"""Of what a server says beside a status that is an error; no more is read."""
PROBE_S = 5.0
"""How long a replica that was left alone may take to say that it is there."""
_LOOPBACK = ("all://127.0.0.1", "all://localhost", "all://[::1]")


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How long and how often is asked."""

    timeout_s: float = 120.0
    """Of one attempt."""
    deadline_s: float = 600.0
    """Of one request with all its attempts and waits."""
    max_retries: int = 5
    """Of a request that timed out, lost its connection, met status 500 and above, or got a wrong reply; 0: asked once."""
    backoff_s: float = 0.5
    """Before the first retry; doubled with each, up to a minute, with jitter."""
    max_concurrency: int = 16
    """Requests in flight over all replicas."""
    break_after: int = 3
    """Failures in a row after which a replica is left alone for a while, where there are others."""
    waits: bool = True
    """Whether a server that is not there (nobody listens) or busy (429, 503) is asked until `deadline_s`, because it may be
    starting again; else that counts against `max_retries`."""

    def __post_init__(self) -> None:
        for key, low in (("max_retries", 0), ("max_concurrency", 1), ("break_after", 1)):
            if getattr(self, key) < low:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least {low}")
        if not (0 < self.timeout_s < math.inf and 0 < self.deadline_s < math.inf and 0 <= self.backoff_s < math.inf):
            raise ValueError("timeout_s and deadline_s must be above 0, and backoff_s at least 0")

    @staticmethod
    def of(section: object) -> RetryPolicy:
        """With the keys that a section of a recipe has of it."""
        known = [item.name for item in fields(RetryPolicy)]
        return RetryPolicy(**{name: getattr(section, name) for name in known if hasattr(section, name)})

    def wait_s(self, seed: int, key: str, attempt: int) -> float:
        """Between half of and the whole of `backoff_s * 2^(attempt - 1)`, so that many requests do not return at once."""
        uniform = float(keyed_uniform(seed, "retry", attempt, [key], 1))
        full: float = self.backoff_s * 2.0 ** min(attempt - 1, 60)
        return min(MAX_WAIT_S, full) * (0.5 + uniform / 2)


@dataclass(frozen=True)
class _Question:
    """One request, the same at each attempt."""

    key: str
    method: str
    path: str
    content: bytes
    content_type: str
    end: float
    """Of its deadline, by `time.monotonic`."""
    asker: Asker

    @property
    def left_s(self) -> float:
        return self.end - time.monotonic()


class _Late(Exception):  # noqa: N818 (never leaves this module)
    """The deadline would pass before anything can be sent."""


class HttpClient:
    """Replicas of one server behind one front: connections are kept, and closed by `close`.

    Any thread may ask. A closed client raises EngineError. No object holds the key: it is read for each attempt, and cut from
    all that is said.
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
        probe_path: str = "/health",
    ) -> None:
        """`probe_path`: what a replica that was left alone is asked before it gets requests again."""
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
        self._probe_path = probe_path
        self._replicas = Replicas(
            self.urls, break_after=retry_policy.break_after, cool_down_s=retry_policy.backoff_s, clock=time.monotonic
        )
        self._background = Background(name, self._make_line)

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
        """`read` of the reply of the first replica that gives a right one; `replica` asks that one only.

        `read` runs in the calling thread, and raises BadReply for what may be right another time. `key` names the request, and
        draws its waits. Raises Refused for a status that stays, EngineError where attempts or time are spent.
        """
        if json is not None:
            content = dumps(json).encode("ascii")
        kind = "application/octet-stream" if json is None else "application/json"
        end = time.monotonic() + self._retry_policy.deadline_s
        question = _Question(key, method, path, content or b"", kind, end, Asker(replica))
        trouble = Trouble("nothing was sent: all places were taken")
        attempt = counted = 0
        while counted <= self._retry_policy.max_retries:
            try:
                outcome = self._attempt(question, attempt)
            except _Late:
                raise self._error(question, trouble, late=True) from None
            if not isinstance(outcome, Trouble):
                turn = question.asker.turns[-1]
                try:
                    result = read(outcome)
                    self._replicas.settle(turn, right=True)
                    return result
                except BadReply as error:
                    self._replicas.settle(turn, right=False)
                    outcome = Trouble(str(error))
                finally:
                    self._replicas.settle(turn, right=None)
            trouble = outcome
            attempt += 1
            counted += trouble.counts or not (self._retry_policy.waits and self._retry_policy.max_retries)
        raise self._error(question, trouble, late=question.left_s <= 0)

    def _attempt(self, question: _Question, attempt: int) -> Reply | Trouble:
        """Raises Refused, and _Late where the deadline comes first."""
        pause_s = self._retry_policy.wait_s(self._seed, question.key, attempt) if attempt else 0.0
        if question.left_s <= pause_s:
            raise _Late
        turns = question.asker.turns
        try:
            outcome = self._background.run(
                lambda line: self._in_turn(line, question, pause_s), within_s=question.left_s + _GRACE_S
            )
        except BaseException as error:
            # a reply may have come in the moment in which it was given up
            if turns:
                self._replicas.settle(turns[-1], right=None)
            if isinstance(error, Closed):
                raise EngineError(f"{self.name} is closed: nothing more can be asked of it") from None
            if isinstance(error, TimeoutError):
                raise _Late from None
            raise
        if isinstance(outcome, Refused):
            raise outcome
        return outcome

    async def _in_turn(self, line: Line, question: _Question, pause_s: float) -> Reply | Refused | Trouble:
        turn = await self._turn(line, question, pause_s)
        try:
            outcome = await self._send(line, question, turn)
        except BaseException:
            self._replicas.settle(turn, right=None)
            raise
        finally:
            line.slots.release()
            self._replicas.arrive(turn, sent=len(question.content), received=turn.received)
        if isinstance(outcome, Trouble):
            self._replicas.settle(turn, right=False)
            question.asker.not_before[turn.replica.url] = time.monotonic() + outcome.wait_s
        elif isinstance(outcome, Refused):
            self._replicas.settle(turn, right=True)
        return outcome

    async def _turn(self, line: Line, question: _Question, pause_s: float) -> Turn:
        """Returns with a place in `line.slots`, which the caller releases. Raises _Late."""
        try:
            async with asyncio.timeout(question.left_s):
                await asyncio.sleep(pause_s)
                while True:
                    await line.slots.acquire()
                    for replica in self._replicas.due():
                        line.start(self._probe(line, replica))
                    found = self._replicas.take(question.asker)
                    if isinstance(found, Turn):
                        return found
                    line.slots.release()
                    if found >= question.left_s:
                        raise _Late
                    await asyncio.sleep(found)
        except TimeoutError:
            raise _Late from None

    async def _send(self, line: Line, question: _Question, turn: Turn) -> Reply | Refused | Trouble:
        import httpx

        seconds = max(0.0, min(self._retry_policy.timeout_s, question.left_s))
        try:
            async with asyncio.timeout(seconds):
                reply = await self._exchange(line.client, question, turn)
        except TimeoutError:
            return Trouble(f"nothing came within {seconds:.3g} s")
        except BadReply as error:
            return Trouble(f"{turn.replica.url} sent {error}")
        except httpx.RequestError as error:
            return Trouble(self._clip(f"{type(error).__name__} {error}"), counts=not not_there(error))
        if reply.is_success:
            return reply
        message = self._clip(message_of(reply))
        if passes(reply.status):
            return Trouble(f"status {reply.status}: {message}", asked_to_wait_s(reply), counts=not reply.is_busy)
        return Refused(reply.status, message)

    async def _exchange(self, client: httpx.AsyncClient, question: _Question, turn: Turn) -> Reply:
        """Raises BadReply for a body that is too long or compressed: it would be let grow without end."""
        url = turn.replica.url
        headers = self._headers() | {"Content-Type": question.content_type}
        address = f"{url}/{question.path.lstrip('/')}"
        async with client.stream(question.method, address, content=question.content, headers=headers) as response:
            limit = self._max_reply_bytes if response.is_success else MAX_ERROR_BYTES
            if response.is_success:
                check_size(response.headers, limit)
            content = await read_body(response.aiter_raw(), limit, cut=not response.is_success, count=turn.receive)
        return Reply(url, response.status_code, response.headers, content)

    async def _probe(self, line: Line, replica: Replica) -> None:
        """Whether a replica that was left alone is there again."""
        alive: bool | None = None
        try:
            async with asyncio.timeout(PROBE_S):
                address = f"{replica.url}/{self._probe_path.lstrip('/')}"
                async with line.client.stream("GET", address, headers=self._headers()) as response:
                    alive = is_alive(response.status_code)
        except Exception:  # a task that fails has nobody to tell
            alive = False
        finally:
            self._replicas.probed(replica, alive=alive)

    def _headers(self) -> dict[str, str]:
        key = read_key(self._api_key_env)
        return {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def _make_line(self) -> Line:
        import httpx

        slots = self._retry_policy.max_concurrency
        client = httpx.AsyncClient(
            timeout=None,  # noqa: S113 (each attempt has one as a whole)
            # a probe waits for no request
            limits=httpx.Limits(max_connections=slots + len(self.urls), max_keepalive_connections=slots),
            # no proxy of the environment leads to this machine
            mounts=dict.fromkeys(_LOOPBACK),
            # certificates take a while to read
            verify=any(url.lower().startswith("https:") for url in self.urls),
        )
        return Line(client, slots)

    def _clip(self, text: str) -> str:
        return clip(text, self._api_key_env)

    def _error(self, question: _Question, trouble: Trouble, *, late: bool) -> EngineError:
        attempts = len(question.asker.turns)
        counted = f"{attempts} attempt{'s' * (attempts != 1)}"
        within = f" within deadline_s = {self._retry_policy.deadline_s:g}" if late else ""
        return EngineError(
            f"{self.name} ({', '.join(question.asker.urls or self.urls)}) gave no answer to {self._clip(question.key)} in "
            f"{counted}{within}, the last time: {self._clip(trouble.text)}; check that the server is up, lower "
            "max_concurrency, or raise timeout_s, deadline_s or max_retries"
        )

    def each(self, items: Sequence[Item], ask: Callable[[Item], Result]) -> list[Result]:
        """Results in the order of the items, `max_concurrency` asked at a time; the first error stops the rest."""
        if not items:
            return []
        outer, scope = SCOPE.get(), Scope()
        if outer is not None:
            outer.add(scope)

        # appended to before the others are stopped, so that what is raised is the cause
        first: list[BaseException] = []

        def run(item: Item) -> Result:
            SCOPE.set(scope)
            if scope.stopped:
                raise Stopped
            try:
                return ask(item)
            except BaseException as error:
                first.append(error)
                # here, not where results are gathered: this worker would begin the next item first
                scope.cancel()
                raise

        pool = ThreadPoolExecutor(min(self._retry_policy.max_concurrency, len(items)), thread_name_prefix=self.name)
        try:
            futures = [pool.submit(run, item) for item in items]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            errors = [error for future in futures if future in done and (error := future.exception()) is not None]
            if first or errors:
                raise (first or errors)[0]
            return [future.result() for future in futures]
        finally:
            scope.cancel()
            pool.shutdown(wait=True, cancel_futures=True)
            if outer is not None:
                outer.remove(scope)

    def stats(self) -> dict[str, Any]:
        """HTTP requests (no probes), retries and failures among them, bytes of bodies sent and received; "replicas": by url."""
        return self._replicas.stats()

    def close(self) -> None:
        """Gives up what is in flight and leaves no thread and no connection."""
        self._background.close()
