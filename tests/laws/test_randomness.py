"""Keyed draws: uniform, independent between keys, and a function of nothing but the key."""

from __future__ import annotations

import torch

from understudy.randomness import keyed_uniform
from understudy.tasks.lazy import Permutation


def test_a_draw_depends_on_its_key_alone() -> None:
    """Another batch order, batch size or length draws the same numbers (peers 21, rule 8)."""
    many = keyed_uniform(0, "sample", 3, ["a", "b", "c"], 20)
    torch.testing.assert_close(keyed_uniform(0, "sample", 3, ["c", "a"], 7), many[[2, 0], :7], rtol=0, atol=0)
    for other in (
        keyed_uniform(1, "sample", 3, ["a"], 20),
        keyed_uniform(0, "trust", 3, ["a"], 20),
        keyed_uniform(0, "sample", 4, ["a"], 20),
        keyed_uniform(0, "sample", 3, ["b"], 20),
    ):
        assert (other != many[:1]).all()


def test_draws_are_uniform_and_uncorrelated() -> None:
    """Bounds of five standard errors for 200,000 draws."""
    draws = keyed_uniform(0, "sample", 0, [str(name) for name in range(2000)], 100)
    assert draws.dtype == torch.float64
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1
    count = draws.numel()
    assert abs(float(draws.mean()) - 0.5) < 5 * (1 / 12 / count) ** 0.5
    for shifted, plain in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1])):
        covariance = float(((shifted - 0.5) * (plain - 0.5)).mean())
        assert abs(covariance) < 5 / 12 / count**0.5
    cells = torch.histc(draws, 100, 0, 1)
    chi_square = float(((cells - count / 100) ** 2 / (count / 100)).sum())
    assert chi_square < 99 + 5 * (2 * 99) ** 0.5


def test_permutations() -> None:
    """A bijection that needs no memory; another name is another order."""
    first = [Permutation(50, "0/order/0")(index) for index in range(50)]
    assert sorted(first) == list(range(50))
    assert first != [Permutation(50, "0/order/1")(index) for index in range(50)]
