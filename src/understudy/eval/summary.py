"""An evaluation in numbers, and its samples one by one, so that every number can be traced to its texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from understudy.config import load_json
from understudy.errors import DataError
from understudy.eval.estimators import (
    LENGTH,
    RIGHT,
    SHARE,
    Ends,
    Estimate,
    estimate_mean,
    majority_at_k,
    pass_at_k,
    pass_power_k,
)
from understudy.files import by_step
from understudy.types import Author, Prompt, Sample


@dataclass(frozen=True)
class ScalingPoint:
    """The accuracy that a number of samples of each problem gives: one point of the curves of test-time scaling.

    Means over all ways to draw so many of a problem's samples, over problems whose samples all have scores.
    """

    samples: int
    tokens: Estimate
    """Tokens that the student generates for one problem."""
    metrics: Mapping[str, Estimate]
    """avg: the mean score; pass: one of the samples is right; maj: the score of the answer that most of them give."""


@dataclass(frozen=True)
class EvalSummary:
    """The result of one evaluation. A metric that could not be computed is absent from `metrics`."""

    step: int
    split: str
    samples_per_prompt: int
    num_problems: int
    metrics: Mapping[str, Estimate]
    unscored: int = 0
    """Samples without a score: their prompts have no reference, or their environment failed."""
    too_long: int = 0
    """Prompts over the token budget, which are not sampled and count in no metric."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    scaling: Sequence[ScalingPoint] = ()
    """Accuracy against samples and tokens, from 1 sample to all; empty for one sample of each prompt, or without scores."""


def summarise(
    samples: Sequence[Sample],
    *,
    step: int,
    split: str,
    eos_ids: Collection[int],
    too_long: int = 0,
    sampling: Mapping[str, float] | None = None,
    same_answer: Callable[[Prompt, str, str], bool] | None = None,
) -> EvalSummary:
    """avg@n, pass@k, pass^k, maj@n, score/NAME, mean_tokens, truncated and no_eos, each a mean over problems with its interval.

    n is the number of samples of each prompt, k the powers of two below it and n itself. The first four are over problems
    whose samples all have scores, `score/NAME` over those of them whose samples all have that score in `Grade.also`.
    `same_answer` says which answers are one vote of the majority; without it those that are spelled alike. `scaling` has avg,
    pass@k and maj@k at 1 and these k. Raises ValueError for no samples, or more of one prompt than of another.
    """
    problems = _by_problem(samples)
    counts = {len(attempts) for attempts in problems}
    if len(counts) != 1:
        raise ValueError(f"every prompt must have the same number of samples, at least one; found {sorted(counts)}")
    num = counts.pop()
    metrics: dict[str, Estimate] = {}
    scaling: list[ScalingPoint] = []
    if scored := _scored(problems):
        scaling = _scaling(scored, num, same_answer)
        metrics[f"avg@{num}"] = scaling[-1].metrics["avg"]
        num_right = (_scores(scored) >= RIGHT).sum(axis=1)
        for point in scaling[num > 1 :]:
            k = point.samples
            metrics[f"pass@{k}"] = point.metrics["pass"]
            if k > 1:
                metrics[f"pass^{k}"] = estimate_mean(pass_power_k(num_right, num, k), SHARE)
        metrics[f"maj@{num}"] = scaling[-1].metrics["maj"]
        metrics |= _other_scores(scored)
    per_sample: dict[str, tuple[Callable[[Sample], float], Ends]] = {
        "mean_tokens": (lambda item: item.num_written_tokens, LENGTH),
        "truncated": (lambda item: item.truncated, SHARE),
        "no_eos": (lambda item: item.num_response_tokens == 0 or int(item.token_ids[-1]) not in eos_ids, SHARE),
    }
    for name, (value, ends) in per_sample.items():
        found = np.array([[value(item) for item in attempts] for attempts in problems], dtype=np.float64)
        metrics[name] = estimate_mean(found.mean(axis=1), ends)
    return EvalSummary(
        step=step,
        split=split,
        samples_per_prompt=num,
        num_problems=len(problems),
        metrics=metrics,
        unscored=sum(sample.grade is None for sample in samples),
        too_long=too_long,
        sampling=sampling or {},
        scaling=scaling if num > 1 else [],
    )


