"""pass@k, maj@k and intervals against enumeration and known distributions."""

from __future__ import annotations

import math
from itertools import combinations, permutations, product

import numpy as np
import pytest

from understudy.eval import estimators
from understudy.eval.estimators import (
    LENGTH,
    SHARE,
    beta_quantile,
    crossed_mean,
    estimate_mean,
    majority_at_k,
    majority_score,
    paired_difference,
    pass_at_k,
    pass_power_k,
)


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


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_power_k_is_the_share_of_subsets_that_are_right(num_samples: int) -> None:
    right = np.arange(num_samples + 1)
    for k in range(1, num_samples + 1):
        expected = [
            np.mean([all(index < c for index in subset) for subset in combinations(range(num_samples), k)])
            for c in right
        ]
        np.testing.assert_allclose(pass_power_k(right, num_samples, k), expected, rtol=0, atol=1e-15)
        np.testing.assert_allclose(expected, [math.comb(c, k) / math.comb(num_samples, k) for c in right], atol=1e-15)


@pytest.mark.parametrize("p", [0.0, 0.01, 0.37, 1.0])
@pytest.mark.parametrize(("num_samples", "k"), [(1, 1), (5, 3), (64, 16), (256, 100)])
def test_pass_power_k_is_unbiased(num_samples: int, k: int, p: float) -> None:
    right = np.arange(num_samples + 1)
    chance = np.array([math.comb(num_samples, int(c)) * p**c * (1 - p) ** (num_samples - c) for c in right])
    assert chance @ pass_power_k(right, num_samples, k) == pytest.approx(p**k, abs=1e-12)


@pytest.mark.parametrize(("right", "num_samples", "k"), [([1], 4, 5), ([1], 4, 0), ([5], 4, 1), ([-1], 4, 1)])
def test_pass_at_k_refuses_what_has_no_meaning(right: list[int], num_samples: int, k: int) -> None:
    for estimator in (pass_at_k, pass_power_k):
        with pytest.raises(ValueError, match="from"):
            estimator(right, num_samples, k)


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


@pytest.mark.parametrize("seed", range(6))
def test_majority_at_k_is_the_mean_over_subsets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num = int(rng.integers(2, 10))
    answers = [None if drawn == 0 else str(drawn) for drawn in rng.integers(0, 4, num).tolist()]
    right = {answer: rng.random() for answer in set(answers)}
    scores = [0.0 if answer is None else right[answer] for answer in answers]
    for k in range(1, num + 1):
        subsets = list(combinations(range(num), k))
        expected = np.mean([majority_score([answers[i] for i in some], [scores[i] for i in some]) for some in subsets])
        # sums of at most a few hundred products of probabilities that are rounded in logarithms
        assert majority_at_k(answers, scores, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_majority_at_k_is_unbiased(k: int) -> None:
    """The mean over all outcomes of 5 samples is that over all outcomes of k samples."""
    chances = {"right": 0.4, "wrong": 0.35, None: 0.25}

    def mean(num: int, value: object) -> float:
        total = 0.0
        for drawn in product(chances, repeat=num):
            scores = [float(answer == "right") for answer in drawn]
            total += math.prod(chances[answer] for answer in drawn) * value(drawn, scores)  # type: ignore[operator]
        return total

    expected = mean(k, majority_score)
    assert mean(5, lambda drawn, scores: majority_at_k(drawn, scores, k)) == pytest.approx(expected, abs=1e-12)


def test_majority_at_k_limits() -> None:
    answers, scores = ["a", "a", "b", None], [1.0, 1.0, 0.0, 0.0]
    assert majority_at_k(answers, scores, 1) == pytest.approx(0.5)
    assert majority_at_k(answers, scores, 4) == majority_score(answers, scores) == 1.0
    assert majority_at_k([None] * 4, [0.0] * 4, 2) == 0.0
    assert majority_at_k(["a"] * 40 + ["b"] * 24, [1.0] * 64, 16) == pytest.approx(1.0)
    for k in range(1, 65):
        assert majority_at_k(["a"] * 40 + ["b"] * 24, [1.0] * 64, k) <= 1.0, "an interval of a share needs a share"
    # 2,000 of 3,000 agree: their C(3000, 1500) has 902 digits
    many, marks = ["a"] * 2000 + ["b"] * 1000, [1.0] * 2000 + [0.0] * 1000
    assert majority_at_k(many, marks, 8) == pytest.approx(0.826, abs=1e-3)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k is {k}; it must be from 1 to 4"):
            majority_at_k(answers, scores, k)


def binomial_tail(at_least: int, num: int, p: float) -> float:
    return sum(math.comb(num, k) * p**k * (1 - p) ** (num - k) for k in range(at_least, num + 1))


@pytest.mark.parametrize("num", [1, 2, 3, 10, 60])
def test_the_interval_of_right_and_wrong_is_exact(num: int) -> None:
    """A share at a bound gives what was seen, or something further away, with probability 2.5 % (Clopper and Pearson)."""
    for right in range(num + 1):
        found = estimate_mean([1.0] * right + [0.0] * (num - right), SHARE)
        assert found.low is not None
        assert found.high is not None
        assert found.value == pytest.approx(right / num)
        assert found.low == 0.0 if right == 0 else binomial_tail(right, num, found.low) == pytest.approx(0.025)
        assert (
            found.high == 1.0 if right == num else 1 - binomial_tail(right + 1, num, found.high) == pytest.approx(0.025)
        )


@pytest.mark.parametrize(
    ("right", "num", "low", "high"), [(0, 2, 0, 0.842), (5, 10, 0.187, 0.813), (1, 20, 0.001, 0.249)]
)
def test_published_exact_bounds(right: int, num: int, low: float, high: float) -> None:
    """Tables of the exact binomial interval, three digits."""
    found = estimate_mean([1.0] * right + [0.0] * (num - right), SHARE)
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-4)


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, 1.0], [0.5, 0.5], [0.25] * 10, [1.0]])
def test_equal_values_are_not_certain(values: list[float]) -> None:
    found = estimate_mean(values, SHARE)
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low > 1 / (1 + len(values))
    assert found == crossed_mean([values] * 3, SHARE), "nor if seeds agree"
    without_ends = estimate_mean(values)
    assert (without_ends.low, without_ends.high) == (None, None), "nothing is known of the spread"


