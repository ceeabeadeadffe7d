"""Runs cells in separate processes or as Ray tasks: memory, crashes and signals of one do not reach another.

Processes are forked from a server that has imported everything and computed nothing, so that a cell starts at once. A pool of
`concurrent.futures` would not do: it breaks as a whole when one worker dies, and cannot ask a single one to save and end.
The machines of Ray need to see the same files.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from understudy import config
from understudy.errors import RecipeError, UnderstudyError
from understudy.text import printable

FAILED, STOPPED = 1, 130
POLL_S = 0.2
"""Seconds until a signal is passed on."""
MAX_ERROR_CHARS = 2_000
# the last two are imported on first use, by the optimizer and by the model: two seconds of a core for every cell
PRELOAD = [__name__, "understudy.run", "torch._dynamo", "transformers.models.auto.modeling_auto"]

_EXCEPTION = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt)\b")
"""Begins the line of a traceback that names the error."""
_BAR = re.compile(r"\d%\||\d(it|B)/s|s/it")
"""In a line of a progress bar."""

Stopped = Callable[[], bool]


@dataclass(frozen=True)
class Job:
    """A run to make, as plain values that another machine can read."""

    recipe: dict[str, Any]
    resume: bool
    log: str


@dataclass(frozen=True)
class Ended:
    """The ending of a job. `error` is one line; None for a run that reached its end."""

    index: int
    error: str | None
    stopped: bool = False


def run_processes(jobs: Sequence[Job], num_at_once: int, stopped: Stopped) -> Iterator[Ended]:
    """Runs the jobs in order, `num_at_once` at a time; yields each as it ends.

    Once `stopped()` is true no job is started, and those that run are asked to save and end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    waiting = list(enumerate(jobs))[::-1]
    running: dict[Any, tuple[int, ForkServerProcess]] = {}
    asked = False
    begun = [_size(job.log) for job in jobs]
    # the processes inherit it when the server starts
    sets_threads = num_at_once > 1 and "OMP_NUM_THREADS" not in os.environ
    if sets_threads:
        os.environ["OMP_NUM_THREADS"] = str(threads_each(num_at_once))
    try:
        while (waiting and not asked) or running:
            while waiting and len(running) < num_at_once and not asked:
                index, job = waiting.pop()
                process = context.Process(target=work_in_process, args=(job,))
                process.start()
                running[process.sentinel] = (index, process)
            for sentinel in wait(list(running), timeout=POLL_S):
                index, process = running.pop(sentinel)
                process.join()
                yield ending(index, process.exitcode or 0, Path(jobs[index].log), begun[index])
            if not asked and stopped():
                asked = True
                for _, process in running.values():
                    process.terminate()
    finally:
        if sets_threads:
            del os.environ["OMP_NUM_THREADS"]
        for _, process in running.values():
            process.kill()
            process.join()


def work_in_process(job: Job) -> None:
    """The body of a cell's process. Exits with 0, 1 for a failure (its last line is in the log) or 130 for a signal."""

    def end_with_parent() -> None:
        # saves and ends the run when the comparison is gone: nobody else would wait for it
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    # a terminal's Ctrl-C goes to the whole group; the comparison alone receives it and passes it on once
    os.setsid()
    threading.Thread(target=end_with_parent, daemon=True).start()
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, encoding="utf-8", closefd=False) for stream in (1, 2))  # noqa: SIM115
    sys.exit(work(job))


def work(job: Job) -> int:
    """Trains. Prints an error as the last line, `error: ...`."""
    from understudy import run
    from understudy.recipe import Recipe
    from understudy.trainer.console import Console, endured

    try:
        with endured(), Console() as console:
            result = run.train(config.parse(Recipe, job.recipe), resume=job.resume, console=console)
    except KeyboardInterrupt:
        return STOPPED
    except Exception as error:
        text = " ".join(str(error).split())
        if not isinstance(error, UnderstudyError):
            print(printable(traceback.format_exc()), file=sys.stderr)
            text = f"{type(error).__name__}: {text}"
        # a progress bar may have left its line open
        print(f"\nerror: {printable(text)}", file=sys.stderr)
        return FAILED
    return STOPPED if result.ending == "stopped by a signal" else 0


def ending(index: int, code: int, log: Path, begun: int = 0) -> Ended:
    """From an exit code of `work`, or the signal that ended its process (negative).

    `begun`: bytes that the log had when the job began, the output of earlier tries.
    """
    if code == 0:
        return Ended(index, None)
    if code in (-signal.SIGTERM, -signal.SIGINT):
        return Ended(index, "stopped by a signal before its first step", stopped=True)
    if code < 0:
        hint = ": the machine may have run out of memory" if code == -signal.SIGKILL else ""
        return Ended(index, f"the process was ended by {signal.Signals(-code).name}{hint}")
    try:
        text = log.read_bytes()[begun:].decode(errors="replace")
    except OSError as error:
        return Ended(index, f"it ended with code {code}, and its log cannot be read: {error}", stopped=code == STOPPED)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    raised = [line for line in lines if _EXCEPTION.match(line)]
    others = [line for line in lines if not _BAR.search(line)]
    found = next(
        (part[-1] for part in (told, raised, others) if part), f"it ended with code {code} and printed nothing"
    )
    return Ended(index, printable(found)[:MAX_ERROR_CHARS], stopped=code == STOPPED)


def _size(log: str) -> int:
    path = Path(log)
    return path.stat().st_size if path.is_file() else 0


def threads_each(num_at_once: int) -> int:
    """Cores for each of so many runs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // num_at_once)


def check_ray() -> None:
    """Raises RecipeError where Ray is missing."""
    if importlib.util.find_spec("ray") is None:
        raise RecipeError("--ray needs the package ray; run: pip install 'understudy[ray]'")


def run_on_ray(jobs: Sequence[Job], num_at_once: int, stopped: Stopped) -> Iterator[Ended]:
    """Does what `run_processes` does; each job takes a GPU if there is one. A stopped job is cancelled, and resumes later."""
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    # max_calls: a worker process runs one cell, so that peak memory is the cell's own
    task = ray.remote(num_cpus=threads_each(num_at_once), num_gpus=gpus, max_calls=1, max_retries=0)(work_on_ray)
    waiting = list(enumerate(jobs))[::-1]
    running: dict[object, int] = {}
    asked = False
    begun = [_size(job.log) for job in jobs]
    while (waiting and not asked) or running:
        while waiting and len(running) < num_at_once and not asked:
            index, job = waiting.pop()
            running[task.remote(job)] = index
        for reference in ray.wait(list(running), timeout=POLL_S)[0]:
            index = running.pop(reference)
            try:
                code = ray.get(reference)
            except Exception as error:
                message = printable(f"Ray: {type(error).__name__}: {' '.join(str(error).split())}")
                yield Ended(index, message, stopped=asked)
            else:
                yield ending(index, code, Path(jobs[index].log), begun[index])
        if not asked and stopped():
            asked = True
            for reference in running:
                ray.cancel(reference)


def work_on_ray(job: Job) -> int:
    """Does `work` with its output in the log."""
    with Path(job.log).open("a", encoding="utf-8", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        return work(job)
