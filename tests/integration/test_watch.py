"""`understudy watch`: the report of a run that goes on, to this machine and to whoever has the address."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import struct
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest

from tests.report_run import training_rows, watched, write_eval, write_lines, write_run
from understudy.errors import CheckpointError, RecipeError
from understudy.report.watch import Watch, make_server


def get(address: str, path: str | None = None, host: str | None = None) -> tuple[int, str, dict[str, str]]:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.netloc, timeout=20)
    asked = f"{parts.path}?{parts.query}" if path is None else path
    connection.request("GET", asked, headers={} if host is None else {"Host": host})
    reply = connection.getresponse()
    body = reply.read().decode()
    connection.close()
    return reply.status, body, dict(reply.headers)


def test_parts_are_renewed_where_files_have_changed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=20)
    watch = Watch(run, max_share=1.0)
    with watched(watch) as address:
        status, page, headers = get(address)
        assert (status, headers["Cache-Control"], headers["Referrer-Policy"]) == (200, "no-store", "no-referrer")
        assert "connect-src &#39;self&#39;" in page or "connect-src 'self'" in page
        known = {name: part["digest"] for name, part in watch.changed({}).items()}
        assert {"header", "result", "curves", "alarms", "events"} <= known.keys()

        def changed() -> dict[str, dict[str, str]]:
            status, body, _ = get(f"{address}parts?{urlencode(known)}")
            assert status == 200
            found: dict[str, dict[str, str]] = json.loads(body)
            return found

        assert changed() == {}
        write_lines(run / "metrics.jsonl", training_rows(21))
        found = changed()
        assert {"header", "curves"} <= found.keys() <= {"header", "curves", "events"}
        # run.json is of an earlier end: the run was resumed
        assert "<span>status</span> running" in found["header"]["html"]
        assert "\u2192" in found["curves"]["html"]
        known |= {name: part["digest"] for name, part in found.items()}
        write_eval(run, 21, {"a": [1.0], "b": [0.0]})
        assert "result" in changed()
        # a file that is being written
        (run / "eval" / "step_000022.json").write_text("{")
        assert get(address)[0] == 200
    assert (run / "report.html").exists() is False


def test_nobody_gets_it_without_the_address(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=5)
    with watched(Watch(run)) as address:
        token = urlsplit(address).path.strip("/")
        assert len(token) >= 30
        for path in ("/", "/parts", f"/{token[:-1]}/", f"/{token}x/parts", "//", f"/x/{token}/"):
            status, body, _ = get(address, path)
            assert (status, "gkd" in body) == (403, False), path
        assert get(address, f"/{token}/other")[0] == 404
        assert get(address, f"/{token}/../../etc/passwd")[0] == 404
        port = urlsplit(address).port
        assert get(address, host=f"attacker.example:{port}")[0] == 403
        assert get(address, host=f"localhost:{port}")[0] == 200
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("POST", f"/{token}/parts", body="x")
        assert connection.getresponse().status == 501
        connection.close()
        with pytest.raises(RecipeError, match=f"--port {port} cannot be used"):
            make_server(Watch(run), port or 0)


def test_a_run_that_is_removed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the page that is open, which stays; nothing is said on the terminal."""
    run = write_run(tmp_path / "run", num_steps=5)
    with watched(Watch(run, max_share=1.0)) as address:
        assert get(address, "http://[/", host="localhost")[0] == 403
        shutil.rmtree(run)
        for path in ("", "parts"):
            status, said, _ = get(f"{address}{path}")
            assert status == 503
            assert "The page is as it was" in said
            assert "is not a run directory" in said
        with socket.create_connection(("127.0.0.1", urlsplit(address).port or 0)) as line:
            # closed with a reset
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            line.sendall(b"GET /")
        write_run(tmp_path / "run", num_steps=5)
        assert get(address)[0] == 200
    assert "".join(capsys.readouterr()) == ""


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run directory"):
        Watch(tmp_path)
