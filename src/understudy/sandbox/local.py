"""Sandboxes on this machine: bubblewrap, or a process that is only limited."""

from __future__ import annotations

import marshal
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import IO, Any

from understudy.errors import EngineError, RecipeError, check_range
from understudy.sandbox import inside
from understudy.sandbox.base import Outcome, Program, Result, Sandbox, need_linux
from understudy.sandbox.seccomp import filter_program

NOBODY = "65534"
"""Programs of a trainer that is root run as this user: for root the kernel counts no processes."""
_BEGIN = "import os,sys,marshal;j=int(sys.argv[2]);exec(marshal.loads(os.read(j,int.from_bytes(os.read(j,4),'big'))))"
"""Runs the code at the beginning of the job: to compile it costs more than all else of a short program."""
_MAX_REPORT_BYTES = 2**16
_LINGER_S = 1.0
"""Time for a process to end that has closed its channel."""
_INSTALL = (
    "install it (apt-get install bubblewrap, dnf install bubblewrap), or take a remote sandbox (type: remote, url: ...); "
    "{type: process, unsafe: true} runs programs with your own rights"
)
_OPEN_NAMESPACES = (
    "the kernel or the container closes user namespaces; open them (sysctl user.max_user_namespaces=10000, on Debian also "
    "kernel.unprivileged_userns_clone=1, on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0; for docker "
    "--security-opt seccomp=unconfined --security-opt apparmor=unconfined), or take a remote sandbox (type: remote, url: ...)"
)


@dataclass(frozen=True)
class _Process:
    """The settings that a role inside is started with."""

    role: str
    told: dict[str, Any]
    channel: int = -1
    report: int = -1
    stdin: int = subprocess.DEVNULL
    stdout: int = subprocess.DEVNULL
    stderr: int = subprocess.DEVNULL


