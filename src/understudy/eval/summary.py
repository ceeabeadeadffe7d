"""An evaluation in numbers, and its samples one by one, so that a number can be traced to its texts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from understudy.eval.estimators import RIGHT, Estimate, bootstrap_mean, majority_score, pass_at_k
from understudy.types import Prompt, Sample


@dataclass(frozen=True)
class EvalSummary:
    """What one evaluation found. A metric that could not be computed is absent from `metrics`."""

    step: int
    split: str
    samples_per_prompt: int
    num_problems: int
    metrics: Mapping[str, Estimate]
    unscored: int = 0
    """Samples without a score: their prompts have no reference."""
    too_long: int = 0
    """Prompts over the token budget; no sample was drawn of them, and no metric counts them."""
    sampling: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """As in eval/step_XXXXXX.json."""
        return asdict(self)


def summarise(
    samples: Sequence[Sample],
    *,
    step: int,
    split: str,
    eos_ids: Collection[int],
    too_long: int = 0,
    sampling: Mapping[str, float] | None = None,
) -> EvalSummary:
    """avg@n, pass@k, maj@n, mean_tokens, truncated and no_eos, each a mean over problems with its interval.

    n is the number of samples of each prompt, k the powers of two below it and n itself. The first three are over problems
    whose samples all have scores. Raises ValueError for no samples, or more of one prompt than of another.
    """
    problems: dict[str, list[Sample]] = {}
    for sample in samples:
        problems.setdefault(sample.prompt.id, []).append(sample)
    counts = {len(attempts) for attempts in problems.values()}
    if len(counts) != 1:
        raise ValueError(f"every prompt must have the same number of samples, at least one; found {sorted(counts)}")
    num_samples = counts.pop()
    scored = [attempts for attempts in problems.values() if all(item.grade is not None for item in attempts)]
    values = score_values(scored, num_samples) | length_values(list(problems.values()), eos_ids)
    return EvalSummary(
        step=step,
        split=split,
        samples_per_prompt=num_samples,
        num_problems=len(problems),
        metrics={name: bootstrap_mean(value, name) for name, value in values.items()},
        unscored=sum(sample.grade is None for sample in samples),
        too_long=too_long,
        sampling=sampling or {},
    )


def score_values(problems: Sequence[Sequence[Sample]], num_samples: int) -> dict[str, NDArray[np.float64]]:
    """Per problem [P]: avg@n, pass@k for each k, maj@n. Empty where no problem has scores."""
    if not problems:
        return {}
    scores = np.array([[item.grade.score for item in attempts if item.grade] for attempts in problems])
    answers = [[item.grade.answer for item in attempts if item.grade] for attempts in problems]
    num_right = (scores >= RIGHT).sum(axis=1)
    passes = {f"pass@{k}": pass_at_k(num_right, num_samples, k) for k in pass_sizes(num_samples)}
    majority = np.array([majority_score(given, list(row)) for given, row in zip(answers, scores, strict=True)])
    return {f"avg@{num_samples}": scores.mean(axis=1)} | passes | {f"maj@{num_samples}": majority}


def length_values(problems: Sequence[Sequence[Sample]], eos_ids: Collection[int]) -> dict[str, NDArray[np.float64]]:
    """Per problem [P]: mean response length, share cut at the length limit, share whose last token is no EOS."""

    def per_problem(values: list[list[float]]) -> NDArray[np.float64]:
        return np.asarray(np.array(values, dtype=np.float64).mean(axis=1))

    return {
        "mean_tokens": per_problem([[item.num_response_tokens for item in attempts] for attempts in problems]),
        "truncated": per_problem([[item.truncated for item in attempts] for attempts in problems]),
        "no_eos": per_problem([[not _ends(item, eos_ids) for item in attempts] for attempts in problems]),
    }


def pass_sizes(num_samples: int) -> list[int]:
    """2, 4, 8, ... below the number of samples, and that number."""
    return [*(2**power for power in range(1, num_samples.bit_length()) if 2**power < num_samples), num_samples]


def _ends(sample: Sample, eos_ids: Collection[int]) -> bool:
    return sample.num_response_tokens > 0 and int(sample.token_ids[-1]) in eos_ids


def sample_row(sample: Sample) -> dict[str, object]:
    """A sample as one line of eval/step_XXXXXX.jsonl; `score` is null where it was not graded."""
    grade = sample.grade
    trained = {
        "reward": sample.reward,
        "advantage": sample.advantage,
        "verdict": None if sample.verdict is None else sample.verdict.score,
        "teacher": sample.teacher,
    }
    return {
        "prompt_id": sample.prompt.id,
        "prompt": prompt_text(sample.prompt),
        "response": sample.text,
        "finish": sample.finish,
        "num_tokens": sample.num_response_tokens,
        "answer": None if grade is None else grade.answer,
        "reference": sample.prompt.reference,
        "score": None if grade is None else grade.score,
        "note": "not graded: the prompt has no reference" if grade is None else grade.note,
    } | {name: value for name, value in trained.items() if value is not None}


def prompt_text(prompt: Prompt) -> str:
    """The prompt for people: its text, or its only message, or all messages with their roles."""
    if prompt.messages is None:
        return prompt.text or ""
    if len(prompt.messages) == 1:
        return prompt.messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)
