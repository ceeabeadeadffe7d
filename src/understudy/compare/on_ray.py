"""Cells as tasks of Ray, on whatever machines it has. They need to see the same files."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from understudy.compare.processes import POLL_S, Ended, Job, Stopped, ending, threads_each, work
from understudy.errors import RecipeError


def check_ray() -> None:
    """Raises RecipeError where Ray is missing."""
    if importlib.util.find_spec("ray") is None:
        raise RecipeError("--ray needs the package ray; run: pip install 'understudy[ray]'")


def run_on_ray(jobs: Sequence[Job], num_at_once: int, stopped: Stopped) -> Iterator[Ended]:
    """As `run_processes`; with a GPU in the cluster each job takes one. A stopped job is cancelled and resumes later."""
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    # max_calls: a worker process runs one cell, so that peak memory is the cell's own
    task = ray.remote(num_cpus=threads_each(num_at_once), num_gpus=gpus, max_calls=1, max_retries=0)(work_on_ray)
    waiting = list(enumerate(jobs))[::-1]
    running: dict[object, int] = {}
    asked = False
    while (waiting and not asked) or running:
        while waiting and len(running) < num_at_once and not asked:
            index, job = waiting.pop()
            running[task.remote(job)] = index
        for reference in ray.wait(list(running), timeout=POLL_S)[0]:
            index = running.pop(reference)
            try:
                code = ray.get(reference)
            except Exception as error:
                message = f"Ray: {type(error).__name__}: {' '.join(str(error).split())}"
                yield Ended(index, message, stopped=asked)
            else:
                yield ending(index, code, Path(jobs[index].log))
        if not asked and stopped():
            asked = True
            for reference in running:
                ray.cancel(reference)


def work_on_ray(job: Job) -> int:
    """`work` with its output in the log."""
    with Path(job.log).open("a", encoding="utf-8", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        return work(job)
