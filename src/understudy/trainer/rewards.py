"""What samples are worth: verbal acceptance, the verifier's score, and the advantage over the prompt's other samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from understudy.losses import advantages
from understudy.methods import Acceptance, Rewards, RolloutPlan
from understudy.teachers import Judge
from understudy.trainer.collect import Collector
from understudy.trainer.distributed import Ranks
from understudy.types import Grade, Metric, Prompt, Request, Sample, Verdict, add_metrics

Grader = Callable[[Prompt, str], Grade]
HIGHEST_DIGIT = 9.0
Compared = tuple[str, float, float]
"""Of a sample: its prompt, its reward, and the reward without what its length costs."""


@dataclass(frozen=True)
class Rewarded:
    """Samples to be trained on, and what was seen on the way."""

    samples: list[Sample]
    metrics: dict[str, Metric] = field(default_factory=dict)
    """Means that add up over ranks."""
    flat_prompts: frozenset[str] = frozenset()
    """Prompts, over all ranks, whose samples are all equally right."""
    rejected: list[Sample] = field(default_factory=list)
    """What the judge turned down, for people to read."""
    second: list[Sample] = field(default_factory=list)
    """Further attempts of the student, all of them."""


@dataclass(frozen=True)
class Rewarder:
    """Accepts, grades and compares the samples of a step."""

    collector: Collector
    judge: Judge | None
    grade: Grader
    ranks: Ranks
    vocab_size: int

    def __call__(
        self, samples: Sequence[Sample], requests: Sequence[Request], plan: RolloutPlan, step: int
    ) -> Rewarded:
        """What is left of the samples, with reward and advantage. `requests`: those that the samples came from."""
        found = Rewarded(list(samples))
        if plan.acceptance is not None:
            found = self._accept(samples, requests, plan.acceptance, step)
        if plan.rewards is None:
            return found
        kept, shown = self._reward(found.samples, plan.rewards, plan.acceptance)
        pairs = self.ranks.gather([(sample.prompt.id, reward, _bare(sample, reward)) for sample, reward in kept])
        compared = _compared(kept, pairs, self.ranks.rank, plan.rewards)
        return replace(found, samples=compared, metrics=add_metrics(found.metrics, shown), flat_prompts=_flat(pairs))

    def _accept(self, samples: Sequence[Sample], requests: Sequence[Request], rule: Acceptance, step: int) -> Rewarded:
        """Verbal rejection: accepted samples, and what fills the places of the others."""
        judged = self._judged(samples, rule)
        by_key = {request.key: request for request in requests}
        rejected = [sample for sample in judged if not accepted(sample, rule) and not unscored(sample)]
        again = [by_key[sample.key] for sample in rejected]
        extra: list[Sample] = []
        second: list[Sample] = []
        shown: dict[str, Metric] = {}
        if rule.on_reject == "resample":
            second = self._judged(self.collector.write_again(again, step), rule)
            extra = [sample for sample in second if accepted(sample, rule)]
            shown |= _signal(second)
        elif rule.on_reject == "teacher" and again:
            assert self.collector.responses is not None
            found = self.collector.responses.find(again, step)
            given = [
                self.collector.filled(item, ids) for item, ids in zip(again, found, strict=True) if ids is not None
            ]
            extra = [sample for sample in given if self.collector.fits(sample)]
            shown["responses_too_long"] = Metric(len(given) - len(extra), len(given))
        good = [sample for sample in judged if accepted(sample, rule)]
        shown = add_metrics(shown, self._verbal_metrics(judged, len(good), len(extra)))
        left = [sample for sample in judged if not accepted(sample, rule)]
        return Rewarded([*good, *extra], shown, rejected=left, second=second)

    def _judged(self, samples: Sequence[Sample], rule: Acceptance) -> list[Sample]:
        if not samples:
            return []
        assert self.judge is not None
        verdicts = self.judge.judge(samples, score=rule.score, steps=rule.steps)
        return [replace(sample, verdict=verdict) for sample, verdict in zip(samples, verdicts, strict=True)]

    def _verbal_metrics(self, judged: Sequence[Sample], num_good: int, num_extra: int) -> dict[str, Metric]:
        """Acceptance, histogram, and bytes of teacher signal a token beside those of full logits and of top-64."""
        scored = [sample.verdict.score for sample in judged if sample.verdict and sample.verdict.score is not None]
        num_tokens = sum(sample.num_response_tokens for sample in judged)
        metrics = _signal(judged) | {
            "accepted": Metric(num_good, len(scored)),
            "filled": Metric(num_extra, num_good + num_extra),
            "unscored": Metric(len(judged) - len(scored), len(judged)),
            "verbal_score": Metric(sum(scored), len(scored)),
            # float32 logits; 64 pairs of an int32 id and a float32 log-probability
            "signal_bytes_per_token_full": Metric(4.0 * self.vocab_size * num_tokens, num_tokens),
            "signal_bytes_per_token_top64": Metric(8.0 * min(64, self.vocab_size) * num_tokens, num_tokens),
        }
        digits = [min(int(score + 0.5), int(HIGHEST_DIGIT)) for score in scored]
        return metrics | {
            f"verbal/{digit}": Metric(digits.count(digit), len(digits)) for digit in range(int(HIGHEST_DIGIT) + 1)
        }

    def _reward(
        self, samples: list[Sample], rewards: Rewards, acceptance: Acceptance | None
    ) -> tuple[list[tuple[Sample, float]], dict[str, Metric]]:
        """With their rewards. A sample that nobody can judge is dropped and counted, never worth 0."""
        shown: dict[str, Metric] = {}
        if rewards.source == "verbal":
            assert acceptance is not None
            lacking = self._judged([sample for sample in samples if sample.verdict is None], acceptance)
            shown = _signal(lacking)
            found = [*(sample for sample in samples if sample.verdict is not None), *lacking]
            worth = [(sample, _verbal(sample.verdict)) for sample in found]
        else:
            graded = [replace(sample, grade=self.grade(sample.prompt, sample.text)) for sample in samples]
            limit = self.collector.sampling.max_new_tokens
            worth = [
                (
                    sample,
                    sample.grade.score
                    + advantages.overlong_penalty(sample.num_response_tokens, limit, rewards.overlong_buffer),
                )
                for sample in graded
                if sample.grade is not None
            ]
        kept = [(replace(sample, reward=reward), reward) for sample, reward in worth if reward is not None]
        total = sum(reward for _, reward in kept)
        unrewarded = Metric(len(samples) - len(kept), len(samples))
        return kept, shown | {"reward": Metric(total, len(kept)), "unrewarded": unrewarded}


def _signal(judged: Sequence[Sample]) -> dict[str, Metric]:
    """Bytes that the judge said, over the response tokens that it read."""
    num_bytes = sum(sample.verdict.signal_bytes for sample in judged if sample.verdict)
    return {"signal_bytes_per_token": Metric(num_bytes, sum(sample.num_response_tokens for sample in judged))}


def unscored(sample: Sample) -> bool:
    """Whether the judge said no digit."""
    return sample.verdict is None or sample.verdict.score is None


def accepted(sample: Sample, rule: Acceptance) -> bool:
    """Whether the judge's score reaches the threshold."""
    return sample.verdict is not None and sample.verdict.score is not None and sample.verdict.score >= rule.threshold


