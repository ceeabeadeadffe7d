"""The samples of one step: written by the student, or taken from the data, then judged by the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from understudy.methods import Method, RolloutPlan
from understudy.packing import split_scored
from understudy.randomness import keyed_uniform
from understudy.rollout import Sampler
from understudy.tasks.render import solution_sample
from understudy.teachers import Teacher
from understudy.trainer.settings import Train
from understudy.types import Request, Sample, Sampling, Scores


@dataclass(frozen=True)
class Collector:
    """Turns requests into judged samples."""

    sampler: Sampler
    sampling: Sampling
    tokenizer: Any
    template_kwargs: Mapping[str, Any]
    teacher: Teacher | None
    method: Method
    settings: Train
    seed: int
    max_tokens: int | None = None
    """The longest sequence that the models take; longer solutions are left out and counted, never cut."""

    def generate(self, requests: Sequence[Request], plan: RolloutPlan, step: int) -> list[Sample]:
        """One sample for each request, in order, without solutions that are too long.

        Which of them the student writes is drawn for each by its name.
        """
        own = [True] * len(requests)
        if plan.on_policy_share < 1.0 and requests:
            draws = keyed_uniform(self.seed, "on_policy", step, [request.key for request in requests], 1)[:, 0]
            own = (draws < plan.on_policy_share).tolist()
        asked = [request for request, by_student in zip(requests, own, strict=True) if by_student]
        written = iter(self.sampler.generate(asked, self.sampling, step=step) if asked else [])
        samples = [
            next(written) if by_student else self._from_data(request)
            for request, by_student in zip(requests, own, strict=True)
        ]
        limit = self.max_tokens
        return [sample for sample in samples if limit is None or sample.token_ids.numel() - 1 <= limit]

    def _from_data(self, request: Request) -> Sample:
        return solution_sample(
            self.tokenizer, request.prompt, request.index, self.tokenizer.eos_token_id, self.template_kwargs
        )

    def score(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[Scores] | None, int]:
        """The samples that are judged, their scores (None where no teacher is asked), and how many were dropped."""
        if self.teacher is None:
            return list(samples), None, 0
        if not samples:
            return [], [], 0
        k = self.method.reads.k or None
        scores = self.teacher.score(samples, self.method.needs, k=k)
        return split_scored(samples, scores, self.settings.on_missing_score)