@dataclass(frozen=True, kw_only=True)
class Local(Sandbox):
    """A sandbox on this machine."""

    file_mb: int = 16
    """Size of a file that a program may write, in MiB."""
    packages: bool = False
    """Whether programs may import the packages that are installed beside this one, such as numpy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, "file_mb")

    @abstractmethod
    def _command(self, extra: list[int], packages: Sequence[str]) -> list[str]:
        """Returns the command before the interpreter. Descriptors that it needs are added to `extra`, to be closed here.

        `packages`: folders that it may see.
        """

    @property
    def _processes(self) -> int:
        """Processes and threads that a program may have; -1: any number."""
        return -1

    @contextmanager
    def _started(self, process: _Process) -> Iterator[subprocess.Popen[bytes]]:
        """A process that is ended with the block."""
        mb = 2**20
        limits = {"cpu_s": self.cpu_s, "memory": self.memory_mb * mb, "file": self.file_mb * mb}
        # tests are no model's, and those of some data sets need numpy
        packages = _package_folders() if self.packages or process.role == "judge" else []
        told = {**process.told, "limits": {**limits, "processes": self._processes}, "packages": packages}
        with ExitStack() as stack:
            descriptors = list[int]()
            stack.callback(_close, descriptors)
            descriptors.append(_file(inside.framed(_bytecode()) + inside.framed(inside.encode(told))))
            job = descriptors[0]
            # where bubblewrap says which process is the first of its namespace
            told_by, tells = os.pipe()
            stack.callback(os.close, told_by)
            descriptors.append(tells)
            command = self._command(descriptors, packages)
            folder = None
            if not command:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="understudy-sandbox-"))
            running = subprocess.Popen(  # noqa: S603 (our own interpreter and text)
                # -I and -S: no folder of the user, no file that runs at the start; they also cost time
                [*command, _interpreter(), *("-I", "-S", "-B", "-X", "utf8", "-c", _BEGIN, process.role)]
                + [str(number) for number in (job, process.channel, process.report)],
                stdin=process.stdin,
                stdout=process.stdout,
                stderr=process.stderr,
                cwd=folder or "/",
                env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                pass_fds=[number for number in (*descriptors, process.channel, process.report) if number >= 0],
                start_new_session=True,
            )
            # leaving it closes the pipes and waits
            with running:
                try:
                    yield running
                finally:
                    _end(running, told_by)

    def _run(self, program: Program) -> Result:
        need_linux("bubblewrap or process")
        for _ in range(2):
            start = time.monotonic()
            result = self._tested(program) if program.tests is not None else self._script(program)
            if isinstance(result, Result):
                return replace(result, seconds=time.monotonic() - start)
        self.check()
        raise EngineError(f"the sandbox did not start a program, twice: {result or 'nothing more is said'}")

    def _script(self, program: Program) -> Result | str:
        """Returns the result of a program without tests; a string where the sandbox did not work."""
        with ExitStack() as stack:
            stdin = _file(program.stdin.encode())
            stack.callback(os.close, stdin)
            reads, writes = os.pipe()
            stack.callback(os.close, reads)
            try:
                process = _Process(
                    "script", {"code": program.code}, -1, writes, stdin, subprocess.PIPE, subprocess.PIPE
                )
                running = stack.enter_context(self._started(process))
            finally:
                os.close(writes)
            begin = time.monotonic()
            end = begin + self.wall_s
            assert running.stdout is not None
            assert running.stderr is not None
            most = self.output_kb * 1024
            texts, over = _read([running.stdout, running.stderr], end, most)
            stdout, stderr = (text.decode("utf-8", "replace") for text in texts)
            if over == "too long":
                return Result("failed", stdout, stderr, f"it wrote more than {self.output_kb} KiB")
            if over:
                return Result("timed out", stdout, stderr, f"it took more than {self.wall_s:g} s")
            try:
                running.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                return Result("timed out", stdout, stderr, f"it took more than {self.wall_s:g} s")
            if not os.read(reads, 1):
                return " ".join(stderr.split())[-500:]
            status = _status(running)
            if status == 0:
                return Result("passed", stdout, stderr)
            if (found := self._of_limit(status, time.monotonic() - begin)) is not None:
                return replace(found, stdout=stdout, stderr=stderr)
            last = stderr.rstrip().rpartition("\n")[2][:300]
            spent = last.startswith("MemoryError")
            return Result(
                "out of memory" if spent else "failed", stdout, stderr, last or f"it ended with status {status}"
            )

    def _tested(self, program: Program) -> Result | str:
        """Returns the result of a program's tests, which run in a sandbox of their own; a string where that did not work."""
        with ExitStack() as stack:
            reads, writes = os.pipe()
            stack.callback(os.close, reads)
            ours, theirs = socket.socketpair()
            complaints = _file(b"")
            stack.callback(os.close, complaints)
            try:
                told = {"tests": program.tests, "names": list(program.names)}
                asks = _Process("judge", told, ours.fileno(), writes, stderr=complaints)
                judge = stack.enter_context(self._started(asks))
                answers = _Process("serve", {"code": program.code}, theirs.fileno())
                served = stack.enter_context(self._started(answers))
            finally:
                os.close(writes)
                ours.close()
                theirs.close()
            begin = time.monotonic()
            report = open(reads, "rb", buffering=0, closefd=False)  # noqa: SIM115 (the stack closes it)
            (data,), over = _read([report], begin + self.wall_s, _MAX_REPORT_BYTES)
            if over:
                return Result("timed out", note=f"it took more than {self.wall_s:g} s")
            started = inside.framed(inside.STARTED)
            if not data.startswith(started):
                return " ".join(os.pread(complaints, 500, 0).decode("utf-8", "replace").split())
            if len(data) == len(started):
                return self._ended(judge, begin, "its tests ended before they were over")
            outcome, note = map(str, inside.decode(data[len(started) + 4 :]))
            if outcome == "not started":
                return note
            if outcome == "ended":
                return self._ended(served, begin, note)
            known: dict[str, Outcome] = {"passed": "passed", "memory": "out of memory"}
            return Result(known.get(outcome, "failed"), note=note)

    def _ended(self, running: subprocess.Popen[bytes], begin: float, note: str) -> Result:
        """The result of a process that has left in the middle of its tests."""
        try:
            running.wait(_LINGER_S)
        except subprocess.TimeoutExpired:
            return Result("failed", note=note)
        status = _status(running)
        return self._of_limit(status, time.monotonic() - begin) or Result(
            "failed", note=f"{note}, with status {status}"
        )

    def _of_limit(self, status: int, seconds: float) -> Result | None:
        """Reads a status that the kernel gives. A program may give it too: either is no pass."""
        # it is killed a second after a signal that it handles
        if status == 128 + signal.SIGXCPU or (status == 128 + signal.SIGKILL and seconds >= self.cpu_s):
            return Result("timed out", note=f"it took more than {self.cpu_s} s of processor time")
        if status == 128 + signal.SIGKILL:
            return Result("out of memory", note="it was killed, as the kernel does where memory is short")
        return None


