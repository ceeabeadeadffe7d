"""One thread that uses the model, and a queue before it: requests that wait together are answered together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition, Thread

from understudy.lazy import torch
from understudy.serve.scorer import Refusal, Scorer
from understudy.teachers.remote.protocol import ScoreReply, ScoreRequest

MAX_WAITING = 1_024
"""Requests in the queue."""
MAX_WAITING_TOKENS = 16 * 2**20
"""64 MiB of ids. An empty queue takes a request of any size."""
OUT_OF_MEMORY = "the teacher ran out of memory: lower its --max-batch-tokens, or ask for fewer samples at a time"
DEAD = "the thread that answers has ended: restart the teacher"
CLOSE_S = 30.0
"""Time that a forward under way has to end."""
IDLE_S = 60.0
"""Longest sleep of the thread, in case a notification is lost."""
NOTE_EVERY_S = 60.0


@dataclass(eq=False)
class _Job:
    request: ScoreRequest
    reply_bytes: int
    answer: Future[ScoreReply] = field(default_factory=Future)

    def fail(self, error: BaseException) -> None:
        """Ends the job. A future and an event loop carry Exceptions only, and an extension's error may be none."""
        known = error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
        self.answer.set_exception(known)


class Worker:
    """Answers in the order of arrival; waiting requests of the same kind are answered with the first."""

    def __init__(self, scorer: Scorer, *, reply_bytes: int, note: Callable[[str], None] | None = None) -> None:
        self._scorer = scorer
        self._reply_bytes = reply_bytes
        self._note = note
        self._jobs: deque[_Job] = deque()
        self._waiting_tokens = 0
        self._changed = Condition()
        self._closed = False
        self._num_answered = 0
        self._noted_at = time.monotonic()
        self._noted = 0
        """Requests that were answered before the last note."""
        self._tokens, self._busy_s = 0, 0.0
        """Since the last note."""
        self._thread = Thread(target=self._run, name="understudy-teacher", daemon=True)
        self._thread.start()

    def submit(self, request: ScoreRequest) -> Future[ScoreReply]:
        """Raises Refusal for a request that the model cannot answer, with 429 if too much waits, 503 if nobody answers."""
        self._scorer.check(request)
        job = _Job(request, self._scorer.reply_bytes(request))
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
            full = len(self._jobs) >= MAX_WAITING or self._waiting_tokens + request.num_tokens > MAX_WAITING_TOKENS
            if self._jobs and full:
                raise Refusal(429, f"{len(self._jobs):,} requests wait already: ask later", {"Retry-After": "1"})
            self._jobs.append(job)
            self._waiting_tokens += request.num_tokens
            self._changed.notify()
        return job.answer

    @property
    def alive(self) -> bool:
        """Whether submitted requests will be answered."""
        return self._thread.is_alive() and not self._closed

    def close(self) -> None:
        """Refuses waiting requests; the forward under way ends first, or is left behind after `CLOSE_S`."""
        with self._changed:
            self._closed = True
            jobs, self._jobs = self._jobs, deque()
            self._changed.notify()
        for job in jobs:
            if job.answer.set_running_or_notify_cancel():
                job.fail(Refusal(503, "the server is stopping"))
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._closed:
                    self._changed.wait(IDLE_S)
                if self._closed:
                    return
                jobs = self._take()
            # requests whose clients went away are dropped here
            alive = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
            try:
                if alive:
                    self._answer(alive)
            except BaseException as error:  # nobody else can answer, so this thread does not end before `close`
                for job in alive:
                    if not job.answer.done():
                        job.fail(error)

    def _take(self) -> list[_Job]:
        """Removes from the queue its first request, and those of its kind that fit beside it."""
        taken, left = [self._jobs[0]], deque[_Job]()
        kind, tokens, size = taken[0].request.kind, taken[0].request.num_tokens, taken[0].reply_bytes
        for job in list(self._jobs)[1:]:
            more = tokens + job.request.num_tokens, size + job.reply_bytes
            if job.request.kind == kind and more[0] <= self._scorer.max_batch_tokens and more[1] <= self._reply_bytes:
                taken.append(job)
                tokens, size = more
            else:
                left.append(job)
        self._jobs = left
        self._waiting_tokens -= sum(job.request.num_tokens for job in taken)
        return taken

    def _answer(self, jobs: Sequence[_Job]) -> None:
        started = time.perf_counter()
        try:
            answers = self._scorer.score([job.request for job in jobs])
        except BaseException as error:  # whatever the model raises goes to the client, and the server goes on
            if len(jobs) > 1:
                # nobody's request may fail because of another's
                for job in jobs:
                    self._answer([job])
                return
            jobs[0].fail(Refusal(500, OUT_OF_MEMORY) if isinstance(error, torch.OutOfMemoryError) else error)
            return
        for job, answer in zip(jobs, answers, strict=True):
            job.answer.set_result(answer)
        self._num_answered += len(jobs)
        self._tokens += sum(job.request.num_tokens for job in jobs)
        self._busy_s += time.perf_counter() - started
        since_s = time.monotonic() - self._noted_at
        if self._note is not None and since_s >= NOTE_EVERY_S:
            # the reader of the lines may have gone, or the disk may be full
            with suppress(OSError, ValueError):
                self._note(
                    f"{self._num_answered:,} requests answered; in the last {since_s:.0f} s "
                    f"{self._num_answered - self._noted:,} with {self._tokens:,} tokens, "
                    f"{self._tokens / max(self._busy_s, 1e-9):,.0f} tokens/s while busy"
                )
            self._noted_at, self._noted = time.monotonic(), self._num_answered
            self._tokens, self._busy_s = 0, 0.0