def test_a_length_is_never_below_nothing() -> None:
    found = estimate_mean([7.0, 13.0], LENGTH)
    assert (found.low, found.high) == (0.0, pytest.approx(10 + 12.7062 * 3, abs=1e-3)), (
        "Student's t, one degree of freedom"
    )


def test_seeds_and_problems_that_cancel_are_not_certain() -> None:
    found = crossed_mean([[1.0, 0.0], [0.0, 1.0]], SHARE)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.2
    assert found.high > 0.8


def test_many_problems_give_the_interval_of_the_normal_distribution() -> None:
    values = np.random.default_rng(2).choice([0.0, 0.25, 0.5, 1.0], size=1500, p=[0.5, 0.2, 0.1, 0.2])
    half = 1.96 * values.std() / math.sqrt(1500)
    for found in (estimate_mean(values, SHARE), estimate_mean(values)):
        # a bound of 10,000 draws is off by 2.7 % of the standard error; one value in 1,501 more moves it by 1 / 1,501
        assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.06 * half)


@pytest.mark.parametrize("num", [3, 8, 120])
def test_coverage(num: int) -> None:
    """Intervals hold the true mean in at least 95 % of repetitions however few the problems are."""
    rng = np.random.default_rng(3)
    repetitions, covered = 500, 0
    for _ in range(repetitions):
        found = estimate_mean(rng.binomial(4, rng.beta(1, 2, size=num)) / 4, SHARE)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 1 / 3 <= found.high
    # three standard deviations of 500 trials at 0.95
    assert covered / repetitions >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / repetitions)


def test_the_interval_depends_on_the_values_only(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).random(200)
    once = estimate_mean(values, SHARE)
    assert estimate_mean(values[::-1], SHARE) == once
    monkeypatch.setattr(estimators, "_BLOCK", 7 * 201)
    blocked = estimate_mean(values, SHARE)
    assert (blocked.low, blocked.high) == pytest.approx((once.low, once.high), rel=1e-13), (
        "equal draws, summed in another order"
    )


def test_the_interval_holds_the_mean_and_stays_within_the_ends() -> None:
    for size in (1, 2, 5, 40):
        values = np.random.default_rng(size).random(size)
        found = estimate_mean(values, SHARE)
        assert found.low is not None
        assert found.high is not None
        assert 0 <= found.low < found.value < found.high <= 1
        assert found.num_problems == size


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 5), (400, 3)])
def test_beta_quantiles(a: int, b: int) -> None:
    draws = np.random.default_rng(7).beta(a, b, size=200_000)
    for probability in (0.025, 0.5, 0.975):
        assert (draws < beta_quantile(probability, a, b)).mean() == pytest.approx(probability, abs=0.002)


def test_no_values_and_missing_values_are_refused() -> None:
    with pytest.raises(ValueError, match="P > 0"):
        estimate_mean([])
    with pytest.raises(ValueError, match="1 are not"):
        estimate_mean([0.5, math.nan])
    with pytest.raises(ValueError, match="must lie in"):
        estimate_mean([0.5, 2.0], SHARE)


def test_paired_difference_of_equal_evaluations_is_zero_and_not_certain() -> None:
    values = np.random.default_rng(5).random(50)
    found = paired_difference(values, values, SHARE)
    # the next problem may differ: each end is as far as 50 equal ones allow
    assert found.value == 0.0
    assert (found.low, found.high) == pytest.approx((-0.0711, 0.0711), abs=1e-4)


@pytest.mark.parametrize(("num", "is_significant"), [(5, False), (6, True)])
def test_six_problems_that_all_got_better_are_the_fewest_that_say_so(num: int, is_significant: bool) -> None:
    """As for the exact sign test, which is 2 * 0.5^5 = 0.06 with five and 0.03 with six."""
    low = paired_difference([0.0] * num, [1.0] * num, SHARE).low
    assert low is not None
    assert (low > 0) is is_significant


def test_pairing_takes_the_difficulty_of_the_problems_out() -> None:
    rng = np.random.default_rng(6)
    difficulty = rng.random(300)
    before, after = difficulty, difficulty + 0.05 + rng.normal(0, 0.01, size=300)
    paired = paired_difference(before, after)
    assert paired.low is not None
    assert paired.high is not None
    assert 0.045 < paired.low <= paired.value <= paired.high < 0.055
    first, last = (estimate_mean(values) for values in (before, after))
    assert first.high is not None
    assert last.low is not None
    assert first.high > last.low, "unpaired, the intervals overlap"


def test_pairing_needs_the_same_problems() -> None:
    with pytest.raises(ValueError, match="same problems"):
        paired_difference([1.0, 0.0], [1.0])
