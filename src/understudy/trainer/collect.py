"""The samples of one step: written by the student, begun by the teacher or taken from data, then scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from understudy.engines import Engine
from understudy.engines.requests import guided_requests
from understudy.environments.play import EnvironmentOf, play
from understudy.errors import DataError
from understudy.lazy import Tensor, torch
from understudy.methods import Method, RolloutPlan
from understudy.packing import ScoreField, attach_scores
from understudy.randomness import keyed_uniform
from understudy.tasks.renderer import Renderer
from understudy.teachers import Teacher
from understudy.teachers.stores.responses import ResponseStore
from understudy.trainer.settings import Train
from understudy.types import Author, Metric, Need, Request, Sample, Sampling, add_metrics

TOKEN_SCORES: frozenset[Need] = frozenset({"sampled", "topk", "full"})


@dataclass(frozen=True, eq=False)
class Collected:
    """The samples of a step on this rank, or a part of them."""

    samples: list[Sample]
    """To be trained on."""
    written: list[Sample] = field(default_factory=list)
    """All that were collected, before any was rejected, and without scores."""
    rejected: list[Sample] = field(default_factory=list)
    """Turned down by the verbal teacher; kept for people to read."""
    metrics: dict[str, Metric] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    """Counts of this rank; the sum over ranks is logged."""
    flat_prompts: frozenset[str] = frozenset()
    """Prompts, over all ranks, whose samples were all rewarded alike; further prompts may replace them."""
    positions: tuple[int, ...] = ()
    """Positions of the prompts that were used, if they are recorded."""
    next_position: int = 0
    """Position at which the prompts of the next step begin."""

    @staticmethod
    def join(parts: Sequence[Collected], next_position: int) -> Collected:
        """Returns one record of all parts, in their order."""
        metrics: dict[str, Metric] = {}
        counts: Counter[str] = Counter()
        for part in parts:
            metrics = add_metrics(metrics, part.metrics)
            # not +=, which forgets what was counted as 0
            counts.update(part.counts)
        return Collected(
            samples=[sample for part in parts for sample in part.samples],
            written=[sample for part in parts for sample in part.written],
            rejected=[sample for part in parts for sample in part.rejected],
            metrics=metrics,
            counts=counts,
            flat_prompts=frozenset().union(*(part.flat_prompts for part in parts)),
            positions=tuple(position for part in parts for position in part.positions),
            next_position=next_position,
        )

    def with_scores(self, scored: Sequence[Sample | None]) -> Collected:
        """Returns the record with `Collector.score` of its samples: those without a score are dropped and counted."""
        kept = [sample for sample in scored if sample is not None]
        return replace(self, samples=kept, counts=Counter({**self.counts, "samples_dropped": len(scored) - len(kept)}))


@dataclass(frozen=True)
class Collector:
    """Turns requests into scored samples."""

    engine: Engine
    sampling: Sampling
    renderer: Renderer
    environment_of: EnvironmentOf
    teacher: Teacher | None
    reference: Teacher | None
    responses: ResponseStore | None
    settings: Train
    seed: int
    max_tokens: int | None = None
    """The longest sequence that the models take; longer solutions are left out and counted, never cut."""

    def generate(
        self, requests: Sequence[Request], guided: Sequence[Request], plan: RolloutPlan, step: int
    ) -> list[Sample]:
        """One sample for each request, in order, without responses that are too long, then those of `guided`.

        Which of the requests the student writes is drawn for each by its name. A guided sample begins with a part of a
        teacher's response; where there is no response, or none of it is left, it is left out.
        """
        own = [True] * len(requests)
        if plan.on_policy_share < 1.0 and requests:
            draws = keyed_uniform(self.seed, "on_policy", step, [request.key for request in requests], 1)[:, 0]
            own = (draws < plan.on_policy_share).tolist()
        asked = [request for request, by_student in zip(requests, own, strict=True) if by_student]
        if plan.guided != "beside":
            # in place of the first sample of each prompt
            first = [request for request in asked if request.index % self.settings.samples_per_prompt == 0]
            with_prefix = {request.key: request for request in self._guide(first, plan, step)}
            asked = [with_prefix.get(request.key, request) for request in asked]
        begun = [request for request in self._guide(guided, plan, step) if request.prefix_ids is not None]
        written = iter(self._write([*asked, *begun], step))
        given = iter(self.given([r for r, by_student in zip(requests, own, strict=True) if not by_student], step))
        samples = [next(written if by_student else given) for by_student in own]
        return [sample for sample in [*samples, *written] if sample is not None and self.fits(sample)]

    def fits(self, sample: Sample) -> bool:
        """Whether the models have positions for all of it."""
        return self.max_tokens is None or sample.token_ids.numel() - 1 <= self.max_tokens

    def play(self, requests: Sequence[Request], step: int, stream: str) -> list[Sample]:
        """The student's response to each request; another stream draws other numbers."""
        parts = (self.engine, self.renderer, self.environment_of)
        return play(*parts, requests, self.sampling, step=step, stream=stream)

    def _write(self, requests: Sequence[Request], step: int) -> list[Sample]:
        recording = None if self.teacher is None else self.teacher.recording
        if recording is None or not requests:
            return self.play(requests, step, "sample")
        # a prompt that is drawn twice in a step gives the same samples twice, as over epochs
        num = self.settings.samples_per_prompt
        found = recording.samples_for([replace(request, index=request.index % num) for request in requests])
        missing = [request.key for request, sample in zip(requests, found, strict=True) if sample is None]
        if missing:
            raise DataError(
                f"{recording.name} stores no sample for request {missing[0]} (and {len(missing) - 1} more): store more "
                "samples a prompt, lower train.samples_per_prompt, or train on the prompts that were stored"
            )
        return [sample for sample in found if sample is not None]

    def _guide(self, requests: Sequence[Request], plan: RolloutPlan, step: int) -> list[Request]:
        if not requests or plan.prefix_share == 0:
            return list(requests)
        assert self.responses is not None
        found = self.responses.find(requests, step)
        budget = self.sampling.max_new_tokens
        return guided_requests(requests, found, plan.prefix_share, max_new_tokens=budget, of=plan.prefix)

    def given(
        self,
        requests: Sequence[Request],
        step: int,
        slots: Sequence[int] | None = None,
        begun: Mapping[str, Sample] | None = None,
    ) -> list[Sample | None]:
        """Responses that the student did not write: from the section `responses`, else the prompts' own solutions.

        `slots`, `begun`: as of `ResponseStore.find`.
        """
        if self.responses is None:
            return [given_sample(self.renderer, request) for request in requests]
        found = self.responses.find(requests, step, slots, begun)
        return [
            None if ids is None else given_sample(self.renderer, request, ids, (begun or {}).get(request.key))
            for request, ids in zip(requests, found, strict=True)
        ]

    def score(self, samples: Sequence[Sample], method: Method) -> list[Sample | None]:
        """Returns the samples, in order, with the scores that the method needs; None in place of one that is dropped
        because a score is missing (`train.on_missing_score`)."""
        need = method.needs & TOKEN_SCORES
        asked: list[tuple[Teacher | None, ScoreField, frozenset[Need], int | None]] = []
        if need:
            asked.append((self.teacher, "scores", need, method.reads.k or None))
        if "reference" in method.needs:
            # the reference's whole rows where the teacher's are compared, else only the sampled tokens
            form: frozenset[Need] = frozenset({"full" if "full" in need else "sampled"})
            asked.append((self.reference, "reference_scores", form, None))
        found: list[Sample | None] = list(samples)
        for teacher, name, form, k in asked:
            left = [sample for sample in found if sample is not None]
            if teacher is not None and (left or teacher.collective):
                given = teacher.score(left, form, k=k)
                scored = iter(attach_scores(left, given, self.settings.on_missing_score, field=name))
                found = [None if sample is None else next(scored) for sample in found]
        return found


