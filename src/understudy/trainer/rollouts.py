"""One step's samples, over as many rounds as it takes, and what the teacher says of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from understudy.methods import Method, RolloutPlan
from understudy.trainer.checkpoint import Progress
from understudy.trainer.collect import Collector
from understudy.trainer.distributed import Ranks
from understudy.trainer.observe import Clock
from understudy.trainer.prompts import Drawn, PromptStream
from understudy.trainer.rewards import Rewarded, Rewarder
from understudy.trainer.settings import Train
from understudy.trainer.update import Judged
from understudy.types import Author, Metric, Request, Sample, add_metrics

MAX_ROUNDS = 10
"""Draws of further prompts in place of flat ones, after which the step goes on with what it has."""


@dataclass
class Gathered:
    """The samples of a step on this rank."""

    next_position: int
    samples: list[Sample] = field(default_factory=list)
    """To be trained on."""
    written: list[Sample] = field(default_factory=list)
    """All that were collected, before any was rejected."""
    rejected: list[Sample] = field(default_factory=list)
    """What a judge turned down."""
    metrics: dict[str, Metric] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    """Of this rank."""
    num_prompts_too_long: int = 0
    judged: Judged = field(default_factory=lambda: Judged([]))
    """`samples` with their scores, without those that were dropped."""
    num_dropped: int = 0
    """Samples that the teacher could not score."""
    positions: list[int] = field(default_factory=list)
    """Of the prompts that were used, where that is recorded."""

    def add(self, other: Gathered) -> None:
        """All but what was judged, and where the next step begins."""
        self.samples += other.samples
        self.written += other.written
        self.rejected += other.rejected
        self.metrics = add_metrics(self.metrics, other.metrics)
        # not +=, which forgets what was counted as 0
        self.counts.update(other.counts)
        self.num_prompts_too_long += other.num_prompts_too_long
        self.num_dropped += other.num_dropped


@dataclass(frozen=True)
class Rollouts:
    """Draws prompts, has them answered, and rewards the answers."""

    prompts: PromptStream
    collector: Collector
    rewarder: Rewarder
    ranks: Ranks
    settings: Train

    def collect(self, progress: Progress, method: Method, own_step: int, clock: Clock) -> Gathered:
        """The judged samples of a step: all are written, then all are scored."""
        with clock("generate_s"):
            found = self(progress.position, method.plan(own_step), progress.step)
            self.collector.engine.verify()
        with clock("score_s"):
            found.judged, found.num_dropped = self.collector.score(found.samples, method)
        return found

    def reset(self) -> None:
        """Nothing was written ahead."""

    def close(self) -> None:
        """Ends what collector and judge hold open."""
        self.collector.close()
        if self.rewarder.judge is not None:
            self.rewarder.judge.close()

    def __call__(self, position: int, plan: RolloutPlan, step: int) -> Gathered:
        """The samples of a step, from prompts at `position` on; prompts whose samples all have one reward are replaced
        where the plan says so."""
        found = Gathered(position)
        refill = plan.rewards is not None and plan.rewards.dynamic_sampling
        wanted, seen = self.settings.prompts_per_step, Counter[str]()
        for number in range(MAX_ROUNDS if refill else 1):
            if number:
                found.counts["rounds_refilled"] += int(self.ranks.is_main)
            rewarded, names = self._round(found, wanted, plan, step, seen)
            flat = rewarded.flat_prompts if refill else frozenset()
            found.samples += [sample for sample in rewarded.samples if sample.prompt.id not in flat]
            wanted -= len([name for name in names if name not in flat])
            found.counts["prompts_flat"] += len([name for name in names if name in flat]) if self.ranks.is_main else 0
            if wanted <= 0:
                break
        return found

    def _round(
        self, found: Gathered, count: int, plan: RolloutPlan, step: int, seen: Counter[str]
    ) -> tuple[Rewarded, Sequence[str]]:
        """What `count` further prompts gave on this rank, and their names, one that was drawn twice twice."""
        drawn = self.prompts.draw(found.next_position, count)
        found.next_position = drawn.next_position
        found.num_prompts_too_long += drawn.num_too_long
        rewarded = self.answer(found, drawn, drawn.requests(self.settings.samples_per_prompt, seen), plan, step)
        return rewarded, [prompt.id for prompt, _ in drawn.prompts]

    def answer(
        self,
        found: Gathered,
        drawn: Drawn,
        requests: Sequence[Request],
        plan: RolloutPlan,
        step: int,
        first_index: int = 0,
    ) -> Rewarded:
        """This rank's part of the `requests` of some prompts, answered and rewarded; `found` is told of everything but
        what is to be trained on. `first_index`: the least of the requests."""
        per_prompt = self.settings.samples_per_prompt
        begun = []
        # beyond every index that a prompt can reach in this step
        offset = first_index + per_prompt * self.settings.prompts_per_step * MAX_ROUNDS
        if plan.prefix_share > 0 and plan.guided == "beside":
            begun = self.ranks.mine(drawn.requests(1, Counter(dict.fromkeys(drawn.names, offset))))
        mine = self.ranks.mine(requests)
        written = self.collector.generate(mine, begun, plan, step)
        rewarded = self.rewarder(written, [*mine, *begun], plan, step)
        found.written += written
        found.written += rewarded.second
        own = sum(int((sample.author == Author.STUDENT).sum()) for sample in [*written, *rewarded.second])
        if own:
            found.counts["student_tokens"] += own
        found.rejected += rewarded.rejected
        if self.collector.responses is not None:
            found.counts.update(self.collector.responses.take_counts())
        found.metrics = add_metrics(found.metrics, rewarded.metrics)
        found.counts["samples_left_out"] += len(mine) - sum(sample.index < offset for sample in written)
        return rewarded
