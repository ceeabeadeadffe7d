"""Samples held-out prompts, grades the samples, and writes the summary with the samples beside it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from understudy.environments.play import play
from understudy.errors import CheckpointError, DataError, VocabularyError
from understudy.eval.estimators import SHARE, Estimate, estimate_mean
from understudy.eval.summary import EvalSummary, mean_score, sample_row, summarise
from understudy.files import write_json, write_json_lines
from understudy.lazy import Tensor
from understudy.tasks.renderer import Renderer
from understudy.teachers.judges.wording import accepted_part, rest_of
from understudy.types import Prompt, Rejected, Request, Sample, Sampling, Verdict

if TYPE_CHECKING:
    from understudy.engines import Generates
    from understudy.tasks import Task

BLOCK_REQUESTS = 1024
"""Requests in one call of the engine: enough to fill its batches, few enough to show progress and grade meanwhile."""
MAX_GRADERS = 4
"""Threads; a verifier may keep a process for each."""
Write = Callable[[Sequence[Request]], list[Sample]]
Play = Callable[[Sequence[Request], Sampling, str], list[Sample]]
"""Returns one sample for each request; the last argument names the stream of random draws."""


def run_eval(
    *,
    prompts: Sequence[Prompt],
    task: Task,
    renderer: Renderer,
    engine: Generates,
    sampling: Sampling,
    samples_per_prompt: int,
    step: int,
    split: str,
    out_dir: Path | None,
    max_prompt_tokens: int,
    progress: Callable[[int], None] | None = None,
    greedy: bool = False,
    rejection: Rejection | None = None,
    share: Callable[[Sequence[Request], Write], list[Sample]] | None = None,
    answer: Callable[[Sequence[Prompt]], Sequence[str | None]] | None = None,
) -> EvalSummary:
    """Evaluates and, with `out_dir`, writes step_XXXXXX.jsonl and then step_XXXXXX.json there.

    The draws do not depend on `step`: a difference between two evaluations comes from the weights, and a student that is
    evaluated later gives the same numbers. `PART/avg@n` and `PART/no_eos` are those of each part of a mix, or of the prompts
    that name a teacher. With `greedy` one more answer a prompt is drawn at temperature 0 and reported as the metric `greedy`;
    with `rejection` one more is drawn until the judge accepts it, or written on by the teacher. `progress` gets the number of
    samples in each block; `share` has several ranks write a part of the requests each; `answer` gives a teacher's response to
    each prompt for the metric `teacher`, and one that does not end is wrong.
    Raises DataError for prompts with equal ids and if no prompt fits the budget, CheckpointError if the files cannot be
    written.
    """
    fitting = _rendered(prompts, renderer, max_prompt_tokens)
    if samples_per_prompt < 1:
        raise ValueError(f"samples_per_prompt is {samples_per_prompt}; it must be at least 1")

    def play_episodes(requests: Sequence[Request], sampling: Sampling, stream: str) -> list[Sample]:
        def write(part: Sequence[Request]) -> list[Sample]:
            return play(engine, renderer, task.environment, part, sampling, step=0, stream=stream)

        return write(requests) if share is None else share(requests, write)

    stream = f"eval/{split}"
    requests = [Request(prompt, index, ids) for prompt, ids in fitting for index in range(samples_per_prompt)]
    samples = _sample_and_grade(requests, task, play_episodes, sampling, stream, progress)
    summary = summarise(
        samples,
        step=step,
        split=split,
        eos_ids=renderer.stop_ids,
        too_long=len(prompts) - len(fitting),
        sampling=asdict(sampling),
        same_answer=task.same_answer,
    )
    also: dict[str, Estimate | None] = {}
    parts: dict[str, list[Sample]] = {}
    for sample in samples:
        parts.setdefault(task.part_of(sample.prompt) or sample.prompt.teacher or "", []).append(sample)
    if len(parts) > 1:
        also = {
            f"{part}/{name}": estimate
            for part, own in parts.items()
            if part
            for name, estimate in summarise(own, step=step, split=split, eos_ids=renderer.stop_ids).metrics.items()
            if name in (f"avg@{samples_per_prompt}", "no_eos")
        }
    first = [Request(prompt, 0, ids) for prompt, ids in fitting]
    if greedy:
        most_likely = replace(sampling, temperature=0.0)
        also["greedy"] = mean_score(_sample_and_grade(first, task, play_episodes, most_likely, f"{stream}/greedy"))
    if rejection is not None:
        also |= rejection.metrics(first, task, renderer, play_episodes, sampling, f"{stream}/rejection")
    if answer is not None:
        also["teacher"] = _score_answers([prompt for prompt, _ in fitting], answer, task)
    found = {name: estimate for name, estimate in also.items() if estimate is not None}
    summary = replace(summary, metrics={**summary.metrics, **found})
    if out_dir is not None:
        _save(summary, samples, out_dir / f"step_{step:06d}.json")
    return summary


def _rendered(prompts: Sequence[Prompt], renderer: Renderer, max_prompt_tokens: int) -> list[tuple[Prompt, Tensor]]:
    """The prompts that fit, with their token ids [P]. Raises DataError for equal ids and where none fits."""
    if not renderer.stop_ids:
        raise VocabularyError("the tokenizer has no EOS, so no response can be known to have ended")
    repeated = [name for name, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if repeated:
        raise DataError(f"two evaluation prompts have the id {repeated[0]!r}; ids must be distinct")
    rendered = ((prompt, renderer.start(prompt)) for prompt in prompts)
    fitting = [(prompt, ids) for prompt, ids in rendered if len(ids) <= max_prompt_tokens]
    if not fitting:
        none = f"none of the {len(prompts)} evaluation prompts has at most {max_prompt_tokens} tokens; raise that limit"
        raise DataError(none if prompts else "there are no evaluation prompts")
    return fitting


def _score_answers(
    prompts: Sequence[Prompt], answer: Callable[[Sequence[Prompt]], Sequence[str | None]], task: Task
) -> Estimate | None:
    """The mean score of answers, 0 for one that does not end; None where no prompt has a reference."""
    answers = [pair for pair in zip(prompts, answer(prompts), strict=True) if pair[0].reference is not None]
    scores = [0.0 if text is None else task.grade(prompt, text).score for prompt, text in answers]
    return estimate_mean(scores, SHARE) if scores else None


def _save(summary: EvalSummary, samples: Sequence[Sample], path: Path) -> None:
    """Writes the summary at `path` and the samples beside it. Raises CheckpointError."""
    # an old summary goes first and the new one comes last: beside a summary always lie its own samples
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot replace {path}: {error.strerror or error}; fix permissions") from error
    write_json_lines(path.with_suffix(".jsonl"), (sample_row(sample) for sample in samples))
    write_json(path, asdict(summary))


@dataclass(frozen=True)
class Rejection:
    """Test-time rejection: an answer below `threshold` does not stand. Source: OVD, arXiv 2601.21968.

    "resample": it is drawn again. Open in the sources, the judge's digits being all the feedback that there is: "revise", the
    steps before the first one below the threshold stand and the student writes on from there; "continue", the teacher does.
    """

    judge: Callable[[Sequence[Sample]], Sequence[Verdict]]
    """One verdict for each sample, in order; but for "resample" on its steps."""
    threshold: float
    max_attempts: int
    on_reject: Rejected = "resample"
    respond: Callable[[Sequence[Prompt]], Sequence[str | None]] | None = None
    """The teacher's response to each prompt, for "continue"."""
    continue_template: str | None = None
    """As of `wording.rest_of`."""

    def metrics(
        self,
        requests: Sequence[Request],
        task: Task,
        renderer: Renderer,
        play_episodes: Play,
        sampling: Sampling,
        stream: str,
    ) -> dict[str, Estimate]:
        """The score of the answers that stand in the end: `rejection@N`, `revision@N` or `assisted`; with `attempts`, draws of
        each, or `assisted_share`, the share of answers that the teacher wrote on.

        An answer that the judge could not score stands: it is not known to be bad. So does one that the teacher does not
        continue.
        """
        final: dict[str, Sample] = {}
        attempts = dict.fromkeys((request.prompt.id for request in requests), 0)
        left, parts = list(requests), dict[str, Sample | None]()
        for number in range(1 if self.on_reject == "continue" else self.max_attempts):
            written = play_episodes(left, sampling, f"{stream}/{number}")
            verdicts = self.judge(written)
            again = []
            for request, sample, verdict in zip(left, written, verdicts, strict=True):
                name = request.prompt.id
                final[name] = sample
                attempts[name] += 1
                if verdict.score is not None and verdict.score < self.threshold:
                    if self.on_reject != "resample":
                        part = accepted_part(replace(sample, verdict=verdict), self.threshold, renderer)
                        parts[name] = part
                        request = replace(request, prefix_ids=None if part is None else part.response_ids)
                    again.append(request)
            left = again
            if not left:
                break
        found = {"attempts": estimate_mean(list(attempts.values()), (1, self.max_attempts))}
        label = {"resample": f"rejection@{self.max_attempts}", "revise": f"revision@{self.max_attempts}"}
        if self.on_reject == "continue":
            continued = self._continued(final, parts)
            final |= continued
            found = {"assisted_share": estimate_mean([name in continued for name in final], SHARE)}
        grades = [_grade(task, sample).grade for sample in final.values()]
        scores = [grade.score for grade in grades if grade is not None]
        return found | ({label.get(self.on_reject, "assisted"): estimate_mean(scores, SHARE)} if scores else {})

    def _continued(self, written: Mapping[str, Sample], parts: Mapping[str, Sample | None]) -> dict[str, Sample]:
        """The answers of which the teacher wrote the rest behind the accepted `parts`, by their prompts."""
        assert self.respond is not None
        prompts = [
            written[name].prompt if part is None else rest_of(part.prompt, part.text, self.continue_template)
            for name, part in parts.items()
        ]
        texts = self.respond(prompts) if prompts else []
        return {
            name: replace(written[name], text=("" if part is None else part.text) + text, grade=None)
            for (name, part), text in zip(parts.items(), texts, strict=True)
            if text is not None
        }


def _sample_and_grade(
    requests: Sequence[Request],
    task: Task,
    play_episodes: Play,
    sampling: Sampling,
    stream: str,
    progress: Callable[[int], None] | None = None,
) -> list[Sample]:
    """Samples with their grades, in the order of the requests. One block is graded while the next is generated."""
    graded: list[Future[Sample]] = []
    threads = max(min(MAX_GRADERS, os.cpu_count() or 1), task.graders)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="grade")
    try:
        for start in range(0, len(requests), BLOCK_REQUESTS):
            samples = play_episodes(requests[start : start + BLOCK_REQUESTS], sampling, stream)
            graded += [pool.submit(_grade, task, sample) for sample in samples]
            if progress is not None:
                progress(len(samples))
        return [future.result() for future in graded]
    finally:
        pool.shutdown(cancel_futures=True)


def _grade(task: Task, sample: Sample) -> Sample:
    """Returns the sample graded by its environment, else by the task where it has a reference and no environment failed."""
    if sample.grade is not None or sample.prompt.reference is None or sample.finish == "environment":
        return sample
    return replace(sample, grade=task.grade(sample.prompt, sample.text))
