"""pass@k, maj@k and bootstrap intervals against enumeration and known distributions."""

from __future__ import annotations

import math
from itertools import combinations, permutations

import numpy as np
import pytest

from understudy.eval import estimators
from understudy.eval.estimators import bootstrap_mean, majority_score, paired_difference, pass_at_k


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(num_samples: int) -> None:
    right = np.arange(num_samples + 1)
    for k in range(1, num_samples + 1):
        expected = [
            np.mean([any(index < c for index in subset) for subset in combinations(range(num_samples), k)])
            for c in right
        ]
        # a product of at most 7 factors, each rounded once
        np.testing.assert_allclose(pass_at_k(right, num_samples, k), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("p", [0.0, 0.01, 0.37, 1.0])
@pytest.mark.parametrize(("num_samples", "k"), [(1, 1), (5, 3), (64, 16), (256, 100)])
def test_pass_at_k_is_unbiased(num_samples: int, k: int, p: float) -> None:
    right = np.arange(num_samples + 1)
    chance = np.array([math.comb(num_samples, int(c)) * p**c * (1 - p) ** (num_samples - c) for c in right])
    mean = chance @ pass_at_k(right, num_samples, k)
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_k_limits() -> None:
    right = np.array([0, 3, 16])
    np.testing.assert_allclose(pass_at_k(right, 16, 1), right / 16, atol=1e-15)
    np.testing.assert_array_equal(pass_at_k(right, 16, 16), [0, 1, 1])
    curve = np.array([pass_at_k(right, 16, k) for k in range(1, 17)])
    assert (np.diff(curve, axis=0) >= 0).all()


@pytest.mark.parametrize(("right", "num_samples", "k"), [([1], 4, 5), ([1], 4, 0), ([5], 4, 1), ([-1], 4, 1)])
def test_pass_at_k_refuses_what_has_no_meaning(right: list[int], num_samples: int, k: int) -> None:
    with pytest.raises(ValueError, match="from"):
        pass_at_k(right, num_samples, k)


@pytest.mark.parametrize(
    ("answers", "scores", "expected"),
    [
        (["7", "7", "8"], [1, 1, 0], 1.0),
        (["7", "8", "8"], [1, 0, 0], 0.0),
        (["7", "8"], [1, 0], 1 / 2),
        (["7", "8", "9"], [0, 1, 0], 1 / 3),
        (["7", "7", "8", "8", "9"], [1, 1, 0, 0, 0], 1 / 2),
        ([None, None, "7"], [0, 0, 1], 1.0),
        ([None, None], [0, 0], 0.0),
        (["7", "7", "8"], [1, 0, 0], 1 / 2),
    ],
)
def test_majority(answers: list[str | None], scores: list[float], expected: float) -> None:
    assert majority_score(answers, scores) == pytest.approx(expected, abs=1e-15)


def test_majority_is_the_expectation_of_a_vote_that_breaks_ties_by_lot() -> None:
    answers, scores = ["a", "b", "c", "a", "b"], [1.0, 0.0, 0.0, 1.0, 0.0]
    outcomes = []
    for order in permutations(range(5)):  # the first of the most frequent wins, in every order of the samples
        votes = [answers[index] for index in order]
        winner = max(dict.fromkeys(votes), key=votes.count)
        outcomes.append(scores[answers.index(winner)])
    assert majority_score(answers, scores) == pytest.approx(np.mean(outcomes), abs=1e-12)


def test_the_bootstrap_is_that_of_drawing_problems() -> None:
    rng = np.random.default_rng(1)
    values = rng.choice([0.0, 0.25, 0.5, 1.0], size=60, p=[0.5, 0.2, 0.1, 0.2])
    drawn = values[rng.integers(0, 60, size=(200_000, 60))].mean(axis=1)
    estimate = bootstrap_mean(values, "x")
    assert estimate.value == pytest.approx(values.mean(), abs=1e-15)
    # The error of a 2.5 % quantile of 10,000 draws of spread s is about s * sqrt(0.025 * 0.975 / 10,000) / 0.058 = 0.027 s;
    # the means lie on a lattice of 1 / 240.
    tolerance = 4 * 0.027 * drawn.std() + 1 / 240
    assert estimate.low == pytest.approx(np.quantile(drawn, 0.025), abs=tolerance)
    assert estimate.high == pytest.approx(np.quantile(drawn, 0.975), abs=tolerance)


def test_the_interval_shrinks_as_the_standard_error() -> None:
    values = np.random.default_rng(2).normal(3, 2, size=1500)
    estimate = bootstrap_mean(values, "x")
    # Each bound is off by 2.7 % of the standard error (see above): 3 % of the width is more than 4 deviations.
    assert (estimate.high - estimate.low) / (2 * 1.96) == pytest.approx(values.std() / math.sqrt(1500), rel=0.03)


def test_coverage() -> None:
    """The interval of 120 problems holds the true mean in 95 % of repetitions, less the known small-sample error."""
    rng = np.random.default_rng(3)
    repetitions, covered = 500, 0
    for _ in range(repetitions):
        values = rng.binomial(4, rng.beta(1, 2, size=120)) / 4
        estimate = bootstrap_mean(values, "x")
        covered += estimate.low <= 1 / 3 <= estimate.high
    # three standard deviations of 500 trials at 0.95, and 1 % for the percentile interval's own error at P = 120
    slack = 3 * math.sqrt(0.95 * 0.05 / repetitions) + 0.01
    assert abs(covered / repetitions - 0.95) <= slack


def test_the_interval_depends_on_values_and_key_only(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).random(200)
    once = bootstrap_mean(values, "avg@4")
    assert bootstrap_mean(values[::-1], "avg@4") == once
    monkeypatch.setattr(estimators, "_BLOCK", 7 * 200)
    blocked = bootstrap_mean(values, "avg@4")
    assert (blocked.low, blocked.high) == pytest.approx((once.low, once.high), rel=1e-13), (
        "equal draws, summed in another order"
    )
    assert bootstrap_mean(values, "avg@8").low != once.low


def test_the_interval_holds_the_mean_and_stays_within_the_values() -> None:
    for size in (1, 2, 5, 40):
        values = np.random.default_rng(size).random(size)
        estimate = bootstrap_mean(values, "x")
        assert values.min() <= estimate.low <= estimate.value <= estimate.high <= values.max()
        assert estimate.num_problems == size


def test_no_values_and_missing_values_are_refused() -> None:
    with pytest.raises(ValueError, match="P > 0"):
        bootstrap_mean([], "x")
    with pytest.raises(ValueError, match="avg@1 has 1 that are not"):
        bootstrap_mean([0.5, math.nan], "avg@1")


def test_paired_difference_of_equal_evaluations_is_zero() -> None:
    values = np.random.default_rng(5).random(50)
    estimate = paired_difference(values, values, "x")
    assert (estimate.value, estimate.low, estimate.high) == (0.0, 0.0, 0.0)


def test_pairing_takes_the_difficulty_of_the_problems_out() -> None:
    rng = np.random.default_rng(6)
    difficulty = rng.random(300)
    before, after = difficulty, difficulty + 0.05 + rng.normal(0, 0.01, size=300)
    paired = paired_difference(before, after, "x")
    assert 0.045 < paired.low <= paired.value <= paired.high < 0.055
    alone = [bootstrap_mean(values, "x") for values in (before, after)]
    assert alone[0].high > alone[1].low, "unpaired, the intervals overlap"


def test_pairing_needs_the_same_problems() -> None:
    with pytest.raises(ValueError, match="same problems"):
        paired_difference([1.0, 0.0], [1.0], "x")
