"""Rewards: verbal acceptance, the verifier's score, and the advantage over the prompt's other samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from understudy.losses import advantages
from understudy.methods import Acceptance, Rewards, RolloutPlan
from understudy.teachers import Judge
from understudy.trainer.collect import Collected, Collector
from understudy.trainer.distributed import Ranks
from understudy.types import Grade, Metric, Prompt, Request, Sample, add_metrics

Grader = Callable[[Prompt, str], Grade | None]
HIGHEST_DIGIT = 9.0


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
    ) -> Collected:
        """Returns the samples to train on, with reward and advantage, and what became of the others.

        `requests`: those that the samples came from. A collective call: advantages are taken over all ranks.
        """
        found = Collected(list(samples), written=list(samples))
        if plan.acceptance is not None:
            found = self._accept(samples, requests, plan.acceptance, step)
        if plan.rewards is None:
            return found
        rewarded, metrics = self._reward(found.samples, plan.rewards, plan.acceptance)
        compared, flat = self._compare(rewarded, plan.rewards)
        if plan.rewards.dynamic_sampling:
            compared = [sample for sample in compared if sample.prompt.id not in flat]
            found = replace(found, flat_prompts=flat)
        return replace(found, samples=compared, metrics=add_metrics(found.metrics, metrics))

    def _accept(self, samples: Sequence[Sample], requests: Sequence[Request], rule: Acceptance, step: int) -> Collected:
        """Verbal rejection: accepted samples, and others that fill the places of the rejected ones."""
        judged = self._with_verdicts(samples, rule)
        good = [sample for sample in judged if _accepted(sample, rule)]
        left = [sample for sample in judged if not _accepted(sample, rule)]
        by_key = {request.key: request for request in requests}
        # an unscored sample is not known to be bad, so its place stays empty
        again = [by_key[sample.key] for sample in left if _digit(sample) is not None]
        filling: list[Sample] = []
        second: list[Sample] = []
        metrics: dict[str, Metric] = {}
        if rule.on_reject == "resample":
            second = self._with_verdicts(self.collector.write_again(again, step), rule)
            filling = [sample for sample in second if _accepted(sample, rule)]
            metrics = _signal(second)
        elif rule.on_reject == "teacher" and again:
            assert self.collector.responses is not None
            responses = self.collector.responses.find(again, step)
            given = [
                self.collector.filled(request, ids)
                for request, ids in zip(again, responses, strict=True)
                if ids is not None
            ]
            filling = [sample for sample in given if self.collector.fits(sample)]
            metrics = {"responses_too_long": Metric(len(given) - len(filling), len(given))}
        return Collected(
            samples=[*good, *filling],
            written=[*samples, *second],
            rejected=left,
            metrics=add_metrics(metrics, self._verbal_metrics(judged, len(good), len(filling))),
        )

    def _with_verdicts(self, samples: Sequence[Sample], rule: Acceptance) -> list[Sample]:
        if not samples:
            return []
        assert self.judge is not None
        verdicts = self.judge.judge(samples, score=rule.score, steps=rule.steps)
        return [replace(sample, verdict=verdict) for sample, verdict in zip(samples, verdicts, strict=True)]

    def _verbal_metrics(self, judged: Sequence[Sample], num_good: int, num_filling: int) -> dict[str, Metric]:
        """Acceptance, histogram, and bytes of teacher signal per token beside those of full logits and of top-64."""
        scored = [score for score in map(_digit, judged) if score is not None]
        digits = [min(int(score + 0.5), int(HIGHEST_DIGIT)) for score in scored]
        num_tokens = sum(sample.num_response_tokens for sample in judged)
        return {
            **_signal(judged),
            "accepted": Metric(num_good, len(scored)),
            "filled": Metric(num_filling, num_good + num_filling),
            "unscored": Metric(len(judged) - len(scored), len(judged)),
            "verbal_score": Metric(sum(scored), len(scored)),
            # float32 logits; 64 pairs of an int32 id and a float32 log-probability
            "signal_bytes_per_token_full": Metric(4.0 * self.vocab_size * num_tokens, num_tokens),
            "signal_bytes_per_token_top64": Metric(8.0 * min(64, self.vocab_size) * num_tokens, num_tokens),
            **{f"verbal/{digit}": Metric(digits.count(digit), len(digits)) for digit in range(int(HIGHEST_DIGIT) + 1)},
        }

    def _reward(
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
            for sample in samples:
                grade = sample.grade
                # an environment that failed is not the student's mistake
                if grade is None and sample.finish != "environment":
                    grade = self.grade(sample.prompt, sample.text)
                if grade is not None:
                    cost = advantages.overlong_penalty(sample.num_response_tokens, limit, rewards.overlong_buffer)
                    rewarded.append(replace(sample, grade=grade, reward=grade.score + cost))
        return rewarded, metrics | {
            "reward": Metric(sum(sample.reward for sample in rewarded if sample.reward is not None), len(rewarded)),
            "unrewarded": Metric(len(samples) - len(rewarded), len(samples)),
        }

    def _compare(self, rewarded: Sequence[Sample], rewards: Rewards) -> tuple[list[Sample], frozenset[str]]:
        """The samples with their advantages over those of the same prompt on every rank, and the prompts, of all ranks, whose
        samples are all equally right."""
        # "right" leaves out what the length costs, or no prompt with responses of different length would be flat
        worth = [
            (sample.prompt.id, sample.reward, sample.reward if sample.grade is None else sample.grade.score)
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
