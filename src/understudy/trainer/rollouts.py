"""The prompts of a step in their order, and its samples: written and rewarded in as many rounds as it takes, then scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from understudy.errors import DataError
from understudy.lazy import Tensor, torch
from understudy.losses import advantages
from understudy.methods import Acceptance, Method, Rewards, RolloutPlan
from understudy.tasks.lazy import Permutation
from understudy.teachers import Judge
from understudy.teachers.judges.wording import accepted_part
from understudy.trainer.checkpoint import Progress
from understudy.trainer.collect import Collected, Collector
from understudy.trainer.distributed import Ranks
from understudy.trainer.observe import Clock
from understudy.trainer.tokens import TokenRecorder
from understudy.types import Author, Grade, Metric, Prompt, Request, Sample, add_metrics

MAX_ROUNDS = 10
"""Draws of further prompts in place of flat ones, after which the step goes on with what it has."""
HIGHEST_DIGIT = 9.0
"""The best score of a verbal teacher."""


@dataclass(frozen=True)
class Drawn:
    """Prompts drawn together, and where the next draw begins."""

    prompts: tuple[tuple[Prompt, Tensor], ...]
    """Each with its token ids."""
    next_position: int
    num_too_long: int
    """Prompts that were passed over because they are too long."""
    positions: tuple[int, ...] = ()
    """Positions of the prompts in the stream."""

    @property
    def names(self) -> list[str]:
        """Ids of the prompts; one that was drawn twice is there twice."""
        return [prompt.id for prompt, _ in self.prompts]

    def requests(self, num_samples: int, num_before: Mapping[str, int]) -> list[Request]:
        """Returns `num_samples` requests for each prompt, with indices that no other request for the prompt has.

        `num_before`: how often each prompt was drawn already. Randomness is keyed by the index, so a prompt that comes
        again must not have the same one.
        """
        drawn = Counter(num_before)
        made = []
        for prompt, ids in self.prompts:
            made += [Request(prompt, drawn[prompt.id] * num_samples + n, ids) for n in range(num_samples)]
            drawn[prompt.id] += 1
        return made


@dataclass(frozen=True)
class PromptStream:
    """Prompts in a new random order every epoch. A position, the number of prompts passed, is its whole state."""

    prompts: Sequence[Prompt]
    encode: Callable[[Prompt], Tensor]
    seed: int
    max_prompt_tokens: int

    def __post_init__(self) -> None:
        if not self.prompts:
            raise DataError("there are no training prompts")

    def __getitem__(self, position: int) -> Prompt:
        """The prompt at a position; positions go on over epochs."""
        epoch, place = divmod(position, len(self.prompts))
        return self.prompts[Permutation(len(self.prompts), f"{self.seed}/order/{epoch}")(place)]

    def draw(self, position: int, count: int) -> Drawn:
        """Returns the next `count` prompts that fit the token budget. Raises DataError when a whole epoch has none."""
        chosen: list[tuple[Prompt, Tensor]] = []
        positions: list[int] = []
        start = position
        while len(chosen) < count:
            prompt = self[position]
            ids = self.encode(prompt)
            if len(ids) <= self.max_prompt_tokens:
                chosen.append((prompt, ids))
                positions.append(position)
            # an epoch may end and the next begin with long ones; twice their number is only reached if all are long
            elif position - (positions[-1] if positions else start - 1) >= 2 * len(self.prompts):
                raise DataError(
                    f"all {len(self.prompts)} training prompts are longer than train.max_prompt_tokens "
                    f"({self.max_prompt_tokens})"
                )
            position += 1
        return Drawn(tuple(chosen), position, position - start - count, tuple(positions))


@dataclass(frozen=True)
class Rollouts:
    """Draws prompts, has them answered, and accepts, grades and compares the answers."""

    prompts: PromptStream
    collector: Collector
    judge: Judge | None
    grade: Callable[[Prompt, str], Grade | None]
    ranks: Ranks
    vocab_size: int
    graders: int = 1
    """Threads that call `grade`."""

    def collect(
        self, progress: Progress, method: Method, own_step: int, clock: Clock, tokens: TokenRecorder | None = None
    ) -> Collected:
        """Returns the rewarded samples of a step. `tokens` marks those of which the teacher is asked for more."""
        with clock("generate_s"):
            collected = self.write(progress.position, method.plan(own_step), progress.step)
            self.collector.engine.verify()
        if tokens is not None:
            collected = replace(collected, samples=tokens.mark(collected.samples, progress.step + 1))
        return collected

    def score(self, collected: Collected, method: Method, clock: Clock) -> Collected:
        """Returns them with scores, this rank's share of the tokens. A collective call."""
        with clock("score_s"):
            shared = self.ranks.balance(collected.samples, self.collector.settings.minibatches)
            return replace(collected, samples=shared).with_scores(self.collector.score(shared, method))

    def write(self, position: int, plan: RolloutPlan, step: int) -> Collected:
        """Returns the rewarded samples of a step, from prompts at `position` on. Prompts whose samples all have one reward
        are replaced by further ones where the plan says so."""
        parts: list[Collected] = []
        settings, drawn_before, counts = self.collector.settings, Counter[str](), Counter[str]()
        wanted = settings.prompts_per_step
        for number in range(MAX_ROUNDS if replaces_flat(plan) else 1):
            drawn = self.prompts.draw(position, wanted)
            requests = drawn.requests(settings.samples_per_prompt, drawn_before)
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
        settings = self.collector.settings
        guided: list[Request] = []
        # beyond every index that a prompt can reach in this step, so that no guided sample draws what another draws
        offset = first_index + settings.samples_per_prompt * settings.prompts_per_step * MAX_ROUNDS
        if plan.prefix_share > 0 and plan.guided == "beside":
            guided = self.ranks.mine(drawn.requests(1, dict.fromkeys(drawn.names, offset)))
        mine = self.ranks.mine(requests)
        written = self.collector.generate(mine, guided, plan, step)
        found = self._reward(written, [*mine, *guided], plan, step)
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
        """Ends connections, servers that the run started, and what they have in flight."""
        collector = self.collector
        for part in (collector.engine, collector.teacher, collector.reference, self.judge):
            if part is not None:
                part.close()

    def _reward(
        self, samples: Sequence[Sample], requests: Sequence[Request], plan: RolloutPlan, step: int
    ) -> Collected:
        """Returns the samples to train on, with reward and advantage, and what became of the others.

        `requests`: those that the samples came from. A collective call: advantages are taken over all ranks.
        """
        found = Collected(list(samples), written=list(samples))
        if plan.acceptance is not None:
            found = self._accept(samples, requests, plan.acceptance, step)
        if plan.rewards is None:
            return found
        rewarded, metrics = self._with_rewards(found.samples, plan.rewards, plan.acceptance)
        compared, flat = self._compare(rewarded, plan.rewards)
        if plan.rewards.dynamic_sampling:
            compared = [sample for sample in compared if sample.prompt.id not in flat]
        return replace(found, samples=compared, metrics=add_metrics(found.metrics, metrics), flat_prompts=flat)

    def _accept(self, samples: Sequence[Sample], requests: Sequence[Request], rule: Acceptance, step: int) -> Collected:
        """Verbal rejection: accepted samples, and others that fill the places of the rejected ones."""
        judged = self._with_verdicts(samples, rule)
        good = [sample for sample in judged if _accepted(sample, rule)]
        left = [sample for sample in judged if not _accepted(sample, rule)]
        by_key = {request.key: request for request in requests}
        # an unscored sample is not known to be bad, so its place stays empty
        rejected = [sample for sample in left if _digit(sample) is not None]
        again = [by_key[sample.key] for sample in rejected]
        filling: list[Sample] = []
        second: list[Sample] = []
        metrics: dict[str, Metric] = {}
        if rule.on_reject == "resample":
            second = self._with_verdicts(self.collector.play(again, step, "resample"), rule)
            filling = [sample for sample in second if _accepted(sample, rule)]
            metrics = {"slots_empty": Metric(len(again) - len(filling), len(again))}
        elif rule.by_teacher:
            filling, metrics = self._fill(again, rejected if rule.on_reject == "continue" else [], rule, step)
        return Collected(
            samples=[*good, *filling],
            written=[*samples, *second],
            rejected=left,
            metrics=metrics | _signal([*judged, *second]) | self._verbal_metrics(judged, len(good), len(filling)),
        )

    def _fill(
        self, requests: Sequence[Request], continued: Sequence[Sample], rule: Acceptance, step: int
    ) -> tuple[list[Sample], dict[str, Metric]]:
        """A different response of the teacher for each of a prompt's rejected requests, over all ranks.

        `continued`: rejected samples of which the teacher writes only the rest, from the first rejected step on. A slot for
        which there is no response, or only one that another slot of the prompt has, stays empty: of equal copies no advantage
        would tell one from the other. A collective call.
        """
        by_rank = self.ranks.gather([(request.prompt.id, request.index) for request in requests])
        slots: dict[tuple[str, int], int] = {}
        num_before = Counter[str]()
        for name, index in sorted(one for part in by_rank for one in part):
            slots[name, index] = num_before[name]
            num_before[name] += 1
        own = [slots[request.prompt.id, request.index] for request in requests]
        starts = [accepted_part(sample, rule.threshold, self.collector.renderer) for sample in continued]
        begun = {start.key: start for start in starts if start is not None}
        given = [sample for sample in self.collector.given(requests, step, own, begun) if sample is not None]
        fitting = [sample for sample in given if self.collector.fits(sample)]
        # a teacher may write the same twice; the lowest slot keeps it
        said = [(sample.prompt.id, sample.index, tuple(sample.token_ids.tolist())) for sample in fitting]
        first: dict[tuple[str, tuple[int, ...]], int] = {}
        for name, index, ids in sorted(one for part in self.ranks.gather(said) for one in part):
            first.setdefault((name, ids), index)
        filling = [
            sample for sample, (name, index, ids) in zip(fitting, said, strict=True) if first[name, ids] == index
        ]
        if not requests:
            return [], {}
        metrics = {
            "responses_too_long": Metric(len(given) - len(fitting), len(given)),
            "slots_empty": Metric(len(requests) - len(filling), len(requests)),
        }
        if continued:
            kept = [int((sample.author == Author.STUDENT).sum()) for sample in filling]
            metrics["continued"] = Metric(sum(count > 0 for count in kept), len(filling))
            metrics["kept_tokens"] = Metric(sum(kept), sum(sample.num_response_tokens for sample in filling))
        return filling, metrics

    def _with_verdicts(self, samples: Sequence[Sample], rule: Acceptance) -> list[Sample]:
        if not samples:
            return []
        assert self.judge is not None
        verdicts = self.judge.judge(samples, score=rule.score, steps=rule.steps)
        return [replace(sample, verdict=verdict) for sample, verdict in zip(samples, verdicts, strict=True)]

    def _verbal_metrics(self, judged: Sequence[Sample], num_good: int, num_filling: int) -> dict[str, Metric]:
        """Acceptance, histogram, and the bytes per token that full logits and their top-64 would be."""
        scored = [score for score in map(_digit, judged) if score is not None]
        digits = [min(int(score + 0.5), int(HIGHEST_DIGIT)) for score in scored]
        num_tokens = sum(sample.num_response_tokens for sample in judged)
        return {
            "accepted": Metric(num_good, len(scored)),
            "filled": Metric(num_filling, num_good + num_filling),
            "unscored": Metric(len(judged) - len(scored), len(judged)),
            "verbal_score": Metric(sum(scored), len(scored)),
            # float32 logits; 64 pairs of an int32 id and a float32 log-probability
            "signal_bytes_per_token_full": Metric(4.0 * self.vocab_size * num_tokens, num_tokens),
            "signal_bytes_per_token_top64": Metric(8.0 * min(64, self.vocab_size) * num_tokens, num_tokens),
            **{f"verbal/{digit}": Metric(digits.count(digit), len(digits)) for digit in range(int(HIGHEST_DIGIT) + 1)},
        }

    def _with_rewards(
        self, samples: Sequence[Sample], rewards: Rewards, acceptance: Acceptance | None
    ) -> tuple[list[Sample], dict[str, Metric]]:
        """The samples with their rewards. One that nobody can judge is dropped and counted, never worth 0."""
        metrics: dict[str, Metric] = {}
        rewarded = []
        if rewards.source == "verbal":
            assert acceptance is not None
            lacking = self._with_verdicts([sample for sample in samples if sample.verdict is None], acceptance)
            metrics = _signal(lacking)
            for sample in [*(sample for sample in samples if sample.verdict is not None), *lacking]:
                if (score := _digit(sample)) is not None:
                    rewarded.append(replace(sample, reward=score / HIGHEST_DIGIT))
        else:
            limit = self.collector.sampling.max_new_tokens
            # an environment that failed is not the student's mistake
            lacking = [sample for sample in samples if sample.grade is None and sample.finish != "environment"]
            graded = {sample.key: grade for sample, grade in zip(lacking, self._grades(lacking), strict=True)}
            for sample in samples:
                grade = sample.grade or graded.get(sample.key)
                if grade is not None:
                    room = sample.prompt.room(limit)
                    cost = advantages.overlong_penalty(sample.num_response_tokens, room, rewards.overlong_buffer)
                    rewarded.append(replace(sample, grade=grade, reward=grade.score + cost))
        return rewarded, metrics | {
            "reward": Metric(sum(sample.reward for sample in rewarded if sample.reward is not None), len(rewarded)),
            "unrewarded": Metric(len(samples) - len(rewarded), len(samples)),
        }

    def _grades(self, samples: Sequence[Sample]) -> list[Grade | None]:
        if self.graders == 1:
            return [self.grade(sample.prompt, sample.text) for sample in samples]
        with ThreadPoolExecutor(self.graders, "grade") as pool:
            graded = [pool.submit(self.grade, sample.prompt, sample.text) for sample in samples]
            try:
                return [future.result() for future in graded]
            finally:
                pool.shutdown(cancel_futures=True)

    def _compare(self, rewarded: Sequence[Sample], rewards: Rewards) -> tuple[list[Sample], frozenset[str]]:
        """The samples with their advantages over those of the same prompt on every rank, and the prompts, of all ranks, whose
        samples are all rewarded alike; those that others would replace, where they are equally right."""
        # "right" leaves out what the length costs, or no prompt with responses of different length would be replaced
        worth = [
            (
                sample.prompt.id,
                sample.reward,
                sample.grade.score if sample.grade and rewards.dynamic_sampling else sample.reward,
            )
            for sample in rewarded
        ]
        by_rank = self.ranks.gather(worth)
        everywhere = [item for part in by_rank for item in part]
        groups = {name: group for group, name in enumerate(dict.fromkeys(name for name, _, _ in everywhere))}
        advantage = advantages.group_advantage(
            torch.tensor([reward for _, reward, _ in everywhere], dtype=torch.float64),
            torch.tensor([groups[name] for name, _, _ in everywhere], dtype=torch.int64),
            normalise_std=rewards.normalise_std,
        ).tolist()
        first = sum(len(part) for part in by_rank[: self.ranks.rank])
        compared = [replace(sample, advantage=advantage[first + index]) for index, sample in enumerate(rewarded)]
        right: dict[str, set[float | None]] = {}
        for name, _, score in everywhere:
            right.setdefault(name, set()).add(score)
        return compared, frozenset(name for name, scores in right.items() if len(scores) == 1)


def replaces_flat(plan: RolloutPlan) -> bool:
    """Whether prompts whose samples are all rewarded alike are replaced by further ones."""
    return plan.rewards is not None and plan.rewards.dynamic_sampling


def _signal(judged: Sequence[Sample]) -> dict[str, Metric]:
    """Bytes that the verbal teacher said, over the response tokens that it read."""
    num_bytes = sum(sample.verdict.signal_bytes for sample in judged if sample.verdict)
    return {"signal_bytes_per_token": Metric(num_bytes, sum(sample.num_response_tokens for sample in judged))}


def _digit(sample: Sample) -> float | None:
    """The verbal teacher's score; None where it gave none."""
    return None if sample.verdict is None else sample.verdict.score


def _accepted(sample: Sample, rule: Acceptance) -> bool:
    score = _digit(sample)
    return score is not None and score >= rule.threshold
