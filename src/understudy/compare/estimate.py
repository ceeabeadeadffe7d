"""Means over seeds and problems with intervals for both: another seed, and other problems, would give another number.

Shape legend: S seeds, P problems.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from understudy.eval import Estimate
from understudy.eval.estimators import CONFIDENCE

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


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
    """Of the mean of `means`; 0 for a single one, which says nothing."""
    return float(means.var(ddof=1)) / len(means) if len(means) > 1 else 0.0


def t_quantile(probability: float, freedom: float) -> float:
    """Of Student's t, for a probability above 1/2 and any real degrees of freedom above 0."""
    low, high = 0.0, 1.0
    while _t_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, freedom: float) -> float:
    """1/2 + Gamma((v+1)/2) / (sqrt(pi) Gamma(v/2)) * integral of cos^(v-1) from 0 to atan(t / sqrt v), for t >= 0."""
    end = math.atan(t / math.sqrt(freedom))
    angles = end / 2 * (_NODES + 1)
    # the constant and the integrand in logarithms: both overflow for many degrees of freedom
    constant = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    area = end / 2 * float(_WEIGHTS @ np.exp(constant + (freedom - 1) * np.log(np.cos(angles))))
    return 0.5 + area
