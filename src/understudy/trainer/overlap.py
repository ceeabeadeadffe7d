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

import torch

from understudy.errors import EngineError
from understudy.methods import Method, RolloutPlan
from understudy.trainer.checkpoint import Progress
from understudy.trainer.collect import Collector
from understudy.trainer.distributed import Ranks
from understudy.trainer.observe import Clock
from understudy.trainer.prompts import Drawn
from understudy.trainer.rollouts import MAX_ROUNDS, Gathered, Rollouts
from understudy.trainer.settings import Async, Train
from understudy.trainer.update import Judged
from understudy.types import Request, Sample

MAX_STALE_DRAWS = 3
"""Times in a row that one prompt's samples may come back too old until the run stops."""


@dataclass(eq=False)
class _Parcel:
    """Prompts whose samples are used in one step."""

    drawn: Drawn
    """All of its prompts."""
    mine: Drawn
    """Those of this rank."""
    start: int
    """Where `drawn` begins."""
    method: Method
    plan: RolloutPlan
    num_draws: int = 1
    waiting: int = 0
    """Pieces that are not scored yet."""
    found: Gathered = field(default_factory=lambda: Gathered(0))
    judged: dict[int, Judged] = field(default_factory=dict)
    """By piece."""
    dropped: bool = False
    """Nobody waits for it."""

    def first_index(self, samples_per_prompt: int) -> int:
        """Of its samples: no other parcel near it has the same."""
        return self.start * samples_per_prompt


@dataclass(eq=False)
class _Piece:
    """What is sent to the engine at once."""

    parcel: _Parcel
    number: int
    requests: Sequence[Request]
    samples: list[Sample] = field(default_factory=list)
    """To be scored."""


