"""A server process: it is waited for, watched and stopped, and nothing of it stays, however its parent ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.leaks import nothing_left
from understudy.engines.vllm import supervisor
from understudy.engines.vllm.launch import ServerProcess, free_ports, port_is_free
from understudy.errors import EngineError

pytestmark = pytest.mark.slow

PATIENCE_S = 20.0

SERVER = """
import http.server, os, signal, subprocess, sys, time
port, behaviour = int(sys.argv[1]), sys.argv[2]
print("hello from", os.environ.get("WHO", "nobody"), flush=True)
if behaviour == "talks":
    print("RuntimeError: out of memory", *range(100), "done", sep="\\n", flush=True)
if behaviour in ("dies", "talks"):
    sys.exit("there is no such model")
if behaviour == "late":
    time.sleep(60)
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behaviour in ("stubborn", "family"):
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    subprocess.Popen([sys.executable, "-c", ignore if behaviour == "stubborn" else "import time; time.sleep(60)"])
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=behaviour == "family")
if behaviour == "shares":
    from multiprocessing import shared_memory
    segment = shared_memory.SharedMemory(create=True, size=4096)
    print("segment", segment.name, flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def server(tmp_path: Path, behaviour: str = "plain", *, port: int | None = None, **options: object) -> ServerProcess:
    number = free_ports(1)[0] if port is None else port
    given: dict[str, object] = {"ready_timeout_s": PATIENCE_S, "stop_s": PATIENCE_S} | options
    return ServerProcess(
        [sys.executable, "-c", SERVER, str(number), behaviour],
        name="engine 0",
        port=number,
        log=tmp_path / "logs" / "engine_0.log",
        **given,  # type: ignore[arg-type]
    )


@contextmanager
def running(*args: Any, **options: Any) -> Iterator[ServerProcess]:
    with server(*args, **options) as one:
        one.wait_ready()
        yield one


def wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def group(pid: int) -> list[int]:
    """Of a server, and what left the group, by who their parents are."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def test_ready_watched_and_gone(tmp_path: Path) -> None:
    with nothing_left():
        with running(tmp_path, env={"WHO": "the recipe"}) as one:
            one.check()
            assert not port_is_free(one.port)
            assert "hello from the recipe" in (tmp_path / "logs" / "engine_0.log").read_text()
            assert "the recipe" not in repr(one)
        assert port_is_free(one.port)
        one.stop()
        with pytest.raises(EngineError, match="engine 0"):
            one.check()


def test_its_death_at_the_start_shows_the_log(tmp_path: Path) -> None:
    with (
        nothing_left(),
        pytest.raises(EngineError, match="status 1(.|\n)*there is no such model"),
        running(tmp_path, "dies"),
    ):
        pass


def test_what_went_wrong_is_shown_though_much_is_said_after_it(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught, running(tmp_path, "talks"):
        pass
    lines = str(caught.value).splitlines()
    assert lines[2] == "RuntimeError: out of memory"
    assert lines[-1] == "there is no such model"
    assert "50" not in lines
    assert "99" in lines


def test_a_late_server_is_ended(tmp_path: Path) -> None:
    with (
        nothing_left(),
        pytest.raises(EngineError, match="not ready(.|\n)*ready_timeout_s(.|\n)*hello"),
        running(tmp_path, "late", ready_timeout_s=1.0),
    ):
        pass


def test_the_log_of_an_earlier_server_is_kept_and_not_shown(tmp_path: Path) -> None:
    with running(tmp_path, env={"WHO": "the first"}):
        pass
    with pytest.raises(EngineError) as caught, running(tmp_path, "dies"):
        pass
    assert "the first" not in str(caught.value)
    assert "the first" in (tmp_path / "logs" / "engine_0.log").read_text()


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(EngineError, match="port .* in use"):
            server(tmp_path, port=taken.getsockname()[1]).start()


def test_ports_for_several_servers_are_different() -> None:
    ports = free_ports(100)
    assert len(set(ports)) == 100
    assert all(port_is_free(port) for port in ports)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    one = ServerProcess(["/nowhere/python"], name="engine 0", port=free_ports(1)[0], log=tmp_path / "log")
    with nothing_left(), pytest.raises(EngineError, match="/nowhere/python.*\n(.|\n)*No such file"):
        one.start()


def test_who_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    with nothing_left():
        with running(tmp_path, "stubborn", stop_s=0.3) as one:
            assert one.pid is not None
            pids = group(one.pid)
            assert len(pids) == 3
        assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_child_that_left_the_group_is_ended_too(tmp_path: Path) -> None:
    with nothing_left():
        with running(tmp_path, "family") as one:
            assert one.pid is not None
            pids = group(one.pid)
            assert len(pids) == 3
        assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_killed_server_is_noticed_and_its_children_end(tmp_path: Path) -> None:
    with nothing_left(), running(tmp_path, "family") as one:
        assert one.pid is not None
        pids = group(one.pid)
        os.kill(one.pid, signal.SIGKILL)
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
        with pytest.raises(EngineError, match="killed by signal 9"):
            wait_until(lambda: one.check() is not None)  # type: ignore[func-returns-value]


def test_a_killed_server_is_noticed_while_a_child_of_it_lives_on(tmp_path: Path) -> None:
    with nothing_left(), running(tmp_path, "stubborn", stop_s=2.0) as one:
        assert one.pid is not None
        pids = group(one.pid)
        os.kill(one.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="killed by signal 9"):
            one.check(PATIENCE_S)
        assert any(psutil.pid_exists(pid) for pid in pids[1:])


def test_shared_memory_of_a_killed_server_is_removed(tmp_path: Path) -> None:
    with nothing_left():
        with running(tmp_path, "shares", stop_s=0.2):
            name = (tmp_path / "logs" / "engine_0.log").read_text().split()[-1]
            assert (Path("/dev/shm") / name).exists()
        assert not (Path("/dev/shm") / name).exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_stays_when_the_parent_is_killed(how: signal.Signals, tmp_path: Path) -> None:
    port = free_ports(1)[0]
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys, time; from pathlib import Path; from understudy.engines.vllm.launch import ServerProcess\n"
            f"one = ServerProcess([sys.executable, '-c', {SERVER!r}, '{port}', 'stubborn'], name='engine', port={port},"
            f" log=Path({str(tmp_path / 'log')!r}), ready_timeout_s=20, stop_s=0.3)\n"
            "with one:\n    one.wait_ready()\n    print(one.pid, flush=True)\n    time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert parent.stdout is not None
        pids = group(int(parent.stdout.readline()))
        assert len(pids) == 3
        supervisor = psutil.Process(pids[0]).ppid()
        parent.send_signal(how)
        parent.wait(PATIENCE_S)
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in (*pids, supervisor)))
        assert port_is_free(port)
    finally:
        parent.kill()
        parent.wait(PATIENCE_S)
        if parent.stdout is not None:
            parent.stdout.close()


def test_the_supervisor_imports_pythons_own_modules_alone() -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, supervisor.__file__], capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy", "httpx", "understudy"} & set(done.stdout.split())
