"""An HTTP server on 127.0.0.1 that leaves nothing behind: connections are known, and cut when it closes."""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread, current_thread
from typing import Any

PATIENCE_S = 30.0
"""No read of a request and no end of a thread takes longer."""
_NO_LINGER = struct.pack("ii", 1, 0)


class Loopback(ThreadingHTTPServer):
    """`close` ends every connection and every thread."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: type[BaseHTTPRequestHandler], port: int = 0) -> None:
        self._lock = Lock()
        self._connections: dict[Any, Thread] = {}
        super().__init__(("127.0.0.1", port), handler)

    def start(self) -> Loopback:
        """Answers in threads of its own."""
        # shutdown waits for the next look at whether it was asked for
        self._serving = Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, name="loopback", daemon=True)
        self._serving.start()
        return self

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = Thread(
            target=self.process_request_thread, args=(request, client_address), name="loopback-connection", daemon=True
        )
        with self._lock:
            self._connections[request] = thread
        thread.start()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._connections.pop(request, None)

    def shutdown_request(self, request: Any) -> None:
        # a FIN before the RST would make a reset look like an end
        if request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, len(_NO_LINGER)) == _NO_LINGER:
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent: clients that leave are part of what is tested."""

    def close(self, *, hard: bool = False) -> None:
        """Stops listening, then ends what is open: with RST where `hard`. May be called by a thread that answers."""
        self.shutdown()
        self.server_close()
        with self._lock:
            left = dict(self._connections)
        for connection in left:
            cut(connection, hard=hard)
        until = time.monotonic() + PATIENCE_S
        for thread in [self._serving, *left.values()]:
            if thread is not current_thread():
                thread.join(max(0.0, until - time.monotonic()))


class JSONHandler(BaseHTTPRequestHandler):
    """Keep-alive, without Nagle's algorithm: a header and a body written apart would wait 40 ms for each other."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = PATIENCE_S

    def read_body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        """JSON, or bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silent."""


def reset_on_close(connection: socket.socket) -> None:
    """Its end will be an RST, and what is not yet sent is lost."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)


def cut(connection: socket.socket, *, hard: bool = False) -> None:
    """Ends a connection that another thread may be reading; `hard`: with RST instead of FIN."""
    try:
        if hard:
            reset_on_close(connection)
            # wakes the reader, whose close then sends the RST
            connection.shutdown(socket.SHUT_RD)
        else:
            connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def has_left(connection: socket.socket) -> bool:
    """Whether the other side has closed."""
    try:
        readable, _, _ = select.select([connection], [], [], 0)
        return bool(readable) and connection.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):
        return True
