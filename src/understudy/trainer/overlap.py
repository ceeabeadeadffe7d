"""Generation, scoring and updates at the same time, in the order of the prompts.

Prompts are sent to the engine ahead of the step that uses them, at most `max_staleness` steps; each sample goes to the
teacher the moment it is finished; the trainer takes prompts in their order, whatever order they come back in. So what
is used does not depend on who was fast, long responses are not passed over, and the position of the next prompt is all
that a checkpoint needs: what was in flight is asked for again.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Condition

from understudy.errors import EngineError
from understudy.methods import Method, RolloutPlan
from understudy.trainer.checkpoint import Progress
from understudy.trainer.collect import Collected, Collector
from understudy.trainer.distributed import Ranks
from understudy.trainer.observe import Clock, staleness_of
from understudy.trainer.rollouts import MAX_ROUNDS, Drawn, Rollouts, replaces_flat
from understudy.trainer.settings import Async
from understudy.trainer.tokens import TokenRecorder
from understudy.types import Request

MAX_STALE_DRAWS = 3
"""Times in a row that one prompt's samples may come back too stale until the run stops."""


@dataclass(eq=False)
class _Batch:
    """Prompts that are drawn together and whose samples are used in one step."""

    drawn: Drawn
    """All of its prompts."""
    mine: Drawn
    """Those of this rank."""
    step: int
    """The step that is expected to use it."""
    start: int
    """Position at which `drawn` begins. It names the draws and the samples' indices, so no batch in flight shares either."""
    method: Method
    plan: RolloutPlan
    num_draws: int
    num_chunks: int
    scored: dict[int, Collected] = field(default_factory=dict)
    """By the number of the chunk, requests that are sent to the engine at once; complete when all chunks are there."""
    abandoned: bool = False
    """Nobody waits for it."""


