"""Commands, ranks and servers as processes of their own, to be signalled and killed."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from understudy.compare.processes import PRELOAD

ROOT = Path(__file__).parents[1]
PATIENCE_S = 240.0


class Process:
    """A function in a process of its own, its output in a file.

    It is forked from a server that has imported torch and transformers, as the cells of a comparison are: a new
    interpreter would import them for four seconds of a core first.
    """

    def __init__(self, function: Callable[..., None], *arguments: object, log: Path, **environment: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        given = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "400"} | environment
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        self._process = context.Process(target=_run, args=(function, arguments, str(log), os.environ | given))
        self._process.start()

    @property
    def output(self) -> str:
        """Standard output and errors so far."""
        return self._log.read_text(errors="replace")

    def poll(self) -> int | None:
        """Exit code, -9 after SIGKILL; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Exit code. Raises AssertionError with the output where the process does not end."""
        self._process.join(timeout_s)
        code = self.poll()
        assert code is not None, f"still running after {timeout_s:g} s: {self.output}"
        return code

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL, and no zombie."""
        self._process.kill()
        self.wait()


def _run(function: Callable[..., None], arguments: tuple[object, ...], log: str, environment: dict[str, str]) -> None:
    import torch

    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that run under nohup ignore it
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    function(*arguments)


def _end_with_parent() -> None:
    """However the tests end, SIGKILL included, nothing that they started goes on."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def command_line(*arguments: object) -> None:
    """`understudy ARGUMENTS`, without the new start that gives it another allocator."""
    from understudy.cli.app import main

    sys.argv = ["understudy", *map(str, arguments)]
    main()


def run_ranks(function: Callable[..., None], *arguments: object, folder: Path, num_ranks: int = 2) -> None:
    """Runs a function in processes that find each other as torchrun's do. Raises AssertionError where one fails."""
    from understudy.engines.vllm.launch import free_ports

    found = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    ranks = [
        Process(function, *arguments, log=folder / f"rank_{rank}.log", RANK=str(rank), LOCAL_RANK=str(rank), **found)
        for rank in range(num_ranks)
    ]
    try:
        for rank in ranks:
            assert rank.wait() == 0, "\n".join(one.output for one in ranks)
    finally:
        for rank in ranks:
            rank.kill()


class Server:
    """A process that prints its address when it is ready; `function` takes a port: 0, later the one it was given.

    `kill` is SIGKILL, `start` begins anew on the same port. Runs inside a `with`.
    """

    def __init__(self, function: Callable[..., None], *arguments: object, log: Path) -> None:
        self._function, self._arguments, self._log = function, arguments, log
        self._port = 0
        self._process: Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self, *, wait: bool = True) -> None:
        """`wait`: until it answers, as the first start has to."""
        self._process = Process(self._function, self._port, *self._arguments, log=self._log)
        if not wait:
            return
        until = time.monotonic() + PATIENCE_S
        while (found := re.search(r"http://127\.0\.0\.1:(\d+)", self._process.output)) is None:
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise RuntimeError(f"not ready: {self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        self._port = int(found[1])

    def kill(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def stub(model_dir: str | Path, log: Path, *options: str) -> Server:
    """`tests.engine_stub`."""
    return Server(_stub, str(model_dir), *options, log=log)


def _stub(port: int, *options: str) -> None:
    from tests.engine_stub import main

    sys.argv = ["tests.engine_stub", *options, "--port", str(port)]
    main()
