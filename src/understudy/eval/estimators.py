"""Estimates from graded samples: per problem, and means with intervals over problems, or over seeds and problems.

Shape legend: P problems, n samples of each, S seeds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from understudy.randomness import hash_name

TAILS = (0.025, 0.975)
"""Quantiles that bound an interval: 95 %."""
RESAMPLES = 10_000
"""The Monte Carlo error of a bound is then about 1 % of the interval's width."""
RIGHT = 1.0
"""The lowest score that counts as right, for pass@k and pass^k."""

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)
Ends = tuple[float, float]
"""The least and the most that a value can be."""
SHARE: Ends = (0.0, 1.0)
LENGTH: Ends = (0.0, math.inf)
_BLOCK = 1 << 22
"""Random numbers that are held at a time: 32 MiB."""


@dataclass(frozen=True)
class Estimate:
    """A mean over `num_problems` problems and its 95 % interval; None: the values do not say how far it may be."""

    value: float
    low: float | None
    high: float | None
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


def pass_power_k(num_right: ArrayLike, num_samples: int, k: int) -> NDArray[np.float64]:
    """C(c, k) / C(n, k): the chance that k of n samples, drawn without repetition, are all right. Shape [P].

    Written pass^k; unbiased for the chance that k fresh samples all are (Yao et al. 2024, tau-bench). Raises as `pass_at_k`.
    """
    # a right sample counts as a wrong one
    return 1.0 - pass_at_k(num_samples - np.asarray(num_right, dtype=np.int64), num_samples, k)


def majority_score(answers: Sequence[str | None], scores: Sequence[float]) -> float:
    """The score of the answer that most samples of one problem give; the mean over those that tie.

    An answer is what its verifier read, compared as it is written; None is no vote, and without any vote the score
    is 0. Samples with one answer and different scores count by their mean.
    """
    votes = _votes(answers, scores)
    if not votes:
        return 0.0
    most = max(size for size, _ in votes)
    return float(np.mean([score for size, score in votes if size == most]))


def majority_at_k(answers: Sequence[str | None], scores: Sequence[float], k: int) -> float:
    """The mean of `majority_score` over all C(n, k) ways to draw k of the n samples of one problem, written maj@k.

    Unbiased for the majority of k fresh samples. Computed exactly, without listing the ways. Raises ValueError unless
    1 <= k <= n.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"k is {k}; it must be from 1 to {len(answers)}, the number of samples")
    if k == len(answers):
        return majority_score(answers, scores)
    return _expected_majority(tuple(sorted(_votes(answers, scores))), len(answers), k)


def _votes(answers: Sequence[str | None], scores: Sequence[float]) -> list[tuple[int, float]]:
    """How often each answer was given, and its mean score."""
    votes: dict[str, list[float]] = defaultdict(list)
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            votes[answer].append(score)
    return [(len(group), float(np.mean(group))) for group in votes.values()]


@lru_cache(maxsize=4096)
def _expected_majority(votes: tuple[tuple[int, float], ...], num_samples: int, k: int) -> float:
    """The mean of the majority's score over draws of k < n samples: the sum over the votes that the majority has.

    k of n without repetition are the same as each with probability k / n, given that there are k: so that the votes for
    different answers are independent, and no number overflows.
    """
    share, total = k / num_samples, 0.0
    offsets = np.subtract.outer(np.arange(k + 1), np.arange(k + 1))
    binomials = {size: _binomial(size, share) for size in {size for size, _ in votes}}
    for most in range(1, min(k, max((size for size, _ in votes), default=0)) + 1):
        large = [(size, score) for size, score in votes if size >= most]
        # [drawn so far, answers with `most` votes so far]: probability, and probability times the sum of their scores
        chance = np.zeros((k + 1, k // most + 1))
        summed = np.zeros_like(chance)
        rest = _binomial(num_samples - sum(size for size, _ in large), share)[: k + 1]
        chance[: len(rest), 0] = rest
        for size, score in large:
            drawn = binomials[size]
            fewer = np.where((offsets >= 0) & (offsets < most), drawn[offsets.clip(0, most)], 0.0)
            tied_chance, tied_sum = np.zeros_like(chance), np.zeros_like(chance)
            tied_chance[most:, 1:] = drawn[most] * chance[:-most, :-1]
            tied_sum[most:, 1:] = drawn[most] * (summed[:-most, :-1] + score * chance[:-most, :-1])
            chance, summed = fewer @ chance + tied_chance, fewer @ summed + tied_sum
        total += float((summed[k, 1:] / np.arange(1, summed.shape[1])).sum())
    # a mean of scores, and of 0 where nobody votes, but for its rounding
    return min(total / float(_binomial(num_samples, share)[k]), max((score for _, score in votes), default=0.0))


def _binomial(num: int, share: float) -> NDArray[np.float64]:
    """Probabilities of 0 to `num` successes, each with a probability above 0 and below 1. Shape [num + 1]."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num + 1)))])
    right = np.arange(num + 1)
    ways = logs[num] - logs - logs[::-1]
    return np.asarray(np.exp(ways + right * math.log(share) + (num - right) * math.log1p(-share)), dtype=np.float64)