def _bare(sample: Sample, reward: float) -> float:
    return reward if sample.grade is None else sample.grade.score


def _verbal(verdict: Verdict | None) -> float | None:
    return None if verdict is None or verdict.score is None else verdict.score / HIGHEST_DIGIT


def _compared(
    kept: Sequence[tuple[Sample, float]], pairs: Sequence[Sequence[Compared]], rank: int, rewards: Rewards
) -> list[Sample]:
    """With advantages against the samples of the same prompt on every rank."""
    flat = [pair for part in pairs for pair in part]
    if not flat:
        return []
    names = {name: index for index, name in enumerate(dict.fromkeys(name for name, _, _ in flat))}
    reward = torch.tensor([value for _, value, _ in flat], dtype=torch.float64)
    group = torch.tensor([names[name] for name, _, _ in flat])
    advantage = advantages.group_advantage(reward, group, normalise_std=rewards.normalise_std).tolist()
    first = sum(len(part) for part in pairs[:rank])
    return [replace(sample, advantage=advantage[first + index]) for index, (sample, _) in enumerate(kept)]


def _flat(pairs: Sequence[Sequence[Compared]]) -> frozenset[str]:
    values: dict[str, set[float]] = {}
    for part in pairs:
        for name, _, bare in part:
            values.setdefault(name, set()).add(bare)
    return frozenset(name for name, found in values.items() if len(found) == 1)
