"""The HTTP client: what may pass is tried again elsewhere and later, what stays ends at once, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gzip
import json
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.errors import EngineError, RecipeError
from understudy.http import client as http_client
from understudy.http.client import MAX_ERROR_BYTES, HttpClient, RetryPolicy
from understudy.http.replicas import Attempts, Permit, Replicas
from understudy.http.replies import MAX_WAIT_S, BadReply, Refused, Reply

pytestmark = pytest.mark.slow

KEY = "sk-understudy-0123456789"
WAIT_S = 20.0
"""For what a test waits on; it passes long before."""


@dataclass(frozen=True)
class Says:
    """What the server sends. `claims`: Content-Length, where it is not that of the body."""

    body: bytes = b"{}"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    claims: int | None = None
    chunked: bool = False
    resets: bool = False


@dataclass(frozen=True)
class Asked:
    """What a client asked."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


class Server:
    """On loopback, inside a `with`. `answer`: from a request and how many came before it to what is said."""

    def __init__(self, answer: Callable[[Asked, int], Says], port: int = 0) -> None:
        self.asked: list[Asked] = []
        self.peers: set[int] = set()
        """Ports of the connections."""
        lock, asked, peers = Lock(), self.asked, self.peers

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # a header and a body written apart would wait 40 ms for each other
            disable_nagle_algorithm = True
            timeout = WAIT_S

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                with lock:
                    before = len(asked)
                    asked.append(Asked(self.command, self.path, dict(self.headers), body))
                    peers.add(self.client_address[1])
                try:
                    self.say(answer(asked[before], before))
                except OSError:
                    self.close_connection = True

            do_GET = do_POST  # noqa: N815

            def say(self, said: Says) -> None:
                if said.resets:
                    # closing with nothing to linger for sends a reset
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    raise ConnectionResetError
                self.send_response(said.status)
                for name, value in said.headers.items():
                    self.send_header(name, value)
                if said.chunked:
                    self.send_header("Transfer-Encoding", "chunked")
                else:
                    self.send_header("Content-Length", str(len(said.body) if said.claims is None else said.claims))
                self.end_headers()
                if said.chunked:
                    for at in range(0, len(said.body), 1_000):
                        part = said.body[at : at + 1_000]
                        self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
                    self.wfile.write(b"0\r\n\r\n")
                else:
                    self.wfile.write(said.body)
                self.close_connection = said.claims is not None

            def log_message(self, *_: object) -> None:
                """Silent."""

        class Http(ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """Silent."""

        self._server = Http(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Server:
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


FAIR = Says(b'{"n": 1}')


def number(reply: Reply) -> int:
    found = reply.json()
    if not isinstance(found, dict) or "n" not in found:
        raise BadReply("no number")
    return int(found["n"])


def echo(asked: Asked, _: int = 0) -> Says:
    return Says(asked.body)


@contextmanager
def wired(*answers: Callable[[Asked, int], Says], name: str = "teacher", env: str = "", **keys: Any) -> Iterator[Any]:
    """A client to one server for each answer."""
    retry_policy = RetryPolicy(**({"backoff_s": 0.001, "timeout_s": WAIT_S, "deadline_s": 3 * WAIT_S} | keys))
    with ExitStack() as stack:
        servers = [stack.enter_context(Server(answer)) for answer in answers]
        urls = [server.url for server in servers]
        yield stack.enter_context(HttpClient(urls, name=name, retry_policy=retry_policy, api_key_env=env)), servers


@pytest.fixture
def refusing() -> Iterator[Callable[[], str]]:
    """Addresses that refuse: their ports are taken, and nobody listens."""
    with ExitStack() as stack:

        def address() -> str:
            one = stack.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            return f"http://127.0.0.1:{one.getsockname()[1]}"

        yield address


def wires() -> list[Thread]:
    """Threads of wires, of their workers and of what looks up names."""
    return [one for one in threading.enumerate() if one.name.startswith(("client-", "teacher", "asyncio"))]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = wires()
    yield
    assert [one for one in wires() if one not in before] == []


# --- one server --------------------------------------------------------------------------------------------------------


def test_a_request_says_what_it_was_told_to_say() -> None:
    with wired(echo) as (client, (server,)):
        assert client.request("/a/b", Reply.json, key="k", json={"n": [1, "é"]}) == {"n": [1, "é"]}
        assert client.request("c", lambda reply: reply.content, key="k", content=b"\x00\xff") == b"\x00\xff"
        assert client.request("/health", lambda reply: reply.url, key="k", method="GET") == server.url
        assert [(one.method, one.path) for one in server.asked] == [
            ("POST", "/a/b"),
            ("POST", "/c"),
            ("GET", "/health"),
        ]
        kinds = [one.headers["Content-Type"] for one in server.asked]
        assert kinds[:2] == ["application/json", "application/octet-stream"]


def test_connections_are_kept() -> None:
    with wired(echo) as (client, (server,)):
        for i in range(8):
            client.request("/", number, key=str(i), json={"n": i})
        assert len(server.peers) == 1


PASSING = {
    **{str(status): Says(b'{"error": {"message": "later"}}', status) for status in (408, 409, 425, 429, 500, 503, 599)},
    "half a body": Says(b'{"n": ', claims=99),
    "nothing of a body": Says(b"", claims=99),
    "reset": Says(resets=True),
    "no JSON": Says(b'{"n": 1'),
    "no UTF-8": Says(b"\xff\xfe\x00"),
    "wrong content": Says(b'{"m": 1}'),
    "nested beyond measure": Says(b"[" * 100_000),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_tried_again(name: str) -> None:
    with wired(lambda _, before: PASSING[name] if before < 2 else FAIR) as (client, (server,)):
        assert client.request("/x", number, key="k", json={"n": 0}) == 1
        assert len(server.asked) == 3
        assert {one.body for one in server.asked} == {b'{"n": 0}'}
        found = client.stats()
        assert (found["requests"], found["retries"], found["failures"]) == (3, 2, 2)


WAITED_FOR = ("429", "503")


@pytest.mark.parametrize("name", [name for name in PASSING if name not in WAITED_FOR])
def test_what_does_not_pass_ends_with_all_that_is_known(name: str) -> None:
    with wired(lambda *_: PASSING[name], max_retries=2) as (client, (server,)):
        with pytest.raises(EngineError, match="3 attempts") as caught:
            client.request("/x", number, key="sample-7", json={})
        assert all(text in str(caught.value) for text in ("teacher", server.url, "sample-7", "max_retries"))
        assert len(server.asked) == 3


@pytest.mark.parametrize("name", WAITED_FOR)
def test_a_busy_server_is_asked_until_the_deadline(name: str) -> None:
    """However few retries there are; other failures between count alone."""
    with wired(lambda _, before: PASSING[name] if before < 30 else FAIR, max_retries=1, backoff_s=1e-12) as (client, _):
        assert client.request("/x", number, key="k") == 1
        assert client.stats()["retries"] == 30
    with (
        wired(lambda *_: PASSING[name], max_retries=1, deadline_s=0.3) as (client, _),
        pytest.raises(EngineError, match="within deadline_s = 0.3"),
    ):
        client.request("/x", number, key="k")
    mixed = [PASSING[name], Says(b"down", 500)]
    with (
        wired(lambda _, before: mixed[before % 2], max_retries=2) as (client, (server,)),
        pytest.raises(EngineError, match="6 attempts, the last time: status 500"),
    ):
        client.request("/x", number, key="k")
    for keys in ({"waits": False, "max_retries": 2}, {"max_retries": 0}):
        with wired(lambda *_: PASSING[name], **keys) as (client, (server,)), pytest.raises(EngineError):
            client.request("/x", number, key="k")
        assert len(server.asked) == keys["max_retries"] + 1


def test_a_server_that_restarts_is_waited_for() -> None:
    """For longer than its retries would last; nobody listens meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    retry_policy = RetryPolicy(max_retries=1, backoff_s=1e-4, deadline_s=WAIT_S)
    with HttpClient([f"http://127.0.0.1:{port}"], name="teacher", retry_policy=retry_policy) as client:
        found: list[int] = []
        asks = Thread(target=lambda: found.append(client.request("/x", number, key="k")), name="teacher-asks")
        asks.start()
        try:
            pause = Event()
            for _ in range(int(WAIT_S / 0.01)):
                if client.stats()["requests"] > 5:
                    break
                pause.wait(0.01)
            with Server(lambda *_: FAIR, port=port) as server:
                asks.join(WAIT_S)
                assert found == [1]
                assert len(server.asked) == 1
        finally:
            client.close()
            asks.join(WAIT_S)


def test_a_certificate_is_not_waited_for() -> None:
    """It stays what it is: a server that does not speak TLS is no server that is not there yet."""
    with wired(echo) as (_, (server,)):
        url = server.url.replace("http:", "https:")
        retry_policy = RetryPolicy(max_retries=1, backoff_s=0.001, deadline_s=WAIT_S)
        with (
            HttpClient([url], name="teacher", retry_policy=retry_policy) as client,
            pytest.raises(EngineError, match="2 attempts, "),
        ):
            client.request("/x", number, key="k")


# --- how much is read


@pytest.mark.parametrize("claims", [True, False])
def test_a_reply_beyond_the_limit_is_not_read(claims: bool) -> None:
    """Announced or in chunks without a length: what came is counted, and no more comes."""
    sent = bytes(50_000_000)
    with Server(lambda *_: Says(sent, chunked=not claims)) as server:
        retry_policy = RetryPolicy(max_retries=1, backoff_s=0.001, timeout_s=WAIT_S)
        with HttpClient([server.url], name="teacher", retry_policy=retry_policy, max_reply_bytes=1_000) as client:
            with pytest.raises(EngineError, match=r"2 attempts.*more than 1,000 bytes") as caught:
                client.request("/x", number, key="k")
            assert server.url in str(caught.value)
            received = client.stats()["bytes_received"]
            assert received == 0 if claims else 1_000 < received < len(sent)
    fits = Says(json.dumps({"n": 1, "more": "x" * 900}).encode(), chunked=not claims)
    with Server(lambda *_: fits) as server:
        retry_policy = RetryPolicy(max_retries=0)
        with HttpClient([server.url], name="t", retry_policy=retry_policy, max_reply_bytes=len(fits.body)) as client:
            assert client.request("/x", number, key="k") == 1
            assert client.stats()["bytes_received"] == len(fits.body)


def test_nothing_is_unpacked() -> None:
    bomb = gzip.compress(bytes(10_000_000))
    with wired(lambda *_: Says(bomb, headers={"Content-Encoding": "gzip"}), max_retries=0) as (client, (server,)):
        with pytest.raises(EngineError, match="compressed with gzip"):
            client.request("/x", number, key="k")
        assert server.asked[0].headers["Accept-Encoding"] == "identity"


def test_of_an_error_the_beginning_is_read() -> None:
    with wired(lambda *_: Says(b"no " * 2_000_000, 404)) as (client, _):
        with pytest.raises(Refused, match="no no"):
            client.request("/x", number, key="k")
        assert 0 < client.stats()["bytes_received"] < 2 * MAX_ERROR_BYTES


def test_half_a_reply_is_counted() -> None:
    with wired(lambda *_: Says(b'{"n": ', claims=99), max_retries=0) as (client, _):
        with pytest.raises(EngineError):
            client.request("/x", number, key="k")
        assert client.stats()["bytes_received"] == 6


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 422])
def test_a_status_that_stays_is_told_at_once(status: int) -> None:
    said = Says(b'{"error": {"message": "no such\\u001b[2J thing"}}', status)
    with wired(lambda *_: said) as (client, (server,)):
        with pytest.raises(Refused) as caught:
            client.request("/x", number, key="k", json={})
        assert (caught.value.status, caught.value.message) == (status, "no such thing")
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": "plain"}', "plain"),
        (b'{"error": {"detail": "deep"}}', "deep"),
        (b'{"message": "flat"}', "flat"),
        (b"<html>\n  busy</html>", "<html> busy</html>"),
        (b"[1]", "[1]"),
        (b'{"error": [1]}', '{"error": [1]}'),
        (b"", "no more is said"),
        (b"x" * 10_000, "x" * 300),
    ],
)
def test_the_reason_is_found_where_servers_write_it(body: bytes, message: str) -> None:
    with wired(lambda *_: Says(body, 400)) as (client, _), pytest.raises(Refused) as caught:
        client.request("/x", number, key="k", json={})
    assert caught.value.message == message


def test_an_error_of_the_reader_is_its_own() -> None:
    def read(reply: Reply) -> int:
        raise ZeroDivisionError

    with wired(echo) as (client, (server,)), pytest.raises(ZeroDivisionError):
        client.request("/x", read, key="k", json={})
    assert len(server.asked) == 1


def test_replies_are_read_by_the_thread_that_asked() -> None:
    with wired(echo) as (client, _):
        assert client.request("/x", lambda _: threading.current_thread(), key="k") is threading.current_thread()


def test_a_server_that_says_nothing_is_given_up_after_timeout_s() -> None:
    free = Event()

    def answer(_: Asked, before: int) -> Says:
        if before == 0:
            free.wait(WAIT_S)
        return FAIR

    with wired(answer, timeout_s=0.1) as (client, (server,)):
        try:
            assert client.request("/x", number, key="k") == 1
            assert len(server.asked) == 2
        finally:
            free.set()


def test_the_deadline_ends_what_the_timeout_would_not() -> None:
    free = Event()

    def answer(*_: object) -> Says:
        free.wait(WAIT_S)
        return FAIR

    with wired(answer, deadline_s=0.2, max_retries=100) as (client, _):
        try:
            with pytest.raises(EngineError, match="1 attempt within deadline_s = 0.2"):
                client.request("/x", number, key="k")
        finally:
            free.set()


def test_a_wait_beyond_the_deadline_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server asks for a minute, a backoff is of a minute, and nobody begins to sleep."""
    sleep, slept = asyncio.sleep, [0.0]

    async def seen(seconds: float) -> None:
        slept.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", seen)
    busy = Says(b"busy", 429, {"Retry-After": "60"})
    with wired(lambda *_: busy, deadline_s=30.0) as (client, (server,)):
        with pytest.raises(EngineError, match="1 attempt within deadline_s = 30.*busy"):
            client.request("/x", number, key="k")
        assert len(server.asked) == 1
    with (
        wired(lambda *_: Says(b"down", 500), backoff_s=120.0, deadline_s=25.0) as (client, _),
        pytest.raises(EngineError, match="1 attempt within deadline_s = 25.*down"),
    ):
        client.request("/x", number, key="k")
    assert max(slept) < 1.0


@pytest.mark.parametrize("header", ["soon", "Wed, 21 Oct 2015 07:28:00 GMT", "-1", "nan", "0.01"])
def test_a_wait_that_is_none_is_the_backoff(header: str) -> None:
    busy = Says(b"", 503, {"Retry-After": header})
    with wired(lambda _, before: FAIR if before else busy) as (client, _):
        assert client.request("/x", number, key="k") == 1


def test_more_requests_than_places_wait_for_one_until_the_deadline() -> None:
    free, entered = Event(), Event()

    def answer(asked: Asked, _: int) -> Says:
        entered.set()
        free.wait(WAIT_S)
        return FAIR

    with wired(answer, max_concurrency=1) as (client, (server,)):
        first = Thread(target=client.request, args=("/x", number), kwargs={"key": "first"}, name="teacher-first")
        first.start()
        try:
            assert entered.wait(WAIT_S)
            client._retry_policy = RetryPolicy(deadline_s=0.1, max_concurrency=1)
            with pytest.raises(EngineError, match="0 attempts within deadline_s = 0.1.*places"):
                client.request("/x", number, key="second")
        finally:
            free.set()
            first.join(WAIT_S)
        assert len(server.asked) == 1


# --- several -----------------------------------------------------------------------------------------------------------


def test_load_is_spread_in_turn() -> None:
    with wired(echo, echo, echo) as (client, servers):
        for i in range(9):
            client.request("/x", number, key=str(i), json={"n": i})
        assert [len(server.asked) for server in servers] == [3, 3, 3]


def test_the_next_goes_where_least_is_in_flight() -> None:
    """One holds its first request: all others go to the other."""
    free, entered = Event(), Event()

    def slow(*_: object) -> Says:
        entered.set()
        free.wait(WAIT_S)
        return FAIR

    with wired(slow, echo) as (client, servers):
        held = Thread(target=client.request, args=("/x", number), kwargs={"key": "held"}, name="teacher-held")
        held.start()
        try:
            assert entered.wait(WAIT_S)
            for i in range(5):
                client.request("/x", number, key=str(i), json={"n": i})
        finally:
            free.set()
            held.join(WAIT_S)
        assert [len(server.asked) for server in servers] == [1, 5]


@pytest.mark.parametrize("name", PASSING)
def test_a_retry_goes_to_another_replica(name: str) -> None:
    """No request is lost, and the sick one is left alone after `break_after` failures."""
    with wired(lambda *_: PASSING[name], echo, break_after=2, backoff_s=0.05, max_retries=1) as (client, (sick, fair)):
        client._replicas._cool_down_s = MAX_WAIT_S
        assert [client.request("/x", number, key=str(i), json={"n": i}) for i in range(8)] == list(range(8))
        assert (len(sick.asked), len(fair.asked)) == (2, 8)


def test_a_replica_that_asks_to_wait_is_not_waited_for_where_there_is_another() -> None:
    busy = Says(b"", 429, {"Retry-After": "60"})
    with wired(lambda *_: busy, echo) as (client, (one, other)):
        assert client.request("/x", number, key="k", json={"n": 3}) == 3
        assert (len(one.asked), len(other.asked)) == (1, 1)


def test_one_replica_that_is_gone_costs_nothing_but_attempts(refusing: Callable[[], str]) -> None:
    with wired(echo) as (_, (server,)):
        retry_policy = RetryPolicy(backoff_s=0.001)
        with HttpClient([refusing(), server.url], name="teacher", retry_policy=retry_policy) as client:
            items = list(range(20))
            assert client.each(items, lambda i: client.request("/x", number, key=str(i), json={"n": i})) == items
        assert len(server.asked) == 20


def test_all_that_are_gone_are_named(refusing: Callable[[], str]) -> None:
    urls = [refusing() for _ in range(3)]
    with (
        HttpClient(urls, name="teacher", retry_policy=RetryPolicy(backoff_s=0.001, waits=False)) as client,
        pytest.raises(EngineError, match="6 attempts") as caught,
    ):
        client.request("/x", number, key="k")
    assert all(url in str(caught.value) for url in urls)
    with (
        HttpClient(urls, name="teacher", retry_policy=RetryPolicy(backoff_s=0.001, deadline_s=0.5)) as client,
        pytest.raises(EngineError, match=r"within deadline_s = 0.5.*ConnectError") as caught,
    ):
        client.request("/x", number, key="k")
    assert all(url in str(caught.value) for url in urls)


def test_when_all_are_open_beyond_the_deadline_it_ends_at_once(refusing: Callable[[], str]) -> None:
    urls = [refusing() for _ in range(2)]
    retry_policy = RetryPolicy(backoff_s=0.001, break_after=1, deadline_s=30.0)
    with HttpClient(urls, name="teacher", retry_policy=retry_policy) as client:
        client._replicas._cool_down_s = MAX_WAIT_S
        with pytest.raises(EngineError, match="2 attempts within") as caught:
            client.request("/x", number, key="k")
        assert all(url in str(caught.value) for url in urls)
        with pytest.raises(EngineError, match="0 attempts within") as caught:
            client.request("/x", number, key="k")
        assert all(url in str(caught.value) for url in urls)


def test_a_pinned_request_asks_one_only() -> None:
    with wired(echo, echo, lambda *_: Says(b"", 500), max_retries=2) as (client, servers):
        found = [client.request("/x", lambda reply: reply.url, key="k", replica=1) for _ in range(4)]
        assert found == [servers[1].url] * 4
        for _ in range(3):
            with pytest.raises(EngineError, match="3 attempts") as caught:
                client.request("/x", number, key="k", replica=2)
            assert servers[0].url not in str(caught.value)
        # beside looks at whether it is well again
        assert [sum(asked.path == "/x" for asked in server.asked) for server in servers] == [0, 4, 9]


def test_a_replica_that_hangs_is_probed_and_holds_up_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for its health until it has one; then it gets requests again."""
    monkeypatch.setattr(http_client, "PROBE_S", WAIT_S)
    free, well = Event(), Event()

    def sick(asked: Asked, _: int) -> Says:
        if not well.is_set():
            free.wait(WAIT_S)
        return FAIR if asked.path != "/health" else Says(b"no such path", 404)

    with ExitStack() as stack:
        stack.callback(free.set)
        one, other = (stack.enter_context(Server(answer)) for answer in (sick, lambda *_: FAIR))
        retry_policy = RetryPolicy(timeout_s=0.2, backoff_s=0.001, break_after=1)
        client = stack.enter_context(HttpClient([one.url, other.url], name="teacher", retry_policy=retry_policy))

        def asked(path: str, when: Callable[[], bool]) -> int:
            for i in range(2_000):
                if when():
                    break
                assert client.request("/x", number, key=str(i)) == 1
            return sum(asked.path == path for asked in one.asked)

        assert asked("/x", lambda: any(asked.path == "/health" for asked in one.asked)) == 1
        for i in range(50):
            assert client.request("/x", number, key=str(i)) == 1
        assert [asked.path for asked in one.asked] == ["/x", "/health"]
        well.set()
        free.set()
        assert asked("/x", lambda: sum(asked.path == "/x" for asked in one.asked) > 3) > 3


# --- the breaker, by a clock that the test moves -----------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def replicas(clock: Clock, num: int = 2, break_after: int = 3) -> Replicas:
    urls = [f"http://r{i}" for i in range(num)]
    return Replicas(urls, break_after=break_after, cool_down_s=1.0, clock=clock)


def ask(one: Replicas, url: str | None = None) -> Permit:
    """A turn of a new request, at one replica; the turns before it are given up."""
    for _ in range(4):
        turn = one.acquire(Attempts())
        assert isinstance(turn, Permit)
        if url in (None, turn.replica.url):
            return turn
        one.release(turn, sent=0)
        one.settle(turn, right=None)
    raise AssertionError(f"{url} is not asked")


def probe(one: Replicas, url: str, alive: bool | None = True) -> None:
    """The one that is due."""
    (replica,) = one.due_for_probe()
    assert replica.url == url
    one.record_probe(replica, alive=alive)


def end(one: Replicas, turn: Permit, right: bool | None) -> None:
    one.release(turn, sent=0)
    one.settle(turn, right=right)


def urls_asked(one: Replicas, num: int = 6) -> Counter[str]:
    found: Counter[str] = Counter()
    for _ in range(num):
        turn = ask(one)
        found[turn.replica.url] += 1
        end(one, turn, None)
    return found


def test_a_breaker_opens_is_tried_and_closes() -> None:
    clock = Clock()
    one = replicas(clock)
    for _ in range(3):
        assert urls_asked(one) == {"http://r0": 3, "http://r1": 3}
        end(one, ask(one, "http://r0"), right=False)
    for cool_down_s in (1, 2, 4, 8, 16, 32, 60, 60):
        assert urls_asked(one) == {"http://r1": 6}
        clock.now += cool_down_s - 1e-3
        assert urls_asked(one) == {"http://r1": 6}
        clock.now += 2e-3
        # a probe comes first, once, and nothing else goes there meanwhile
        assert [replica.url for replica in one.due_for_probe()] == ["http://r0"]
        assert one.due_for_probe() == []
        assert urls_asked(one) == {"http://r1": 6}
        one.record_probe(one._all[0], alive=True)
        trial = ask(one, "http://r0")
        # one trial, however many ask and however busy the others are
        held = [ask(one) for _ in range(3)]
        assert {turn.replica.url for turn in held} == {"http://r1"}
        for turn in held:
            end(one, turn, right=True)
        end(one, trial, right=False)
    clock.now += 61
    probe(one, "http://r0")
    end(one, ask(one, "http://r0"), right=True)
    assert urls_asked(one) == {"http://r0": 3, "http://r1": 3}
    # and needs as many failures as before
    for _ in range(2):
        end(one, ask(one, "http://r0"), right=False)
    assert urls_asked(one) == {"http://r0": 3, "http://r1": 3}


def test_a_replica_whose_probe_fails_gets_no_request() -> None:
    clock = Clock()
    one = replicas(clock, break_after=1)
    end(one, ask(one, "http://r0"), right=False)
    for cool_down_s in (1, 2, 4, 8):
        clock.now += cool_down_s - 1e-3
        assert one.due_for_probe() == []
        clock.now += 2e-3
        probe(one, "http://r0", alive=False)
        assert one.due_for_probe() == []
        assert urls_asked(one) == {"http://r1": 6}
    clock.now += 61
    probe(one, "http://r0", alive=None)
    # a probe that was given up leaves place for another
    probe(one, "http://r0")
    assert ask(one, "http://r0").trial


def test_a_retry_is_another_replicas_whoever_asked_between() -> None:
    one, asker = replicas(Clock()), Attempts()
    first = one.acquire(asker)
    assert isinstance(first, Permit)
    end(one, first, right=False)
    end(one, ask(one), right=True)
    second = one.acquire(asker)
    assert isinstance(second, Permit)
    assert second.replica is not first.replica


def test_the_next_is_the_one_with_the_fewest_in_flight() -> None:
    one = replicas(Clock(), num=3)
    held = [ask(one) for _ in range(6)]
    for turn in held:
        if turn.replica.url == "http://r1":
            end(one, turn, right=True)
    assert [ask(one).replica.url for _ in range(2)] == ["http://r1"] * 2


def test_a_trial_that_was_given_up_leaves_place_for_another() -> None:
    clock = Clock()
    one = replicas(clock, break_after=1)
    end(one, ask(one, "http://r0"), right=False)
    clock.now += 1.5
    probe(one, "http://r0")
    end(one, ask(one, "http://r0"), right=None)
    end(one, ask(one, "http://r0"), right=True)
    assert urls_asked(one) == {"http://r0": 3, "http://r1": 3}


def test_what_was_sent_before_a_breaker_opened_does_not_hold_it_open() -> None:
    clock = Clock()
    one = replicas(clock, break_after=1)
    early = [one.acquire(Attempts(pinned=0)) for _ in range(5)]
    for turn in early:
        assert isinstance(turn, Permit)
        end(one, turn, right=False)
    clock.now += 1.001
    probe(one, "http://r0")
    assert ask(one, "http://r0").trial


def test_a_success_between_failures_keeps_it_closed() -> None:
    one = replicas(Clock())
    for right in [False, False, True] * 5:
        end(one, ask(one, "http://r0"), right=right)
    assert urls_asked(one) == {"http://r0": 3, "http://r1": 3}


def test_when_all_are_open_the_first_to_be_ready_is_waited_for() -> None:
    clock = Clock()
    one = replicas(clock, break_after=1)
    end(one, ask(one, "http://r0"), right=False)
    clock.now = 0.25
    end(one, ask(one, "http://r1"), right=False)
    assert one.acquire(Attempts()) == pytest.approx(0.75)
    clock.now = 1.0
    # all who wait ask it
    assert [ask(one).replica.url for _ in range(3)] == ["http://r0"] * 3


def test_a_single_replica_is_always_asked() -> None:
    one = replicas(Clock(), num=1, break_after=1)
    for _ in range(20):
        end(one, ask(one), right=False)


@given(st.lists(st.sampled_from(["take", "right", "wrong", "unknown", "later"]), max_size=60), st.integers(1, 3))
def test_nothing_is_in_flight_when_all_is_settled(steps: list[str], num: int) -> None:
    clock = Clock()
    one = replicas(clock, num=num, break_after=2)
    held: list[Permit] = []
    for step in steps:
        if step == "take" and isinstance(turn := one.acquire(Attempts()), Permit):
            held.append(turn)
        elif step == "later":
            clock.now += 0.7
        elif held and step != "take":
            end(one, held.pop(0), {"right": True, "wrong": False, "unknown": None}[step])
    assert sum(replica.in_flight for replica in one._all) == len(held)
    for turn in held:
        end(one, turn, None)
        end(one, turn, False)
    clock.now += 61
    assert all(replica.in_flight == 0 and not replica.on_trial for replica in one._all)
    assert sum(urls_asked(one, 3 * num).values()) == 3 * num


# --- many --------------------------------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_items() -> None:
    with wired(echo, echo, max_concurrency=8) as (client, _):
        items = list(range(50))
        assert client.each(items, lambda i: client.request("/x", number, key=str(i), json={"n": i})) == items
        assert client.each([], number) == []


@pytest.mark.parametrize("width", [1, 3])
def test_no_more_are_in_flight_than_told_also_over_threads(width: int) -> None:
    lock, together, most = Lock(), [0], [0]
    two = Event()

    def answer(*_: object) -> Says:
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
        two.wait(0.01)
        with lock:
            together[0] -= 1
        return FAIR

    with wired(answer, max_concurrency=width) as (client, _):

        def some() -> None:
            client.each(range(8), lambda i: client.request("/x", number, key=str(i)))

        threads = [Thread(target=some, name="teacher-some") for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert 0 < most[0] <= width


def test_two_hundred_requests_are_in_flight_at_once() -> None:
    """The server answers none before it has all."""
    all_here = threading.Barrier(200)

    def answer(asked: Asked, _: int) -> Says:
        all_here.wait(WAIT_S)
        return Says(asked.body)

    with wired(answer, max_concurrency=200, max_retries=0) as (client, _):
        items = list(range(200))
        assert client.each(items, lambda i: client.request("/x", number, key=str(i), json={"n": i})) == items


@contextmanager
def stuck() -> Iterator[tuple[Event, Callable[[Asked, int], Says]]]:
    """Says when it was asked "hang", and answers that only at the end of the test; "bad" is refused once something hangs."""
    free, entered = Event(), Event()

    def answer(asked: Asked, _: int) -> Says:
        if asked.path == "/hang":
            entered.set()
            free.wait(WAIT_S)
        if asked.path == "/bad":
            entered.wait(WAIT_S)
            return Says(b"no", 404)
        return FAIR

    try:
        yield entered, answer
    finally:
        free.set()


@pytest.mark.parametrize("nested", [False, True])
def test_an_error_gives_up_the_requests_of_all_others(nested: bool) -> None:
    with stuck() as (_, answer), wired(answer, max_concurrency=4) as (client, (server,)):
        answered: list[str] = []

        def one(path: str) -> int:
            if nested and path == "/hang":
                total = sum(client.each([path, path], lambda path: client.request(path, number, key=path)))
                answered.append(path)
                return total
            found: int = client.request(path, number, key=path)
            return found

        with pytest.raises(Refused, match="404"):
            client.each(["/hang", "/bad", "/hang", *["/late"] * 50], one)
        assert [thread for thread in wires() if not thread.name.startswith("client-")] == []
        assert answered == []
        assert sum(asked.path == "/late" for asked in server.asked) < 50
        # the places of those that were given up are free again
        assert client.each(["/ok"] * 8, one) == [1] * 8
        assert all(replica.in_flight == 0 for replica in client._replicas._all)


def test_an_error_gives_up_the_waits_of_all_others() -> None:
    asked_to_wait = Event()

    def answer(asked: Asked, _: int) -> Says:
        if asked.path == "/bad":
            asked_to_wait.wait(WAIT_S)
            return Says(b"no", 404)
        asked_to_wait.set()
        return Says(b"", 429, {"Retry-After": "59"})

    with wired(answer, deadline_s=600.0) as (client, _), pytest.raises(Refused, match="404"):
        client.each(["/wait", "/bad"], lambda path: client.request(path, number, key=path))


def test_close_gives_up_what_is_in_flight_and_what_comes() -> None:
    errors: list[BaseException] = []
    with stuck() as (entered, answer), wired(answer) as (client, _):

        def hang() -> None:
            try:
                client.request("/hang", number, key="k")
            except EngineError as error:
                errors.append(error)

        thread = Thread(target=hang, name="teacher-hang")
        thread.start()
        assert entered.wait(WAIT_S)
        client.close()
        thread.join(WAIT_S)
        assert not thread.is_alive()
        assert "teacher is closed" in str(errors[0])
        client.close()
        with pytest.raises(EngineError, match="teacher is closed"):
            client.request("/x", number, key="k")


def test_a_wire_that_was_never_asked_has_no_thread() -> None:
    before = wires()
    client = HttpClient(["http://h"], name="teacher", retry_policy=RetryPolicy())
    assert wires() == before
    client.close()
    with pytest.raises(EngineError, match="closed"):
        client.request("/x", number, key="k")


def test_close_leaves_no_connection() -> None:
    gone = Event()

    def answer(*_: object) -> Says:
        return FAIR

    with wired(answer) as (client, (server,)):
        ends = server._server.shutdown_request
        server._server.shutdown_request = lambda request: (gone.set(), ends(request))[1]
        client.request("/x", number, key="k")
        assert not gone.is_set()
        client.close()
        assert gone.wait(WAIT_S)


@pytest.mark.parametrize("many", [1, 3])
def test_an_interrupt_ends_a_request(many: int, request: pytest.FixtureRequest) -> None:
    """As Ctrl-C does: the signal comes while the main thread waits. A process in the background is born without a handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before or signal.SIG_DFL))
    main = threading.main_thread().ident
    assert main is not None
    with stuck() as (_, answer), wired(answer, max_concurrency=3) as (client, (server,)):

        def interrupt() -> None:
            pause = Event()
            for _ in range(int(WAIT_S / 0.01)):
                if len(server.asked) == many:
                    break
                pause.wait(0.01)
            signal.pthread_kill(main, signal.SIGINT)

        thread = Thread(target=interrupt, name="teacher-interrupt")
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            if many == 1:
                client.request("/hang", number, key="k")
            else:
                client.each(["/hang"] * many, lambda path: client.request(path, number, key=path))
        thread.join(WAIT_S)
        assert [one for one in wires() if not one.name.startswith("client-")] == []
        pause = Event()
        for _ in range(500):
            if client._replicas._all[0].in_flight == 0:
                break
            pause.wait(0.01)
        assert client._replicas._all[0].in_flight == 0
        assert client.each(["/ok"] * 3, lambda path: client.request(path, number, key=path)) == [1] * 3


def test_names_are_looked_up_and_leave_no_thread() -> None:
    before = set(threading.enumerate())
    with wired(echo) as (_, (server,)):
        url = server.url.replace("127.0.0.1", "localhost")
        with HttpClient([url], name="teacher", retry_policy=RetryPolicy(backoff_s=0.001)) as client:
            assert client.request("/x", number, key="k", json={"n": 2}) == 2
    left = set(threading.enumerate()) - before
    assert not [one for one in left if not one.daemon]


def test_an_exit_does_not_wait_for_a_wire_that_nobody_closed() -> None:
    code = """
import sys
from threading import Thread
from understudy.http.client import RetryPolicy, HttpClient
from understudy.http.replies import Reply
client = HttpClient([sys.argv[1]], name="teacher", retry_policy=RetryPolicy())
client.request("/ok", Reply.json, key="k")
hang = Thread(target=client.request, args=("/hang", Reply.json), kwargs={"key": "k"}, daemon=True)
hang.start()
client.request("/hung", Reply.json, key="k")
"""
    with stuck() as (entered, answer):

        def both(asked: Asked, before: int) -> Says:
            if asked.path == "/hung":
                entered.wait(WAIT_S)
            return answer(asked, before)

        with Server(both) as server:
            done = subprocess.run([sys.executable, "-c", code, server.url], capture_output=True, timeout=3 * WAIT_S)
            assert (done.returncode, done.stderr) == (0, b"")
            assert {one.path for one in server.asked} == {"/ok", "/hang", "/hung"}


# --- what is said and counted ------------------------------------------------------------------------------------------


def test_the_key_goes_to_the_server_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    said = [Says(f"{KEY} is unknown".encode(), status) for status in (401, 500)]
    for answer in (*said, Says(f"{KEY} is no JSON".encode())):
        with wired(lambda *_, answer=answer: answer, env="TEACHER_KEY", max_retries=1) as (client, (server,)):
            with pytest.raises((Refused, EngineError)) as caught:
                client.request("/x", number, key=f"k {KEY}", json={})
            assert {one.headers["Authorization"] for one in server.asked} == {f"Bearer {KEY}"}
            assert KEY not in json.dumps(client.stats())
            told: BaseException | None = caught.value
            while told is not None:
                assert KEY not in f"{told} {told!r}"
                told = told.__cause__ or (None if told.__suppress_context__ else told.__context__)
            assert KEY not in repr([vars(client), vars(client._replicas), vars(client._background)])
    monkeypatch.delenv("TEACHER_KEY")
    with wired(echo, env="TEACHER_KEY") as (client, (server,)):
        client.request("/x", Reply.json, key="k", json={})
        assert "Authorization" not in server.asked[0].headers


def test_a_key_that_no_header_can_carry_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-one\nsk-two")
    with wired(echo, env="TEACHER_KEY") as (client, _):
        with pytest.raises(RecipeError, match="TEACHER_KEY") as caught:
            client.request("/x", number, key="k")
        assert "sk-" not in str(caught.value)


def test_requests_and_bytes_are_counted_by_replica() -> None:
    body = b'{"n": 12345}'
    with wired(lambda *_: Says(body), lambda *_: Says(b"down", 500), break_after=9) as (client, servers):
        for i in range(4):
            client.request("/x", number, key=str(i), content=b"abc")
        found = client.stats()
        fair, sick = (found["replicas"][server.url] for server in servers)
        num = len(servers[1].asked)
        assert num > 0
        assert fair == {"requests": 4, "retries": num, "failures": 0, "bytes_sent": 12, "bytes_received": 4 * len(body)}
        assert sick == {
            "requests": num,
            "retries": 0,
            "failures": num,
            "bytes_sent": 3 * num,
            "bytes_received": 4 * num,
        }
        assert {name: found[name] for name in fair} == {name: fair[name] + sick[name] for name in fair}


@given(st.integers(1, 2000), st.text(max_size=8))
def test_waiting_doubles_with_jitter_and_is_drawn_once(attempt: int, key: str) -> None:
    full = min(MAX_WAIT_S, 0.5 * 2 ** min(attempt - 1, 60))
    found = RetryPolicy().wait_s(3, key, attempt)
    assert full / 2 <= found <= full
    assert found == RetryPolicy().wait_s(3, key, attempt)


def test_requests_of_other_names_do_not_come_back_together() -> None:
    assert len({RetryPolicy().wait_s(0, str(i), 1) for i in range(50)}) == 50


@pytest.mark.parametrize(
    "keys", [{"timeout_s": 0.0}, {"deadline_s": float("inf")}, {"max_concurrency": 0}, {"break_after": 0}]
)
def test_a_bad_retry_policy_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(keys))):
        RetryPolicy(**keys)


