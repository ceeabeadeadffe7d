"""One step's samples, written and rewarded over as many rounds as it takes, then scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from understudy.methods import Method, RolloutPlan
from understudy.trainer.checkpoint import Progress
from understudy.trainer.collect import Collected, Collector
from understudy.trainer.distributed import Ranks
from understudy.trainer.observe import Clock
from understudy.trainer.prompts import Drawn, PromptStream
from understudy.trainer.rewards import Rewarder
from understudy.trainer.settings import Train
from understudy.types import Author, Request

MAX_ROUNDS = 10
"""Draws of further prompts in place of flat ones, after which the step goes on with what it has."""


@dataclass(frozen=True)
class Rollouts:
    """Draws prompts, has them answered, and rewards the answers."""

    prompts: PromptStream
    collector: Collector
    rewarder: Rewarder
    ranks: Ranks
    settings: Train

    def collect(self, progress: Progress, method: Method, own_step: int, clock: Clock) -> Collected:
        """Returns the scored samples of a step: all are written, then all are scored."""
        with clock("generate_s"):
            collected = self.write(progress.position, method.plan(own_step), progress.step)
            self.collector.engine.verify()
        with clock("score_s"):
            return collected.with_scores(self.collector.score(collected.samples, method))

    def write(self, position: int, plan: RolloutPlan, step: int) -> Collected:
        """Returns the rewarded samples of a step, from prompts at `position` on. Prompts whose samples all have one reward
        are replaced by further ones where the plan says so."""
        parts: list[Collected] = []
        wanted, drawn_before, counts = self.settings.prompts_per_step, Counter[str](), Counter[str]()
        for number in range(MAX_ROUNDS if replaces_flat(plan) else 1):
            drawn = self.prompts.draw(position, wanted)
            requests = drawn.requests(self.settings.samples_per_prompt, drawn_before)
            part = self.answer(drawn, requests, plan, step)
            num_flat = sum(name in part.flat_prompts for name in drawn.names)
            if self.ranks.is_main:
                # all ranks draw the same prompts, and the counts of all ranks are summed
                counts.update(prompts_flat=num_flat, prompts_too_long=drawn.num_too_long)
                counts.update({"rounds_refilled": 1} if number else {})
            parts.append(part)
            position = drawn.next_position
            drawn_before.update(drawn.names)
            wanted -= len(drawn.prompts) - num_flat
            if wanted <= 0:
                break
        return Collected.join([*parts, Collected([], counts=counts)], position)

    def answer(
        self, drawn: Drawn, requests: Sequence[Request], plan: RolloutPlan, step: int, first_index: int = 0
    ) -> Collected:
        """Returns this rank's part of the `requests`, answered and rewarded. They are some of those for the prompts `drawn`;
        `first_index` is the least index of all of those."""
        guided: list[Request] = []
        # beyond every index that a prompt can reach in this step, so that no guided sample draws what another draws
        offset = first_index + self.settings.samples_per_prompt * self.settings.prompts_per_step * MAX_ROUNDS
        if plan.prefix_share > 0 and plan.guided == "beside":
            guided = self.ranks.mine(drawn.requests(1, dict.fromkeys(drawn.names, offset)))
        mine = self.ranks.mine(requests)
        written = self.collector.generate(mine, guided, plan, step)
        found = self.rewarder(written, [*mine, *guided], plan, step)
        counts = Counter(samples_left_out=len(mine) - sum(sample.index < offset for sample in written))
        own = sum(int((sample.author == Author.STUDENT).sum()) for sample in found.written)
        if own:
            counts["student_tokens"] = own
        if self.collector.responses is not None:
            counts.update(self.collector.responses.take_counts())
        return replace(found, counts=counts)

    def reset(self) -> None:
        """Nothing was written ahead."""

    def close(self) -> None:
        """Closes the collector and the verbal teacher."""
        self.collector.close()
        if self.rewarder.judge is not None:
            self.rewarder.judge.close()


def replaces_flat(plan: RolloutPlan) -> bool:
    """Whether prompts whose samples are all rewarded alike are replaced by further ones."""
    return plan.rewards is not None and plan.rewards.dynamic_sampling
