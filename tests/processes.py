"""Servers and trainings as processes of their own, to be killed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[1]
PATIENCE_S = 240.0


class Server:
    """A process that prints its address when it is ready; `{port}` in the command is 0, later the port it was given.

    `kill` is SIGKILL, `start` begins anew on the same port. Runs inside a `with`.
    """

    def __init__(self, command: Sequence[str], log: Path, *, ready: str = r"(http://127\.0\.0\.1:\d+)") -> None:
        self._command, self._log, self._ready = list(command), log, re.compile(ready)
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self, *, wait: bool = True) -> None:
        """`wait`: until it answers, as the first start has to."""
        command = [part.replace("{port}", str(self._port)) for part in self._command]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        if wait:
            self._wait_ready()

    def _wait_ready(self) -> None:
        assert self._process is not None
        until = time.monotonic() + PATIENCE_S
        while (found := self._ready.search(self._log.read_text(errors="replace"))) is None:
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise RuntimeError(f"not ready: {self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        self._port = int(found[1].rpartition(":")[2])

    def kill(self) -> None:
        """SIGKILL, and no zombie."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.wait(PATIENCE_S)
            assert process.stdin is not None
            process.stdin.close()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def stub(model_dir: str | Path, log: Path, *options: str) -> Server:
    """`tests.engine_stub`; it ends with this process too, however this one ends."""
    command = [sys.executable, "-m", "tests.engine_stub", str(model_dir), "--port", "{port}", "--follow-stdin"]
    return Server([*command, *options], log, ready=r"ready (\S+)")