@pytest.mark.parametrize(
    "url", ["", "h:8000", "ftp://h", "http://h:x", "http://u:secret@h", "http://h?k=1", "http://h v"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(RecipeError, match="teacher") as caught:
        HttpClient([url], name="teacher", retry_policy=RetryPolicy())
    assert "secret" not in str(caught.value)


def test_this_machine_is_asked_without_the_proxy_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, refusing: Callable[[], str]
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, refusing())
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with wired(lambda *_: FAIR, max_retries=0) as (client, _):
        assert client.request("/x", number, key="k") == 1


@pytest.mark.parametrize("section", ["http", "served", "chat", "vllm"])
def test_a_key_in_place_of_its_variable_is_refused_and_not_shown(section: str) -> None:
    """A recipe is written into the run directory: the key must never be in it."""
    from understudy.engines import VLLM
    from understudy.teachers.judges.chat import Chat
    from understudy.teachers.remote.http import Http
    from understudy.teachers.remote.served import Served

    key = "sk-live-0123456789"
    made: dict[str, Callable[[], object]] = {
        "http": lambda: Http(url="http://h", model="m", api="vllm", api_key_env=key),
        "served": lambda: Served(url="http://h", token_env=key),
        "chat": lambda: Chat(url="http://h", model="m", api_key_env=key),
        "vllm": lambda: VLLM(url="http://h", api_key_env=key),
    }
    with pytest.raises(ValueError, match="must be the NAME of an environment variable") as caught:
        made[section]()
    assert key not in str(caught.value)