def given_sample(
    renderer: Renderer, request: Request, response_ids: Tensor | None = None, begun: Sample | None = None
) -> Sample:
    """A response to imitate as a sample: finish "data", written by the teacher. None: the prompt's own solution.

    `begun`: the beginning that `response_ids` are the rest of; its tokens keep their authors, log-probabilities and versions.
    Raises DataError if the prompt has no solution, and as `Renderer.response`.
    """
    prompt, num_prompt = request.prompt, request.token_ids.numel()
    if response_ids is None:
        if prompt.solution is None:
            raise DataError(
                f"prompt {prompt.id} has no solution to imitate; set task.solution_field, or another method"
            )
        response_ids = renderer.response(prompt, prompt.solution)
    if begun is None:
        begun = Sample(
            prompt=prompt,
            index=request.index,
            token_ids=request.token_ids,
            author=torch.full((num_prompt,), Author.PROMPT, dtype=torch.uint8),
            prompt_length=num_prompt,
            finish="data",
            text="",
            # nobody sampled them, which is another thing than not having been asked
            rollout_logprob=torch.full((num_prompt,), float("nan")),
            teacher=prompt.teacher,
        )

    def longer(old: Tensor | None, value: float) -> Tensor | None:
        return None if old is None else torch.cat([old, old.new_full(response_ids.shape, value)])

    token_ids, author = torch.cat([begun.token_ids, response_ids]), longer(begun.author, Author.TEACHER)
    assert author is not None
    return replace(
        begun,
        token_ids=token_ids,
        author=author,
        finish="data",
        text=renderer.decode(token_ids[num_prompt:]),
        rollout_logprob=longer(begun.rollout_logprob, torch.nan),
        policy_version=longer(begun.policy_version, -1),
    )
