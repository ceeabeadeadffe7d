"""A proxy on loopback that does to a server's replies what networks, overloaded servers and wrong ones do.

with FaultProxy(stub.url, seeded(7, [reset(), status(429), HALF], share=0.3)) as proxy: ... proxy.url ...
"""

from __future__ import annotations

import http.client
import json
import random
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from tests.loopback import PATIENCE_S, JSONHandler, Loopback, has_left, reset_on_close

_LOOK_S = 0.02
_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "host", "keep-alive", "accept-encoding"}


@dataclass(frozen=True)
class Fault:
    """What happens to one request; `kind` is what `FaultProxy.seen` counts."""

    kind: str
    seconds: float = 0.0
    """Of a delay, or of the header Retry-After."""
    status: int = 200


PASS = Fault("pass")
HALF = Fault("half")
"""The headers promise the whole body, half of it comes, then the end."""
TRUNCATED = Fault("truncated")
"""Half of the JSON with the length that it has."""
WRONG_IDS = Fault("wrong_ids")
"""Another token wherever a reply names one, once in each list."""
NAN = Fault("nan")
"""NaN for one log-probability in each list."""
NULL = Fault("null")
"""null for one log-probability in each list that has others."""
HANG = Fault("hang")
"""No reply until the client gives up or the proxy closes."""
DEAD = Fault("dead")
"""From this request on connections are refused, until `FaultProxy.revive`."""


def latency(seconds: float) -> Fault:
    return Fault("latency", seconds)


def reset(*, middle: bool = False) -> Fault:
    """RST instead of a reply, or after half of it."""
    return Fault("reset_middle" if middle else "reset")


def status(code: int, *, retry_after_s: float = 0.0) -> Fault:
    return Fault(f"status_{code}", retry_after_s, code)


Plan = Callable[[int, bytes], Fault]
"""From the number of a request that the proxy may touch, and its body, to what happens to it."""


def seeded(seed: int, faults: Sequence[Fault], *, share: float) -> Plan:
    """Each request meets one of the faults with probability `share`."""

    def plan(number: int, _: bytes) -> Fault:
        draw = random.Random(f"{seed}/{number}")
        return draw.choice(faults) if draw.random() < share else PASS

    return plan


def scripted(faults: Sequence[Fault]) -> Plan:
    """One after the other, then all pass."""
    return lambda number, _: faults[number] if number < len(faults) else PASS