class Overlapped:
    """`Rollouts.collect`, ahead of time. Threads generate and score; everything else happens in the caller's."""

    def __init__(self, rollouts: Rollouts, method: Method, settings: Async, *, grouped: bool = False) -> None:
        """`grouped`: the engine wants the samples of a prompt together."""
        self._ranks = rollouts.ranks
        # prompts are split over ranks, so that a group is whole on its rank and no thread waits for another rank
        alone = replace(rollouts.rewarder, ranks=Ranks())
        self._rollouts = replace(rollouts, rewarder=alone, ranks=Ranks())
        self._method = method
        self._settings = settings
        self._train: Train = rollouts.settings
        num_engines = rollouts.collector.engine.concurrency
        self._single, self._grouped = num_engines > 1, grouped
        self._parcels: deque[_Parcel] = deque()
        self._to_score: deque[_Piece] = deque()
        self._changed = Condition()
        self._error: BaseException | None = None
        self._closed = False
        self._last_news = time.monotonic()
        self._next_position: int | None = None
        self._generators = ThreadPoolExecutor(num_engines, "understudy-generate")
        self._scorers = ThreadPoolExecutor(rollouts.collector.num_scorers, "understudy-score")

    @property
    def collector(self) -> Collector:
        """As `Rollouts.collector`."""
        return self._rollouts.collector

    def collect(self, progress: Progress, method: Method, own_step: int, clock: Clock) -> Gathered:
        """The judged samples of a step, at most `max_staleness` steps old; then sends prompts for the next steps.

        Raises EngineError where nothing comes back for `timeout_s`, and what a thread raised.
        """
        with clock("wait_s"):
            found = self._take(progress, method)
            self.collector.engine.verify()
            self._send(progress.step, 0)
        return found

    def _take(self, progress: Progress, method: Method) -> Gathered:
        """Parcels in order until the step has its prompts."""
        if self._next_position is None:
            self._next_position = progress.position
        wanted = self._train.prompts_per_step
        total = Gathered(progress.position)
        parts: list[Judged] = []
        num_used = 0
        while wanted > 0 and num_used < MAX_ROUNDS * self._train.prompts_per_step:
            self._send(progress.step, wanted)
            parcel = self._first(progress, method, total)
            # on every rank the same: the next step begins where this one ends
            flat = sum(self._ranks.gather(_flat(parcel))) if _refills(parcel.plan) else 0
            for samples in (parcel.found.samples, parcel.found.written, parcel.found.rejected):
                # pieces end in any order
                samples.sort(key=lambda sample: sample.index)
            total.add(parcel.found)
            total.next_position = parcel.drawn.next_position
            total.positions += parcel.drawn.positions
            parts += [parcel.judged[number] for number in sorted(parcel.judged)]
            num_used += len(parcel.drawn.prompts)
            wanted -= len(parcel.drawn.prompts) - flat
        total.judged = Judged.join(parts)
        return total

    def _first(self, progress: Progress, method: Method, total: Gathered) -> _Parcel:
        """The next parcel, finished, young enough and made for this phase of the method; others are made again."""
        allowed = self._settings.max_staleness * self._train.minibatches * self._train.passes
        while True:
            parcel = self._parcels[0]
            self._wait_for(parcel)
            age = _age(parcel.found.written, progress.updates)
            if parcel.method is method and age <= allowed:
                return self._parcels.popleft()
            total.counts["samples_stale"] += len(parcel.found.written) if age > allowed else 0
            if parcel.num_draws > MAX_STALE_DRAWS and age > allowed:
                raise EngineError(
                    f"the samples of prompt {parcel.drawn.names[0]} came back {age} updates old {parcel.num_draws} times in "
                    f"a row, async.max_staleness allows {allowed}: does the rollout engine take the weights that are pushed?"
                )
            again = self._parcel(parcel.start, len(parcel.drawn.prompts), progress.step)
            again.num_draws = parcel.num_draws + 1
            self._parcels[0] = again
            self._submit(again)

    def _wait_for(self, parcel: _Parcel) -> None:
        with self._changed:
            self._last_news = time.monotonic()
            while parcel.waiting and self._error is None:
                left = self._last_news + self._settings.timeout_s - time.monotonic()
                if left <= 0:
                    raise EngineError(
                        f"no sample was finished for {self._settings.timeout_s:g} s (async.timeout_s), prompt "
                        f"{parcel.drawn.names[0]} is waited for: look at the logs of the rollout engine and the teacher"
                    )
                self._changed.wait(left)
            if self._error is not None:
                raise self._error

    def _send(self, step: int, wanted: int) -> None:
        """Fills the queue: the `wanted` prompts of this step, and those of as many steps as may be ahead and will come."""
        assert self._next_position is not None
        per_step, size = self._train.prompts_per_step, 1 if self._single else self._train.prompts_per_step
        limit = wanted + per_step * min(self._settings.max_staleness, self._train.steps - step - 1)
        while (num_ahead := sum(len(parcel.drawn.prompts) for parcel in self._parcels)) < limit:
            # what is not for this step is for a later one, with a plan, and maybe a phase, of its own
            later = 0 if num_ahead < wanted else 1 + (num_ahead - wanted) // per_step
            count = min(size, (wanted if num_ahead < wanted else limit) - num_ahead)
            parcel = self._parcel(self._next_position, count, step + later)
            self._next_position = parcel.drawn.next_position
            self._parcels.append(parcel)
            self._submit(parcel)

    def _parcel(self, position: int, size: int, step: int) -> _Parcel:
        method, own_step = self._method.at(step)
        drawn = self._rollouts.prompts.draw(position, size)
        own = [at % self._ranks.world == self._ranks.rank for at in drawn.positions]
        mine = replace(drawn, prompts=tuple(pair for pair, is_mine in zip(drawn.prompts, own, strict=True) if is_mine))
        found = Gathered(0, num_prompts_too_long=drawn.num_too_long)
        return _Parcel(drawn, mine, position, method, method.plan(own_step), found=found)

    def _submit(self, parcel: _Parcel) -> None:
        """In pieces of one request where nothing compares the samples of a prompt before they are scored."""
        # a prompt that comes again in the same step has samples, and so draws, of other names
        seen = Counter(dict.fromkeys(parcel.mine.names, parcel.first_index(self._train.samples_per_prompt)))
        plan, requests = parcel.plan, parcel.mine.requests(self._train.samples_per_prompt, seen)
        compared = plan.rewards is not None or plan.acceptance is not None or plan.prefix_share > 0
        whole = compared or self._grouped or not self._single
        cut = [requests] if whole else [[request] for request in requests]
        pieces = [_Piece(parcel, number, part) for number, part in enumerate(cut)] if requests else []
        parcel.waiting = len(pieces)
        for piece in pieces:
            self._generators.submit(self._guarded, self._generate, piece)

    def _guarded(self, work: Callable[..., None], *args: object) -> None:
        """An error in a thread ends the run; it is raised where the run waits."""
        if self._closed or self._error is not None:
            return
        try:
            work(*args)
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _generate(self, piece: _Piece) -> None:
        parcel, found = piece.parcel, Gathered(0)
        if parcel.dropped:
            return
        first = parcel.first_index(self._train.samples_per_prompt)
        # the position names the draws: a prompt that comes again in another epoch draws other numbers
        rewarded = self._rollouts.answer(found, parcel.mine, piece.requests, parcel.plan, parcel.start, first)
        flat = rewarded.flat_prompts if _refills(parcel.plan) else frozenset()
        piece.samples = [sample for sample in rewarded.samples if sample.prompt.id not in flat]
        found.samples = list(piece.samples)
        # one that was drawn twice counts twice
        found.counts["prompts_flat"] += sum(prompt.id in flat for prompt, _ in parcel.mine.prompts)
        with self._changed:
            parcel.found.add(found)
            self._to_score.append(piece)
        self._scorers.submit(self._guarded, self._score)

    def _score(self) -> None:
        """All pieces that wait, together: a teacher is faster with many."""
        with self._changed:
            pieces = list(self._to_score)
            self._to_score.clear()
        for method in dict.fromkeys(piece.parcel.method for piece in pieces):
            self._score_together([piece for piece in pieces if piece.parcel.method is method], method)

    def _score_together(self, pieces: Sequence[_Piece], method: Method) -> None:
        whose = {id(sample): number for number, piece in enumerate(pieces) for sample in piece.samples}
        judged, _ = self.collector.score([sample for piece in pieces for sample in piece.samples], method)
        rows: list[list[int]] = [[] for _ in pieces]
        for row, sample in enumerate(judged.samples):
            rows[whose[id(sample)]].append(row)
        with self._changed:
            for piece, index in zip(pieces, rows, strict=True):
                piece.parcel.judged[piece.number] = judged.at(index)
                piece.parcel.found.num_dropped += len(piece.samples) - len(index)
                piece.parcel.waiting -= 1
            self._last_news = time.monotonic()
            self._changed.notify_all()

    def reset(self) -> None:
        """Forgets what was written ahead; the next step sends its prompts again."""
        for parcel in self._parcels:
            parcel.dropped = True
        self._parcels.clear()
        self._next_position = None

    def close(self) -> None:
        """Gives up what is in flight and ends the threads."""
        self._closed = True
        for pool in (self._generators, self._scorers):
            pool.shutdown(wait=False, cancel_futures=True)
        self._rollouts.close()
        for pool in (self._generators, self._scorers):
            pool.shutdown(wait=True)


def _refills(plan: RolloutPlan) -> bool:
    return plan.rewards is not None and plan.rewards.dynamic_sampling


def _flat(parcel: _Parcel) -> int:
    return int(parcel.found.counts["prompts_flat"])


def _age(samples: Sequence[Sample], updates: int) -> int:
    """Updates since the oldest weights that wrote a token of the samples; 0 where none was written."""
    versions = [sample.policy_version for sample in samples if sample.policy_version is not None]
    known = torch.cat(versions) if versions else torch.zeros(0, dtype=torch.int64)
    known = known[known >= 0]
    return updates - int(known.min()) if known.numel() else 0


__all__ = ["Overlapped"]