def mean_score(samples: Sequence[Sample]) -> Estimate | None:
    """The mean score over the problems whose samples all have scores; None where there are none."""
    scored = _scored(_by_problem(samples))
    return estimate_mean(_scores(scored).mean(axis=1), SHARE) if scored else None


def _by_problem(samples: Sequence[Sample]) -> list[list[Sample]]:
    problems: dict[str, list[Sample]] = {}
    for sample in samples:
        problems.setdefault(sample.prompt.id, []).append(sample)
    return list(problems.values())


def _scored(problems: Sequence[Sequence[Sample]]) -> list[Sequence[Sample]]:
    """The problems whose samples all have scores."""
    return [attempts for attempts in problems if all(item.grade is not None for item in attempts)]


def _scores(scored: Sequence[Sequence[Sample]]) -> NDArray[np.float64]:
    """Shape [P, n], of P problems with n samples each."""
    return np.array([[item.grade.score for item in attempts if item.grade] for attempts in scored])


def _scaling(
    scored: Sequence[Sequence[Sample]], num: int, same_answer: Callable[[Prompt, str, str], bool] | None
) -> list[ScalingPoint]:
    """The points at 1, 2, 4, ... and `num` samples of each problem."""
    scores = _scores(scored)
    num_right = (scores >= RIGHT).sum(axis=1)
    lengths = np.array([np.mean([item.num_written_tokens for item in attempts]) for attempts in scored])
    votes = []
    for attempts, row in zip(scored, scores, strict=True):
        answers = [item.grade.answer for item in attempts if item.grade]
        if same_answer is not None and num > 1:
            answers = _votes(answers, row, partial(same_answer, attempts[0].prompt))
        votes.append((answers, list(row)))
    return [
        ScalingPoint(
            samples=k,
            tokens=estimate_mean(k * lengths, LENGTH),
            metrics={
                "avg": estimate_mean(scores.mean(axis=1), SHARE),
                "pass": estimate_mean(pass_at_k(num_right, num, k), SHARE),
                "maj": estimate_mean([majority_at_k(answers, row, k) for answers, row in votes], SHARE),
            },
        )
        for k in [*(2**power for power in range(num.bit_length()) if 2**power < num), num]
    ]


def _other_scores(scored: Sequence[Sequence[Sample]]) -> dict[str, Estimate]:
    """The scores in `Grade.also`, as `score/NAME`."""
    metrics: dict[str, Estimate] = {}
    for name in dict.fromkeys(name for row in scored for item in row if item.grade for name in item.grade.also):
        found = [[item.grade.also.get(name) for item in row if item.grade] for row in scored]
        known = np.array([row for row in found if None not in row], dtype=np.float64)
        if known.ndim == 3:
            # so many of so many: problems count by the latter, so that their mean is that of all counts together
            known, weights = known[..., 0], known[..., 1].mean(axis=1)
            known /= weights.mean()
            estimate = estimate_mean(known.mean(axis=1), (0.0, weights.max() / weights.mean()))
            # a share of counts is at most 1, which its weighted values are not
            high = estimate.high if estimate.high is None else min(estimate.high, 1.0)
            metrics[f"score/{name}"] = replace(estimate, high=high)
        elif known.size:
            metrics[f"score/{name}"] = estimate_mean(known.mean(axis=1), SHARE)
    return metrics