class Overlapped:
    """`Rollouts`, ahead of time. Threads generate and score; everything else happens in the caller's thread."""

    def __init__(self, rollouts: Rollouts, method: Method, settings: Async, *, grouped: bool = False) -> None:
        """`grouped`: the engine wants the samples of a prompt together."""
        self._ranks = rollouts.ranks
        # prompts are split over ranks, so that a group is whole on its rank and no thread waits for another rank
        self.rollouts = replace(rollouts, ranks=Ranks())
        self._method, self._settings, self._train = method, settings, rollouts.collector.settings
        num_engines = rollouts.collector.engine.concurrency
        self._single, self._grouped = num_engines > 1, grouped
        self._batches: deque[_Batch] = deque()
        self._to_score: deque[tuple[_Batch, int, Collected]] = deque()
        # guards `_to_score`, `_error`, `_last_news` and the batches' `scored`, which threads change
        self._changed = Condition()
        self._error: BaseException | None = None
        self._last_news = time.monotonic()
        self._next_position: int | None = None
        self._tokens: TokenRecorder | None = None
        self._generators = ThreadPoolExecutor(num_engines, "understudy-generate")
        scoring = (rollouts.collector.teacher, rollouts.collector.reference)
        num_scorers = min((one.concurrency for one in scoring if one is not None), default=1)
        self._scorers = ThreadPoolExecutor(num_scorers, "understudy-score")

    @property
    def collector(self) -> Collector:
        """As `Rollouts.collector`."""
        return self.rollouts.collector

    def collect(
        self, progress: Progress, method: Method, own_step: int, clock: Clock, tokens: TokenRecorder | None = None
    ) -> Collected:
        """Returns the scored samples of a step, at most `max_staleness` steps old; then sends prompts for the next steps.

        Raises EngineError where nothing comes back for `timeout_s`, and whatever a thread raised.
        """
        self._tokens = tokens
        with clock("wait_s"):
            collected = self._take(progress, method)
            self.collector.engine.verify()
            self._send(progress.step, 0)
        return collected

    def score(self, collected: Collected, method: Method, clock: Clock) -> Collected:
        """Returns this rank's share of the tokens, which have their scores. A collective call.

        Hidden states, from which whole rows are compared, are too large to be sent: such samples stay where they are.
        """
        if "full" in method.needs:
            return collected
        return replace(collected, samples=self._ranks.balance(collected.samples, self._train.minibatches))

    def _take(self, progress: Progress, method: Method) -> Collected:
        """Takes batches in order until the step has its prompts."""
        if self._next_position is None:
            self._next_position = progress.position
        position, wanted, num_used = progress.position, self._train.prompts_per_step, 0
        parts: list[Collected] = []
        while wanted > 0 and num_used < MAX_ROUNDS * self._train.prompts_per_step:
            self._send(progress.step, wanted)
            batch, num_stale = self._first_fresh(progress, method)
            position, num_prompts = batch.drawn.next_position, len(batch.drawn.prompts)
            own = Collected.join([batch.scored[number] for number in sorted(batch.scored)], position)
            # one that was drawn twice counts twice
            num_flat = sum(name in own.flat_prompts for name in batch.mine.names)
            counts = Counter(prompts_flat=num_flat)
            if num_stale:
                counts["samples_stale"] = num_stale
            if self._ranks.is_main:
                counts["prompts_too_long"] = batch.drawn.num_too_long
            parts += [own, Collected([], counts=counts, positions=batch.drawn.positions)]
            num_used += num_prompts
            # on every rank the same: the next step begins where this one ends
            wanted -= num_prompts - (sum(self._ranks.gather(num_flat)) if replaces_flat(batch.plan) else 0)
        return Collected.join(parts, position)

    def _first_fresh(self, progress: Progress, method: Method) -> tuple[_Batch, int]:
        """Waits for the next batch and removes it from the queue; also returns how many stale samples were thrown away.

        A batch that is too stale, or was made for another phase of the method, is written again.
        """
        allowed = self._settings.max_staleness * self._train.minibatches * self._train.passes
        num_stale = 0
        while True:
            batch = self._batches[0]
            self._wait_for(batch)
            written = [sample for part in batch.scored.values() for sample in part.written]
            versions_behind = staleness_of(written, progress.updates)
            staleness = int(versions_behind.max()) if versions_behind.numel() else 0
            if batch.method is method and staleness <= allowed:
                return self._batches.popleft(), num_stale
            if staleness > allowed:
                num_stale += len(written)
                if batch.num_draws > MAX_STALE_DRAWS:
                    raise EngineError(
                        f"the samples of prompt {batch.drawn.names[0]} came back {staleness} updates old {batch.num_draws} "
                        f"times in a row, async.max_staleness allows {allowed}: does the rollout engine take the weights that "
                        "are pushed?"
                    )
            size, num_draws = len(batch.drawn.prompts), batch.num_draws + 1
            self._batches[0] = self._begin(batch.start, size, progress.step, num_draws)

    def _wait_for(self, batch: _Batch) -> None:
        with self._changed:
            self._last_news = time.monotonic()
            while len(batch.scored) < batch.num_chunks and self._error is None:
                left = self._last_news + self._settings.timeout_s - time.monotonic()
                if left <= 0:
                    raise EngineError(
                        f"no sample was finished for {self._settings.timeout_s:g} s (async.timeout_s), prompt "
                        f"{batch.drawn.names[0]} is waited for: look at the logs of the rollout engine and the teacher"
                    )
                self._changed.wait(left)
            if self._error is not None:
                raise self._error

    def _send(self, step: int, wanted: int) -> None:
        """Fills the queue: the `wanted` prompts of this step, and those of as many steps as may be ahead and will come."""
        assert self._next_position is not None
        per_step, size = self._train.prompts_per_step, 1 if self._single else self._train.prompts_per_step
        limit = wanted + per_step * min(self._settings.max_staleness, self._train.steps - step - 1)
        while (num_ahead := sum(len(batch.drawn.prompts) for batch in self._batches)) < limit:
            # what is not for this step is for a later one, with a plan, and maybe a phase, of its own
            later = 0 if num_ahead < wanted else 1 + (num_ahead - wanted) // per_step
            count = min(size, (wanted if num_ahead < wanted else limit) - num_ahead)
            batch = self._begin(self._next_position, count, step + later)
            self._next_position = batch.drawn.next_position
            self._batches.append(batch)

    def _begin(self, position: int, size: int, step: int, num_draws: int = 1) -> _Batch:
        """Draws a batch and sends it to the engine, in chunks of one request where nothing compares a prompt's samples."""
        method, own_step = self._method.at(step)
        plan, drawn = method.plan(own_step), self.rollouts.prompts.draw(position, size)
        own = [at % self._ranks.world == self._ranks.rank for at in drawn.positions]
        mine = replace(drawn, prompts=tuple(pair for pair, is_mine in zip(drawn.prompts, own, strict=True) if is_mine))
        requests = mine.requests(self._train.samples_per_prompt, dict.fromkeys(mine.names, position))
        compared = plan.rewards is not None or plan.acceptance is not None or plan.prefix_share > 0
        whole = compared or self._grouped or not self._single
        chunks = [requests] if whole and requests else [[request] for request in requests]
        batch = _Batch(drawn, mine, step, position, method, plan, num_draws, len(chunks))
        for number, chunk in enumerate(chunks):
            self._generators.submit(self._guarded, self._generate, batch, number, chunk)
        return batch

    def _guarded(self, work: Callable[..., None], *args: object) -> None:
        """Runs `work` in a thread; an error there ends the run and is raised where the run waits."""
        if self._error is not None:
            return
        try:
            work(*args)
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _generate(self, batch: _Batch, number: int, requests: Sequence[Request]) -> None:
        if batch.abandoned:
            return
        first_index = batch.start * self._train.samples_per_prompt
        # the position takes the place of the step: a prompt that comes again in another epoch draws other numbers
        written = self.rollouts.answer(batch.mine, requests, batch.plan, batch.start, first_index)
        with self._changed:
            self._to_score.append((batch, number, written))
        self._scorers.submit(self._guarded, self._score)

    def _score(self) -> None:
        """Scores all chunks that wait, together: a teacher is faster with many samples at once."""
        with self._changed:
            waiting = list(self._to_score)
            self._to_score.clear()
        for method in dict.fromkeys(batch.method for batch, _, _ in waiting):
            part = [
                (batch, number, self._marked(batch, number, written))
                for batch, number, written in waiting
                if batch.method is method
            ]
            scored = iter(self.collector.score([one for _, _, written in part for one in written.samples], method))
            with self._changed:
                for batch, number, written in part:
                    batch.scored[number] = written.with_scores([next(scored) for _ in written.samples])
                self._last_news = time.monotonic()
                self._changed.notify_all()

    def _marked(self, batch: _Batch, number: int, written: Collected) -> Collected:
        """The samples of a chunk, with those marked that may be kept token by token: of prompts that come one by one, a sample
        of each of the first."""
        if self._tokens is None or number > 0:
            return written
        place = batch.start % self._train.prompts_per_step if self._single else 0
        samples = self._tokens.mark(written.samples, batch.step + 1, watched_only=place >= self._train.save_tokens)
        return replace(written, samples=samples)

    def reset(self) -> None:
        """Forgets what was written ahead; the next step sends its prompts again."""
        for batch in self._batches:
            batch.abandoned = True
        self._batches.clear()
        self._next_position = None

    def close(self) -> None:
        """Gives up what is in flight and ends the threads."""
        for pool in (self._generators, self._scorers):
            pool.shutdown(wait=False, cancel_futures=True)
        # closing engine and teacher breaks off the calls that the threads wait in
        self.rollouts.close()
        for pool in (self._generators, self._scorers):
            pool.shutdown(wait=True)
