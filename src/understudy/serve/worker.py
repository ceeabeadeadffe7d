"""One thread that uses the model, and a queue before it: requests that wait together are answered together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition, Thread

import torch

from understudy.serve.scorer import Refusal, Scorer
from understudy.teachers.remote.frames import Answer, Ask

MAX_WAITING = 1_024
"""Requests."""
MAX_WAITING_TOKENS = 16 * 2**20
"""64 MiB of ids; one request more is always taken where none waits."""
RETRY_AFTER_S = 1
OUT_OF_MEMORY = "the teacher ran out of memory: lower its --max-batch-tokens, or ask for fewer samples at a time"
DEAD = "the thread that answers has ended: restart the teacher"
CLOSE_S = 30.0
"""How long a forward that is under way may take to end."""
IDLE_S = 60.0
"""Between two looks for work that nobody has announced."""
NOTE_EVERY_S = 60.0


@dataclass(eq=False)
class _Job:
    ask: Ask
    reply_bytes: int
    answer: Future[Answer] = field(default_factory=Future)


class Worker:
    """Answers in the order of arrival; of those that wait, requests of the same kind go with the first."""

    def __init__(self, scorer: Scorer, *, reply_bytes: int, note: Callable[[str], None] | None = None) -> None:
        self._scorer = scorer
        self._reply_bytes = reply_bytes
        self._note = note
        self._jobs: deque[_Job] = deque()
        self._waiting_tokens = 0
        self._changed = Condition()
        self._closed = False
        self._served = _Served()
        self._thread = Thread(target=self._run, name="understudy-teacher", daemon=True)
        self._thread.start()

    def submit(self, ask: Ask) -> Future[Answer]:
        """Raises Refusal for what the model cannot answer, with 429 where too much waits, 503 where nobody answers."""
        self._scorer.check(ask)
        job = _Job(ask, self._scorer.reply_bytes(ask))
        if job.reply_bytes > self._reply_bytes:
            raise Refusal(
                413,
                f"the answer would take {job.reply_bytes:,} bytes, at most {self._reply_bytes:,} are given "
                "(--max-reply-bytes): ask for fewer samples at a time, or a smaller k",
            )
        with self._changed:
            if self._closed:
                raise Refusal(503, "the server is stopping")
            if not self.alive:
                raise Refusal(503, DEAD)
            full = len(self._jobs) >= MAX_WAITING or self._waiting_tokens + ask.num_tokens > MAX_WAITING_TOKENS
            if self._jobs and full:
                raise Refusal(
                    429, f"{len(self._jobs):,} requests wait already: ask later", {"Retry-After": str(RETRY_AFTER_S)}
                )
            self._jobs.append(job)
            self._waiting_tokens += ask.num_tokens
            self._changed.notify()
        return job.answer

    @property
    def alive(self) -> bool:
        """Whether what is submitted will be answered."""
        return self._thread.is_alive() and not self._closed

    def close(self) -> None:
        """What waits is told so; the forward under way ends first, or is left behind after `CLOSE_S`."""
        with self._changed:
            self._closed = True
            jobs = list(self._jobs)
            self._jobs.clear()
            self._changed.notify()
        for job in jobs:
            if job.answer.set_running_or_notify_cancel():
                job.answer.set_exception(Refusal(503, "the server is stopping"))
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._closed:
                    self._changed.wait(IDLE_S)
                if self._closed:
                    return
                jobs = self._take()
            alive = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
            try:
                if alive:
                    self._answer(alive)
            except BaseException as error:  # nobody else can answer, so this thread does not end before `close`
                for job in alive:
                    if not job.answer.done():
                        job.answer.set_exception(_told(error))

    def _take(self) -> list[_Job]:
        """The first that waits, and those of its kind that fit beside it."""
        taken, left = [self._jobs[0]], deque[_Job]()
        kind, tokens, size = taken[0].ask.kind, taken[0].ask.num_tokens, taken[0].reply_bytes
        for job in list(self._jobs)[1:]:
            more = tokens + job.ask.num_tokens, size + job.reply_bytes
            if job.ask.kind == kind and more[0] <= self._scorer.max_batch_tokens and more[1] <= self._reply_bytes:
                taken.append(job)
                tokens, size = more
            else:
                left.append(job)
        self._jobs = left
        self._waiting_tokens -= sum(job.ask.num_tokens for job in taken)
        return taken

    def _answer(self, jobs: Sequence[_Job]) -> None:
        started = time.perf_counter()
        try:
            answers = self._scorer.score([job.ask for job in jobs])
        except BaseException as error:  # whatever the model raises is told to who asked, and the server goes on
            if len(jobs) > 1:
                # nobody's request may fail for another's
                for job in jobs:
                    self._answer([job])
                return
            memory = isinstance(error, torch.OutOfMemoryError)
            jobs[0].answer.set_exception(Refusal(500, OUT_OF_MEMORY) if memory else _told(error))
            return
        for job, answer in zip(jobs, answers, strict=True):
            job.answer.set_result(answer)
        self._served.add(len(jobs), sum(job.ask.num_tokens for job in jobs), time.perf_counter() - started)
        line = self._served.line()
        if line is not None and self._note is not None:
            # whoever read the lines may be gone, or the disk full
            with suppress(OSError, ValueError):
                self._note(line)


def _told(error: BaseException) -> Exception:
    """What a future and an event loop can carry: an error of an extension may be no Exception."""
    return error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")


class _Served:
    """What was done since the last line."""

    def __init__(self) -> None:
        self._total = 0
        self._since = time.monotonic()
        self._requests, self._tokens, self._busy_s = 0, 0, 0.0

    def add(self, requests: int, tokens: int, busy_s: float) -> None:
        self._total += requests
        self._requests += requests
        self._tokens += tokens
        self._busy_s += busy_s

    def line(self) -> str | None:
        """None where the last line is young."""
        now = time.monotonic()
        if now - self._since < NOTE_EVERY_S:
            return None
        said = (
            f"{self._total:,} requests answered; in the last {now - self._since:.0f} s {self._requests:,} with "
            f"{self._tokens:,} tokens, {self._tokens / max(self._busy_s, 1e-9):,.0f} tokens/s while busy"
        )
        self._since = now
        self._requests, self._tokens, self._busy_s = 0, 0, 0.0
        return said
