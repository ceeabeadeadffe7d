"""Estimates from graded samples: per problem, and means with intervals over problems, or over seeds and problems.

Shape legend: P problems, n samples of each, R bootstrap resamples, S seeds.
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

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)
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
    rng = np.random.Generator(np.random.Philox(key=hash_name(f"bootstrap/{key}")))
    # how often each distinct value is drawn is multinomial: scores have few of them
    rows = max(1, _BLOCK // len(distinct))
    means = np.concatenate(
        [
            rng.multinomial(len(array), counts / len(array), size=min(rows, RESAMPLES - start)) @ distinct / len(array)
            for start in range(0, RESAMPLES, rows)
        ]
    )
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


def crossed_mean(values: ArrayLike) -> Estimate:
    """The mean of [S, P] and a t interval for it, seeds and problems both drawn at random (crossed random effects).

    Var = var_seed / S + var_problem / P - var_rest / (S P), of the sample variances of the seeds' means, the problems'
    means and the rest, not below the larger of the first two; degrees of freedom by Satterthwaite. With one seed there
    is nothing to say about others: the interval is over problems alone. Raises ValueError for no values or one that is not
    finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"expected one value per seed and problem, shape [S, P]; got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{(~np.isfinite(array)).sum()} of the values are not finite")
    num_seeds, num_problems = array.shape
    mean = math.fsum(array.ravel()) / array.size
    seeds, problems = array.mean(axis=1), array.mean(axis=0)
    rest = array - seeds[:, None] - problems[None, :] + mean
    parts = [(_variance(seeds), num_seeds - 1), (_variance(problems), num_problems - 1)]
    free = (num_seeds - 1) * (num_problems - 1)
    noise = float((rest**2).sum()) / free / array.size if free else 0.0
    total = max(parts[0][0] + parts[1][0] - noise, parts[0][0], parts[1][0])
    spread = sum(part**2 / freedom for part, freedom in (*parts, (noise, free)) if freedom)
    half = t_quantile((1 + CONFIDENCE) / 2, total**2 / spread) * math.sqrt(total) if spread else 0.0
    return Estimate(mean, mean - half, mean + half, num_problems)


def _variance(means: NDArray[np.float64]) -> float:
    """Estimated variance of the mean of `means`; 0 for a single one, from which none can be estimated."""
    return float(means.var(ddof=1)) / len(means) if len(means) > 1 else 0.0


def t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t, for a probability above 1/2 and any real degrees of freedom v above 0.

    Searches x in Pr(t <= sqrt(v) tan x) = 1/2 + Gamma((v+1)/2) / (sqrt(pi) Gamma(v/2)) * integral of cos^(v-1) from 0 to x.
    """
    # the constant and the integrand in logarithms: both overflow for many degrees of freedom
    constant = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        cosines = np.cos(middle / 2 * (_NODES + 1))
        area = middle / 2 * float(_WEIGHTS @ np.exp(constant + (freedom - 1) * np.log(cosines)))
        low, high = (middle, high) if 0.5 + area < probability else (low, middle)
    return math.sqrt(freedom) * math.tan(middle)