def _votes(
    answers: Sequence[str | None], scores: NDArray[np.float64], same: Callable[[str, str], bool]
) -> list[str | None]:
    """Answers with one spelling for all that are the same; right ones are, for each is one that the reference accepts."""
    known: list[str] = []
    right: str | None = None
    votes: list[str | None] = []
    for answer, score in zip(answers, scores, strict=True):
        if answer is None:
            votes.append(None)
        elif score >= RIGHT:
            right = answer if right is None else right
            votes.append(right)
        else:
            vote = next((one for one in known if same(answer, one)), answer)
            known += [] if vote in known else [vote]
            votes.append(vote)
    return votes


def read_summaries(folder: Path) -> list[EvalSummary]:
    """The evaluations that were saved in a directory, by step. Raises DataError for a file that holds none."""
    found = []
    for step, path in by_step(folder, ".json").items():
        try:
            values = load_json(path.read_text(encoding="utf-8"))
            metrics = {name: Estimate(**item) for name, item in values["metrics"].items()}
            scaling = read_scaling(values.get("scaling", ()))
            found.append(EvalSummary(**values | {"metrics": metrics, "scaling": scaling}))
            if found[-1].step != step:
                raise ValueError(f"it holds that of step {found[-1].step}")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} is not an evaluation of this version ({error}); move it away") from error
    return found


def read_scaling(values: Sequence[Mapping[str, Any]]) -> list[ScalingPoint]:
    """The curves of a saved summary. Raises ValueError, TypeError, KeyError or AttributeError for anything else."""
    return [
        ScalingPoint(
            int(item["samples"]),
            Estimate(**item["tokens"]),
            {str(name): Estimate(**found) for name, found in item["metrics"].items()},
        )
        for item in values
    ]


def sample_row(sample: Sample) -> dict[str, object]:
    """A sample as one line of eval/step_N.jsonl or samples/step_N.jsonl; `score` is null where it was not graded.

    `reference` is a list where several answers are accepted.
    """
    grade, references = sample.grade, sample.prompt.reference
    why = f"not graded: the {'environment failed' if sample.finish == 'environment' else 'prompt has no reference'}"
    trained = {
        "reward": sample.reward,
        "advantage": sample.advantage,
        "verdict": None if sample.verdict is None else sample.verdict.score,
        "teacher": sample.teacher,
    }
    row: dict[str, object] = {
        "prompt_id": sample.prompt.id,
        "prompt": sample.prompt.conversation,
        "response": sample.conversation,
        "finish": sample.finish,
        "num_tokens": sample.num_written_tokens,
        "answer": None if grade is None else grade.answer,
        "reference": references[0] if references is not None and len(references) == 1 else references,
        "score": None if grade is None else grade.score,
        "note": why if grade is None else grade.note,
    }
    if len(sample.messages) > 1:
        row["messages"] = [dict(message) for message in sample.messages]
    return row | {name: value for name, value in trained.items() if value is not None}


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> dict[int, str]:
    """The text of each token as it stands inside a text; each part of a character that is split over tokens is U+FFFD."""
    names = tokenizer.convert_ids_to_tokens(ids)
    pieces = {}
    for token, name in zip(ids, names, strict=True):
        piece = tokenizer.decode([token])
        # SentencePiece writes the space before a word as U+2581, and decodes it only between words
        pieces[token] = f" {piece}" if str(name).startswith("\u2581") and not piece.startswith(" ") else piece
    return pieces


def token_table(sample: Sample, decode: Callable[[Sequence[int]], str]) -> dict[str, list[object]]:
    """One list for each value that the report shows per response token. To show another value, add its list here.

    `text` holds the tokens themselves; each part of a character that is split over tokens is U+FFFD.
    """
    response = slice(sample.prompt_length, None)
    table: dict[str, list[object]] = {
        "text": [decode([token]) for token in sample.token_ids[response].tolist()],
        "author": [Author(author).name.lower() for author in sample.author[response].tolist()],
    }
    if sample.rollout_logprob is not None:
        values = sample.rollout_logprob[response].tolist()
        table["log-probability"] = [None if math.isnan(value) else round(value, 4) for value in values]
    return table
