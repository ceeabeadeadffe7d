"""A chat endpoint of the OpenAI kind on loopback, which says what a test tells it to."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Response:
    """What the server sends: `body` as JSON, or as it is where it is text; after `delay_s`."""

    body: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0


@dataclass(frozen=True)
class Request:
    """What a client asked."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]

    @property
    def question(self) -> str:
        """The first message."""
        content: str = self.body["messages"][0]["content"]
        return content


def says(text: str | None, *, top: list[dict[str, float]] | None = None, finish: str = "stop") -> Response:
    """A chat completion. `top`: for each token the log-probabilities of the likeliest, that of the reply first."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if top is not None:
        content = []
        for place in top:
            entries = [{"token": token, "logprob": value} for token, value in place.items()]
            content.append(entries[0] | {"top_logprobs": entries})
        choice["logprobs"] = {"content": content}
    return Response({"object": "chat.completion", "choices": [choice]})


def refuses(status: int, message: str, **headers: str) -> Response:
    """An error as OpenAI writes it."""
    return Response({"error": {"message": message, "code": None}}, status, headers)


class ChatServer:
    """Runs inside a `with`. `answer`: from a request and how many came before it to a response."""

    def __init__(self, answer: Callable[[Request, int], Response]) -> None:
        self.requests: list[Request] = []
        lock, requests = Lock(), self.requests

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # a header and a body written apart would wait 40 ms for each other
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                request = Request(self.path, dict(self.headers), body)
                with lock:
                    before = len(requests)
                    requests.append(request)
                response = answer(request, before)
                time.sleep(response.delay_s)
                text = response.body if isinstance(response.body, str) else json.dumps(response.body)
                try:
                    self.send_response(response.status)
                    for name, value in response.headers.items():
                        self.send_header(name.replace("_", "-"), value)
                    self.send_header("Content-Length", str(len(text.encode())))
                    self.end_headers()
                    self.wfile.write(text.encode())
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> ChatServer:
        # shutdown waits for the next look at whether it was asked for
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