@dataclass(frozen=True, kw_only=True)
class Bubblewrap(Local):
    """The sandbox `bubblewrap`: namespaces of its own, no network, a root that it can only read, and few system calls."""

    threads: int = 32
    """Threads of a program; it cannot start processes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, "threads")

    def check(self) -> str:
        need_linux("bubblewrap")
        setup = _setup()
        return f"sandbox: bubblewrap{', as nobody' if setup.prefix else ''}, {self.num_workers} programs at a time"

    @property
    def _processes(self) -> int:
        return self.threads

    def _command(self, extra: list[int], packages: Sequence[str]) -> list[str]:
        return _bubblewrap(_setup(), extra, self.file_mb, packages)


@dataclass(frozen=True, kw_only=True)
class Process(Local):
    """The sandbox `process`: limits on time, memory and files, and nothing else. A program can do what you can."""

    unsafe: bool = False
    """True says that you know: programs may read and delete your files, and talk to the network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.unsafe:
            raise ValueError(
                "a process is no sandbox: what a model wrote would run with your rights. Take type: bubblewrap, or say "
                "unsafe: true, on a machine that has nothing to lose"
            )

    def check(self) -> str:
        need_linux("process")
        return f"sandbox: NONE, programs run with the rights of this user, {self.num_workers} at a time"

    def _command(self, extra: list[int], packages: Sequence[str]) -> list[str]:
        return []


@dataclass(frozen=True)
class _Setup:
    """How bubblewrap works here."""

    bwrap: str
    prefix: tuple[str, ...]
    """The command that becomes nobody."""
    threads: bool
    """Whether the kernel counts threads, so that a program may have some."""


@cache
def _setup() -> _Setup:
    """Tries bubblewrap once. Raises RecipeError with what to do."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise RecipeError(f"the sandbox needs bubblewrap, and there is no `bwrap` here; {_INSTALL}")
    told = subprocess.run([bwrap, "--help"], capture_output=True, text=True, check=False)  # noqa: S603
    if "--size" not in told.stdout + told.stderr:
        raise RecipeError(f"{bwrap} is too old: the sandbox needs bubblewrap 0.7 or later; install that")
    tried = [_Setup(bwrap, (), threads=os.geteuid() != 0)]
    setpriv = shutil.which("setpriv")
    if os.geteuid() == 0 and setpriv is not None:
        nobody = (setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--")
        tried.insert(0, _Setup(bwrap, nobody, threads=True))
    complaint = ""
    for setup in tried:
        extra = list[int]()
        try:
            # all that is ever shown: nobody may not see what lies in a home
            command = _bubblewrap(setup, extra, 1, _package_folders())
            run = subprocess.run(  # noqa: S603
                [*command, _interpreter(), "-I", "-S", "-c", "print('ready')"],
                pass_fds=extra,
                capture_output=True,
                text=True,
                timeout=60,
                env={},
                cwd="/",
                check=False,
            )
        finally:
            for number in extra:
                os.close(number)
        if run.stdout == "ready\n":
            return setup
        complaint = " ".join(run.stderr.split())[-300:]
    raise RecipeError(f"bubblewrap does not work here ({complaint or 'it says nothing'}): {_OPEN_NAMESPACES}")


def _bubblewrap(setup: _Setup, extra: list[int], tmp_mb: int, packages: Sequence[str]) -> list[str]:
    """The command before the interpreter; the descriptor of its filter is added to `extra`, whose last one gets the facts
    of the namespace."""
    info = ["--info-fd", str(extra[-1])] if extra else []
    try:
        extra.append(_file(filter_program(threads=setup.threads)))
    except ValueError as error:
        raise RecipeError(f"the sandbox does not work on this machine: {error}") from error
    shown = [argument for path in (*_shown(), *packages) for argument in ("--ro-bind", path, path)]
    links = [argument for link, target in _links() for argument in ("--symlink", target, link)]
    devices = [
        argument for name in ("null", "zero", "random", "urandom") for argument in ("--dev-bind", *[f"/dev/{name}"] * 2)
    ]
    return [
        *setup.prefix,
        setup.bwrap,
        *("--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
        *("--uid", "1000", "--gid", "1000", "--hostname", "sandbox", "--clearenv", "--cap-drop", "ALL"),
        # numpy would start a thread for each processor
        *("--setenv", "OPENBLAS_NUM_THREADS", "1", "--setenv", "OMP_NUM_THREADS", "1"),
        # without a first process between: bubblewrap leaves that behind for whoever adopts orphans, often nobody
        *("--as-pid-1", "--die-with-parent", "--new-session", "--seccomp", str(extra[-1]), *info),
        # before what is shown, which may lie below it
        *("--size", str(tmp_mb * 2**20), "--tmpfs", "/tmp"),  # noqa: S108
        # no /proc: there is nothing in it that a program for a task needs
        *shown,
        *links,
        *devices,
        *("--chdir", "/tmp", "--remount-ro", "/", "--"),  # noqa: S108
    ]


@cache
def _interpreter() -> str:
    """The interpreter behind a virtual environment, which needs none of its files."""
    return os.path.realpath(sys.executable)


@cache
def _shown() -> tuple[str, ...]:
    """The part of the file system that Python needs: itself, its library and the system's."""
    libraries = sysconfig.get_path("stdlib", vars={"base": sys.base_prefix, "installed_base": sys.base_prefix})
    own = [_interpreter(), str(Path(libraries).parent)]
    system = ["/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache"]
    found = [path for path in (*own, *system) if os.path.exists(path) and not os.path.islink(path)]
    # one that lies in another is there already
    return tuple(path for path in dict.fromkeys(found) if not any(path.startswith(f"{other}/") for other in found))


