"""A run's report while the run goes on: served to this machine alone, and renewed in the page that is open."""

from __future__ import annotations

import hmac
import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import sha256
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from secrets import token_urlsafe
from threading import Lock
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from understudy.errors import DataError, RecipeError, UnderstudyError
from understudy.http.replies import is_loopback
from understudy.report.page import report_html
from understudy.text import printable

MAX_SHARE = 1 / 6
"""Most of the time that rendering may take: a long run's page takes a second, of which training has the cores."""
IDLE_S = 30.0
"""Time after which a connection that asks nothing is closed."""
_PART = re.compile(r'<(header|section) id="([a-z]+)"[^>]*>.*?</\1>', re.DOTALL)


class Watch:
    """The page of a run directory, rendered again when its files have changed."""

    def __init__(self, run_dir: Path, max_share: float = MAX_SHARE) -> None:
        """Raises CheckpointError where there is no run, and DataError for a broken file in it."""
        self.token = token_urlsafe(24)
        self._run_dir, self._max_share = run_dir, max_share
        self._lock = Lock()
        self._due, self._stamp = 0.0, self._files()
        self._render()

    def html(self) -> str:
        """The whole page as it is now."""
        with self._lock:
            self._renew()
            return self._html

    def changed(self, known: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """The header and the sections of which the page has another digest than `known`, or none."""
        with self._lock:
            self._renew()
            return {name: part for name, part in self._parts.items() if known.get(name) != part["digest"]}

    def _renew(self) -> None:
        """Renders again where files have changed. One that is half written leaves the page as it was."""
        if time.monotonic() < self._due or (stamp := self._files()) == self._stamp:
            return
        begun = time.monotonic()
        with suppress(DataError):
            self._render()
            self._stamp = stamp
        self._due = begun + (time.monotonic() - begun) / self._max_share

    def _render(self) -> None:
        html = report_html(self._run_dir, live=True)
        parts = {match[2]: match[0] for match in _PART.finditer(html)}
        self._parts = {
            name: {"digest": sha256(part.encode()).hexdigest()[:16], "html": part} for name, part in parts.items()
        }
        digests = json.dumps({name: part["digest"] for name, part in self._parts.items()})
        self._html = html.replace('data-digests="{}"', f'data-digests="{escape(digests)}"', 1)

    def _files(self) -> tuple[tuple[str, int, int], ...]:
        """Names, sizes and times of all that the page is made of."""
        folders = (self._run_dir, *(self._run_dir / name for name in ("eval", "samples", "tokens")))
        files = [path for folder in folders for path in folder.glob("*.*") if path.name != "report.html"]
        stamps = []
        for path in files:
            # a file may be replaced meanwhile
            with suppress(OSError):
                stat = path.stat()
                stamps.append((str(path), stat.st_size, stat.st_mtime_ns))
        return tuple(sorted(stamps))


def make_server(watch: Watch, port: int = 0) -> tuple[ThreadingHTTPServer, str]:
    """A server on the loopback address, and the address of the page. Raises RecipeError where the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = IDLE_S

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            _, token, *rest = [*path.split("/"), "", ""]
            # by another name in Host a page of another site may lead here (DNS rebinding)
            if not _is_here(self.headers.get("Host", "")) or not hmac.compare_digest(
                token.encode(), watch.token.encode()
            ):
                self._answer(403, "text/plain", "Open the address that understudy watch printed.\n")
            elif rest[0] not in ("parts", ""):
                self._answer(404, "text/plain", "There is no such page.\n")
            else:
                try:
                    known = dict(parse_qsl(query))
                    body = json.dumps(watch.changed(known)) if rest[0] else watch.html()
                except (UnderstudyError, OSError) as error:
                    # the run directory was removed, or may not be read any more
                    self._answer(503, "text/plain", f"The page is as it was: {printable(str(error))}\n")
                else:
                    self._answer(200, "application/json" if rest[0] else "text/html", body)

        def _answer(self, status: int, kind: str, text: str) -> None:
            body = text.encode()
            headers = {
                "Content-Type": f"{kind}; charset=utf-8",
                "Content-Length": str(len(body)),
                "Cache-Control": "no-store",
                "Referrer-Policy": "no-referrer",
                "X-Content-Type-Options": "nosniff",
                "X-Frame-Options": "DENY",
            }
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            # the page may have been closed
            with suppress(OSError):
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """A page asks every few seconds: nothing is said about it."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            # a browser that is closed resets its connections
            if not isinstance(sys.exception(), OSError):
                super().handle_error(request, client_address)

    try:
        server = Server(("127.0.0.1", port), Handler)
    except OSError as error:
        raise RecipeError(
            f"--port {port} cannot be used: {error.strerror or error}; leave it out for one that is free"
        ) from error
    return server, f"http://127.0.0.1:{server.server_port}/{watch.token}/"


def serve(run_dir: Path, port: int, note: Callable[[str], None]) -> None:
    """Serves until Ctrl-C or SIGTERM. Raises as `Watch` and `make_server`."""
    server, address = make_server(Watch(run_dir), port)
    note(f"{address} shows {run_dir} to this machine, and renews itself; end it with Ctrl-C")
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()


def _is_here(host: str) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False
