"""What samples say about a model: estimates per problem, and their mean over problems with a bootstrap interval.

Shape legend: P problems, n samples of each, R bootstrap resamples, C distinct values.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from understudy.randomness import hash_name

CONFIDENCE = 0.95
RESAMPLES = 10_000
"""The Monte Carlo error of a bound is then about 1 % of the interval's width."""
RIGHT = 1.0
"""The lowest score that counts as right, for pass@k."""

_BLOCK = 1 << 22
"""Random numbers that are held at a time: 32 MiB."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `num_problems` problems and its 95 % interval."""

    value: float
    low: float
    high: float
    num_problems: int


def pass_at_k(num_right: ArrayLike, num_samples: int, k: int) -> NDArray[np.float64]:
    """1 - C(n - c, k) / C(n, k): the chance that k of n samples, drawn without repetition, hold a right one. Shape [P].

    Unbiased for the chance that k fresh samples do (Chen et al. 2021). `num_right` [P] is c. Raises ValueError unless
    1 <= k <= n and 0 <= c <= n.
    """
    right = np.asarray(num_right, dtype=np.int64)
    if not 1 <= k <= num_samples:
        raise ValueError(f"k is {k}; it must be from 1 to {num_samples}, the number of samples")
    if ((right < 0) | (right > num_samples)).any():
        raise ValueError(f"the number of right samples must be from 0 to {num_samples}")
    # C(n-c, k) / C(n, k) = prod_{j<k} (n - c - j) / (n - j), which is 0 as soon as a factor is
    draws = np.arange(k)
    all_wrong = np.maximum(num_samples - right[..., None] - draws, 0) / (num_samples - draws)
    return np.asarray(1.0 - all_wrong.prod(axis=-1), dtype=np.float64)


def majority_score(answers: Sequence[str | None], scores: Sequence[float]) -> float:
    """The score of the answer that most samples of one problem give; the mean over those that tie.

    An answer is what its verifier read, compared as it is written; None is no vote, and without any vote the score
    is 0. Samples with one answer and different scores count by their mean.
    """
    votes: dict[str, list[float]] = defaultdict(list)
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            votes[answer].append(score)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    return float(np.mean([np.mean(group) for group in votes.values() if len(group) == most]))


def bootstrap_mean(values: ArrayLike, key: str) -> Estimate:
    """The mean of one value per problem [P], with the percentile interval of the bootstrap over problems.

    The same values (in any order) and key give the same interval. Where all values are equal it has no width: that says
    that no problem differs, not that the next one could not. Raises ValueError for no values or one that is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"a bootstrap needs one value per problem, shape [P] with P > 0; got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"a bootstrap needs finite values; {key} has {(~np.isfinite(array)).sum()} that are not")
    distinct, counts = np.unique(array, return_counts=True)
    means = _resampled_means(distinct, counts, np.random.Generator(np.random.Philox(key=hash_name(f"bootstrap/{key}"))))
    low, high = np.quantile(means, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Estimate(math.fsum(array) / len(array), float(low), float(high), len(array))


def paired_difference(before: ArrayLike, after: ArrayLike, key: str) -> Estimate:
    """The mean of `after - before` [P], row by row the same problem, as `bootstrap_mean`.

    Raises ValueError where the shapes differ.
    """
    first, last = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != last.shape:
        raise ValueError(f"paired values must be of the same problems; got {first.shape} before and {last.shape} after")
    return bootstrap_mean(last - first, key)


def _resampled_means(
    distinct: NDArray[np.float64], counts: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """[R] means of resamples. How often each distinct value is drawn is multinomial: scores have few of them."""
    num_problems = int(counts.sum())
    rows = max(1, _BLOCK // len(distinct))
    blocks = [
        rng.multinomial(num_problems, counts / num_problems, size=min(rows, RESAMPLES - start)) @ distinct
        for start in range(0, RESAMPLES, rows)
    ]
    return np.concatenate(blocks) / num_problems