def estimate_mean(values: ArrayLike, ends: Ends = (-math.inf, math.inf)) -> Estimate:
    """The mean of one value per problem [P] with its interval over problems, whatever their order.

    With finite `ends`, the least and the most that a value can be, a bound is a quantile of `sum_i w_i x_i + w_0 end` over
    weights w that are Dirichlet(1, ..., 1): for values that are right or wrong the exact one of Clopper and Pearson (1934), for
    others that of Gaffke, which holds the mean at least as often as it says in all that was tried (Learned-Miller and Thomas,
    arXiv 1905.06208). Without them, Student's t as far as the ends, and no bounds where nothing is known of the spread: one
    problem, or equal values.
    Raises ValueError for no values, one that is not finite and one beyond the ends.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"an estimate needs one value per problem, shape [P] with P > 0; got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"an estimate needs finite values; {(~np.isfinite(array)).sum()} are not")
    mean = math.fsum(array) / len(array)
    if array.min() < ends[0] or array.max() > ends[1]:
        raise ValueError(f"the values go from {array.min()} to {array.max()}; they must lie in {list(ends)}")
    if math.isfinite(ends[1] - ends[0]):
        low, high = (_bound(array, end, tail) for end, tail in zip(ends, TAILS, strict=True))
        return Estimate(mean, low, high, len(array))
    if np.ptp(array) == 0:
        return Estimate(mean, None, None, len(array))
    half = t_quantile(TAILS[1], len(array) - 1) * math.sqrt(_variance(array))
    return Estimate(mean, max(ends[0], mean - half), min(ends[1], mean + half), len(array))


def _bound(values: NDArray[np.float64], end: float, probability: float) -> float:
    """The quantile of the mean of `values` and `end` under weights that are Dirichlet(1, ..., 1)."""
    distinct, counts = np.unique(np.append(values, end), return_counts=True)
    if len(distinct) == 1:
        return end
    if len(distinct) == 2:
        share = beta_quantile(probability, int(counts[1]), int(counts[0]))
        return float(distinct[0] + share * (distinct[1] - distinct[0]))
    rng = np.random.Generator(np.random.Philox(key=hash_name("interval")))
    rows = max(1, _BLOCK // len(distinct))
    means = []
    for start in range(0, RESAMPLES, rows):
        weights = rng.standard_gamma(counts, size=(min(rows, RESAMPLES - start), len(distinct)))
        means.append(weights @ distinct / weights.sum(axis=1))
    return float(np.quantile(np.concatenate(means), probability))


def paired_difference(before: ArrayLike, after: ArrayLike, ends: Ends = (-math.inf, math.inf)) -> Estimate:
    """The mean of `after - before` [P], row by row the same problem; `ends` are those of the values.

    Raises ValueError where the shapes differ, and as `estimate_mean`.
    """
    first, last = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != last.shape:
        raise ValueError(f"paired values must be of the same problems; got {first.shape} before and {last.shape} after")
    return estimate_mean(last - first, (ends[0] - ends[1], ends[1] - ends[0]))


def crossed_mean(values: ArrayLike, ends: Ends = (-math.inf, math.inf)) -> Estimate:
    """The mean of [S, P] and a t interval for it, seeds and problems both drawn at random (crossed random effects).

    Var = var_seed / S + var_problem / P - var_rest / (S P), of the sample variances of the seeds' means, the problems'
    means and the rest, not below the larger of the first two; degrees of freedom by Satterthwaite. The interval does not go
    beyond `ends`. With one seed there is nothing to say about others, and where nothing varies no variance is known: there it
    is over problems alone, as `estimate_mean`. Raises ValueError for no values or one that is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"expected one value per seed and problem, shape [S, P]; got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{(~np.isfinite(array)).sum()} of the values are not finite")
    num_seeds, num_problems = array.shape
    mean = math.fsum(array.ravel()) / array.size
    seeds, problems = array.mean(axis=1), array.mean(axis=0)
    # not == 0: means of equal values differ by their rounding
    if num_seeds == 1 or max(np.ptp(seeds), np.ptp(problems)) < 1e-12:
        return estimate_mean(problems, ends)
    rest = array - seeds[:, None] - problems[None, :] + mean
    parts = [(_variance(seeds), num_seeds - 1), (_variance(problems), num_problems - 1)]
    free = (num_seeds - 1) * (num_problems - 1)
    noise = float((rest**2).sum()) / free / array.size if free else 0.0
    total = max(parts[0][0] + parts[1][0] - noise, parts[0][0], parts[1][0])
    spread = sum(part**2 / freedom for part, freedom in (*parts, (noise, free)) if freedom)
    half = t_quantile(TAILS[1], total**2 / spread) * math.sqrt(total)
    return Estimate(mean, max(ends[0], mean - half), min(ends[1], mean + half), num_problems)


def _variance(values: NDArray[np.float64]) -> float:
    """Estimated variance of the mean of `values`; 0 for a single one, from which none can be estimated."""
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0


def beta_quantile(probability: float, a: int, b: int) -> float:
    """Quantile of Beta(a, b) for whole a and b above 0: x with Pr(Binomial(a + b - 1, x) >= a) = probability."""
    num = a + b - 1
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num + 1)))])
    right = np.arange(a, num + 1)
    ways = logs[num] - logs[right] - logs[num - right]
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        tail = np.exp(ways + right * math.log(middle) + (num - right) * math.log1p(-middle)).sum()
        low, high = (middle, high) if tail < probability else (low, middle)
    return middle


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