@cache
def _links() -> tuple[tuple[str, str], ...]:
    """Folders of the system that are links, as /lib to /usr/lib."""
    paths = ["/lib", "/lib32", "/lib64", "/usr/lib64"]
    return tuple((path, os.readlink(path)) for path in paths if os.path.islink(path))


def _package_folders() -> list[str]:
    paths = sysconfig.get_paths()
    return list(dict.fromkeys((paths["purelib"], paths["platlib"])))


@cache
def _bytecode() -> bytes:
    """`inside.py` compiled for this interpreter."""
    text = Path(inside.__file__).read_text(encoding="utf-8")
    return marshal.dumps(compile(text, "inside.py", "exec"))


def _close(descriptors: list[int]) -> None:
    for number in descriptors:
        os.close(number)


def _file(content: bytes) -> int:
    """The descriptor of a file in memory, at its beginning."""
    number = os.memfd_create("understudy-sandbox")
    with open(number, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(number, 0, os.SEEK_SET)
    return number


def _read(files: Sequence[IO[bytes]], end: float, most: int) -> tuple[list[bytes], str]:
    """Returns all that is written until the files are closed, and why it ended before: "timed out", "too long", else ""."""
    contents = {file.fileno(): bytearray() for file in files}
    poll, left = select.poll(), len(contents)
    for number in contents:
        poll.register(number, select.POLLIN)
    stopped = ""
    while left and not stopped:
        ready = poll.poll(max(0.0, end - time.monotonic()) * 1000)
        if not ready:
            stopped = "timed out"
        for number, _ in ready:
            part = os.read(number, 2**16)
            contents[number] += part
            if not part:
                poll.unregister(number)
                left -= 1
            if len(contents[number]) > most:
                stopped = "too long"
    return [bytes(content[:most]) for content in contents.values()], stopped


def _end(running: subprocess.Popen[bytes], told_by: int) -> None:
    """Kills it with what it has started.

    Of bubblewrap it kills the one process of the namespace, which bubblewrap waits for. To kill bubblewrap instead would leave
    that process to whoever adopts orphans, and in many containers nobody does.
    """
    if running.poll() is not None:
        return
    os.set_blocking(told_by, False)
    try:
        told = os.read(told_by, 4096)
    except BlockingIOError:
        told = b""
    if first := re.search(rb'"child-pid": (\d+)', told):
        with suppress(ProcessLookupError):
            os.kill(int(first[1]), signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            running.wait(_LINGER_S)
            return
    with suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    running.wait()


def _status(running: subprocess.Popen[bytes]) -> int:
    """The exit status, 128 and more for a signal, as bubblewrap says it too."""
    status = running.returncode
    return 128 - status if status < 0 else status
