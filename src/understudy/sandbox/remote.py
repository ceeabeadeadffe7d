"""A sandbox behind a URL, with SandboxFusion's interface."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.errors import EngineError, RecipeError, check_range
from understudy.http.client import HttpClient, RetryPolicy
from understudy.http.replies import BadReply, Refused, Reply, check_address, check_key, check_variable
from understudy.sandbox import inside
from understudy.sandbox.base import Outcome, Program, Result, Sandbox

_MAX_REPLY_BYTES = 64 * 2**20
_WITH_TESTS = """
import os, socket, subprocess, sys
try:
    # the secret stands in this file
    os.unlink(os.path.abspath(__file__))
except OSError:
    pass
try:
    import ctypes
    # processes of the same user cannot look into this one then
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
except (ImportError, AttributeError, OSError):
    # a system without such a call
    pass
text, tests, names, job, secret = {parts}
inside = dict(__name__="inside")
exec(compile(text, "inside.py", "exec"), inside)
ours, theirs = socket.socketpair()
reads, writes = os.pipe()
report_reads, report_writes = os.pipe()
child = subprocess.Popen(
    [sys.executable, "-I", "-B", "-X", "utf8", "-c", text, "serve", str(reads), str(theirs.fileno()), "-1"],
    pass_fds=[reads, theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    start_new_session=True,
)
os.close(reads)
theirs.close()
with open(writes, "wb") as file:
    file.write(job)
try:
    inside["judge"](tests, names, inside["Channel"](ours.fileno()), inside["Channel"](report_writes))
finally:
    child.kill()
os.close(report_writes)
with open(report_reads, "rb") as file:
    print(secret + file.read().hex(), flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Remote(Sandbox):
    """The sandbox `remote`: a server with SandboxFusion's interface (`POST /run_code`), or several.

    What a program may do there is up to the server. Its tests and the program share the server's container, in two
    processes: what stands between them is weaker than with `bubblewrap`.
    """

    url: str | tuple[str, ...]
    """The address of the server, or a list: programs are spread over all of them."""
    api_key_env: str = ""
    """The name of the environment variable with the key, if the server wants one."""
    max_retries: int = 5
    """Retries after a timeout, a lost connection or an error of the server."""
    workers: int | None = 32
    """Programs at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 0, "max_retries")
        check_variable(self.api_key_env, "api_key_env")
        try:
            for url in self._urls:
                check_address(url, "sandbox.url")
        except RecipeError as error:
            raise ValueError(str(error)) from error
        if not self._urls:
            raise ValueError("url is an empty list; give the address of a server")

    @property
    def _urls(self) -> tuple[str, ...]:
        return (self.url,) if isinstance(self.url, str) else tuple(self.url)

    def check(self) -> str:
        check_key(self.api_key_env)
        result = self.run(Program("print('ready')"))
        if result.stdout.strip() != "ready":
            said = result.note or result.stdout or result.stderr
            raise RecipeError(f"the sandbox at {', '.join(self._urls)} does not run Python: {said[:300]}")
        return f"sandbox: {', '.join(self._urls)}, {self.num_workers} programs at a time"

    def _run(self, program: Program) -> Result:
        secret = secrets.token_hex(16)
        code = program.code if program.tests is None else self._with_tests(program, secret)
        body: dict[str, Any] = {
            "language": "python",
            "code": code,
            "stdin": program.stdin,
            "compile_timeout": self.wall_s,
            "run_timeout": self.wall_s,
            "memory_limit_MB": self.memory_mb,
        }
        policy = RetryPolicy(
            timeout_s=2 * self.wall_s + 30,
            deadline_s=20 * self.wall_s + 300,
            max_retries=self.max_retries,
            max_concurrency=1,
        )
        with HttpClient(
            self._urls,
            name="sandbox",
            retry_policy=policy,
            api_key_env=self.api_key_env,
            max_reply_bytes=_MAX_REPLY_BYTES,
        ) as client:
            try:
                ran = client.request("run_code", _ran, key=f"program {secret[:8]}", json=body)
            except Refused as error:
                if error.status in (400, 413, 422):
                    return Result("refused", note=f"the sandbox refuses the program: {error.message}")
                raise EngineError(f"the sandbox at {', '.join(self._urls)} answers with {error}") from error
        return self._result(ran, None if program.tests is None else secret)

    def _with_tests(self, program: Program, secret: str) -> str:
        limits = {"cpu_s": self.cpu_s, "memory": self.memory_mb * 2**20, "file": 16 * 2**20, "processes": -1}
        job = inside.framed(inside.encode({"code": program.code, "limits": limits, "packages": []}))
        text = Path(inside.__file__).read_text(encoding="utf-8")
        return _WITH_TESTS.replace("{parts}", repr((text, program.tests, list(program.names), job, secret)))

    def _result(self, ran: dict[str, Any], secret: str | None) -> Result:
        stdout, stderr = (str(ran.get(name) or "") for name in ("stdout", "stderr"))
        seconds = float(ran.get("execution_time") or 0.0)
        if ran["status"] == "TimeLimitExceeded":
            return Result("timed out", stdout, stderr, f"it took more than {self.wall_s:g} s", seconds)
        status = ran.get("return_code")
        last = stderr.rstrip().rpartition("\n")[2][:300]
        if secret is not None:
            _, found, told = stdout.rpartition(secret)
            if not found:
                return Result("failed", note=last or "its tests ended before they were over", seconds=seconds)
            data = bytes.fromhex(told.strip())[len(inside.framed(inside.STARTED)) + 4 :]
            outcome, note = inside.decode(data)
            known: dict[str, Outcome] = {"passed": "passed", "memory": "out of memory"}
            return Result(known.get(outcome, "failed"), note=note, seconds=seconds)
        if len(stdout) > self.output_kb * 1024:
            return Result(
                "failed", stdout[: self.output_kb * 1024], stderr, f"it wrote more than {self.output_kb} KiB", seconds
            )
        if status == 0:
            return Result("passed", stdout, stderr, seconds=seconds)
        spent = status in (137, -9) or last.startswith("MemoryError")
        return Result(
            "out of memory" if spent else "failed", stdout, stderr, last or f"it ended with status {status}", seconds
        )


def _ran(reply: Reply) -> dict[str, Any]:
    """The `run_result` of a reply. Raises BadReply where the server itself failed."""
    values = reply.json()
    if not isinstance(values, dict) or values.get("status") not in ("Success", "Failed", "SandboxError"):
        raise BadReply(f"no reply of SandboxFusion: {reply.text[:200]}")
    ran = values.get("run_result")
    if values["status"] == "SandboxError" or not isinstance(ran, dict):
        raise BadReply(f"the sandbox failed: {str(values.get('message'))[:200]}")
    if ran.get("status") not in ("Finished", "TimeLimitExceeded"):
        raise BadReply(f"the sandbox failed: {str(ran)[:200]}")
    return ran