class FaultProxy:
    """Runs inside a `with`. `only`: what a path has to contain to be touched and counted."""

    def __init__(self, upstream: str, faults: Sequence[Fault] | Plan = (), *, only: str = "") -> None:
        address = urlsplit(upstream)
        self._upstream = (str(address.hostname), address.port or 80)
        self._prefix = address.path.rstrip("/")
        self.plan: Plan = faults if callable(faults) else scripted(faults)
        self.only = only
        self.seen: Counter[str] = Counter()
        self.closing = Event()
        self._lock = Lock()
        self._number = 0
        self._handler = type("Handler", (_Handler,), {"proxy": self})
        self._server: Loopback | None = Loopback(self._handler)
        self._place: socket.socket | None = None
        self._dying: Thread | None = None
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}{self._prefix}"

    def __enter__(self) -> FaultProxy:
        assert self._server is not None
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._dying is not None:
            self._dying.join(PATIENCE_S)
        self.closing.set()
        if self._server is not None:
            self._server.close()
        if self._place is not None:
            self._place.close()

    def die(self) -> None:
        """Open connections are reset and new ones refused; what hangs ends."""
        server, self._server = self._server, None
        if server is not None:
            self.closing.set()
            server.close(hard=True)
            # bound and not listening: nobody else gets the port, and connections are refused
            self._place = socket.socket()
            self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._place.bind(("127.0.0.1", self.port))

    def revive(self) -> None:
        """Listens on the same port again."""
        if self._dying is not None:
            self._dying.join(PATIENCE_S)
            self._dying = None
        if self._place is not None:
            self._place.close()
            self._place = None
            self.closing.clear()
            self._server = Loopback(self._handler, self.port).start()

    def next_fault(self, path: str, body: bytes) -> Fault:
        """Of the next request."""
        if self.only not in path:
            return PASS
        with self._lock:
            number, self._number = self._number, self._number + 1
            fault = self.plan(number, body)
            self.seen[fault.kind] += 1
            if fault.kind == "dead" and self._dying is None:
                # by another thread, since the one that answers is waited for
                self._dying = Thread(target=self.die, name="dying-proxy", daemon=True)
                self._dying.start()
        return fault

    def forward(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """The server's own reply. Raises OSError or HTTPException."""
        connection = http.client.HTTPConnection(*self._upstream, timeout=PATIENCE_S)
        try:
            sent = {name: value for name, value in headers.items() if name.lower() not in _HOP_BY_HOP}
            connection.request(method, path, body or None, sent)
            reply = connection.getresponse()
            got = {name: value for name, value in reply.getheaders() if name.lower() not in _HOP_BY_HOP}
            return reply.status, got, reply.read()
        finally:
            connection.close()


class _Handler(JSONHandler):
    proxy: FaultProxy

    def _answer(self) -> None:
        body = self.read_body()
        fault = self.proxy.next_fault(self.path, body)
        if fault.kind in ("latency", "hang", "dead"):
            looks = 0
            while (fault.kind != "latency" or looks * _LOOK_S < fault.seconds) and not has_left(self.connection):
                looks += 1
                if self.proxy.closing.wait(_LOOK_S):
                    break
        if fault.kind in ("reset", "hang", "dead"):
            self._end(reset=True)
            return
        if fault.status != 200:
            after = {"Retry-After": f"{fault.seconds:g}"} if fault.seconds else {}
            self.send(fault.status, {"error": {"message": f"made up: {fault.status}", "code": fault.status}}, after)
            return
        try:
            code, headers, content = self.proxy.forward(self.command, self.path, dict(self.headers), body)
        except (OSError, http.client.HTTPException) as error:
            self.send(502, {"error": {"message": f"no reply from the server: {error}", "code": 502}})
            return
        if fault.kind in ("half", "reset_middle"):
            self._break_off(code, headers, content, reset=fault.kind != "half")
        else:
            self.send(code, CHANGES.get(fault.kind, bytes)(content), headers)

    do_GET = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

    def _break_off(self, code: int, headers: dict[str, str], content: bytes, *, reset: bool) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self._end(reset=reset)

    def _end(self, *, reset: bool) -> None:
        if reset:
            reset_on_close(self.connection)
        self.close_connection = True


def _rewrite(change: Callable[[Any], None]) -> Callable[[bytes], bytes]:
    """The change made to a JSON body; anything else stays as it is."""

    def changed(content: bytes) -> bytes:
        try:
            body = json.loads(content)
        except ValueError:
            return content
        change(body)
        return json.dumps(body).encode()

    return changed


def _other_ids(value: Any) -> None:
    """In lists of ids the last one, in `prompt_logprobs` and `tokens` the last place, becomes another token."""
    for choice in _choices(value):
        for name in ("token_ids", "prompt_token_ids"):
            if choice.get(name):
                choice[name][-1] ^= 1
        if places := [place for place in choice.get("prompt_logprobs") or [] if place]:
            first, *rest = places[-1].items()
            other = next(str(key) for key in range(len(rest) + 2) if str(key) not in places[-1])
            places[-1].clear()
            places[-1].update({other: first[1]} | dict(rest))
        if tokens := (choice.get("logprobs") or {}).get("tokens"):
            name, _, number = tokens[-1].rpartition(":")
            tokens[-1] = f"{name}:{int(number) ^ 1}" if name == "token_id" else tokens[-1] + "?"


def _spoil(wrong: float | None) -> Callable[[Any], None]:
    """The last log-probability of each list."""

    def change(value: Any) -> None:
        for choice in _choices(value):
            if places := [place for place in choice.get("prompt_logprobs") or [] if place]:
                next(iter(places[-1].values()))["logprob"] = wrong
            logprobs = choice.get("logprobs") or {}
            if logprobs.get("token_logprobs"):
                logprobs["token_logprobs"][-1] = wrong
            for place in logprobs.get("content") or []:
                for entry in [place, *place.get("top_logprobs", [])]:
                    entry["logprob"] = wrong

    return change


def _choices(body: Any) -> list[dict[str, Any]]:
    """Of a completion, of text or of a chat."""
    return body.get("choices") or [] if isinstance(body, dict) else []


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "wrong_ids": _rewrite(_other_ids),
    "nan": _rewrite(_spoil(float("nan"))),
    "null": _rewrite(_spoil(None)),
}
"""By kind, what becomes of a body."""
