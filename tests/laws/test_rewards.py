"""Rewards and weights without gradient: advantages of groups, corrections, shares, bounds of the entropy; and their edges."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from tests.laws.test_formulas import CASES, Enumerated, V
from understudy.errors import ScoreError
from understudy.linear import LMHead, evaluate
from understudy.losses import advantages
from understudy.methods import DAPO, EOPD, GRPO, KDRL, OPD, OVD, DrGRPO
from understudy.methods.base import Method

INF = math.inf
EPS = 1e-6
REWARDED: dict[str, Method] = {
    "grpo": GRPO(kl_coef=0.1, distil_coef=0.2),
    "grpo sequence": GRPO(length="sequence"),
    "dr_grpo": DrGRPO(max_tokens=9),
    "dapo": DAPO(),
    "kdrl": KDRL(beta=0.3),
    "ovd": OVD(),
}


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(reward: Tensor, group: Tensor, *, std: bool) -> list[float]:
    """The formula, group by group."""
    members: dict[int, list[float]] = defaultdict(list)
    for r, g in zip(reward.tolist(), group.tolist(), strict=True):
        members[g].append(r)
    found = []
    for r, g in zip(reward.tolist(), group.tolist(), strict=True):
        mean = math.fsum(members[g]) / len(members[g])
        spread = math.sqrt(math.fsum((x - mean) ** 2 for x in members[g]) / len(members[g]))
        found.append((r - mean) / (spread + EPS) if std else r - mean)
    return found


GROUP = torch.tensor([4, 9, 4, 0, 4, 9, 2, 9, 4, 2])
"""Four groups of different sizes, interleaved; group 0 has one sample."""


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_advantage_is_that_of_the_formula(std: bool, seed: int) -> None:
    reward = normal(10, seed)
    found = advantages.group_advantage(reward, GROUP, normalise_std=std)
    assert found.tolist() == pytest.approx(by_hand(reward, GROUP, std=std), rel=1e-11, abs=1e-14)
    sums = torch.zeros(10, dtype=torch.float64).index_add_(0, GROUP, found)
    assert sums.abs().max() < 1e-14
    assert found[3] == 0.0


@pytest.mark.parametrize("std", [True, False])
def test_the_order_of_samples_and_the_names_of_groups_are_nothing(std: bool) -> None:
    reward, order = normal(10), torch.randperm(10, generator=torch.Generator().manual_seed(3))
    found = advantages.group_advantage(reward, GROUP, normalise_std=std)
    moved = advantages.group_advantage(reward[order], GROUP[order] * 1000 - 5, normalise_std=std)
    torch.testing.assert_close(moved, found[order], rtol=1e-13, atol=1e-15)
    together = GROUP.argsort(stable=True)
    sorted_ = advantages.group_advantage(reward[together], GROUP[together], normalise_std=std)
    torch.testing.assert_close(sorted_, found[together], rtol=1e-13, atol=1e-15)
    one = GROUP == 9
    alone = advantages.group_advantage(reward[one], GROUP[one], normalise_std=std)
    torch.testing.assert_close(alone, found[one], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("scale", [0.1, 3.0, 1e4])
def test_the_unit_of_a_reward_is_nothing_but_for_the_epsilon(scale: float) -> None:
    reward = normal(10)
    found = advantages.group_advantage(reward, GROUP, normalise_std=True)
    scaled = advantages.group_advantage(scale * reward + 7.0, GROUP, normalise_std=True)
    spread = min(float(reward[GROUP.eq(name)].std(correction=0)) for name in (4, 9, 2))
    torch.testing.assert_close(scaled, found, rtol=2 * EPS * (1 + 1 / scale) / spread, atol=1e-9)
    plain = advantages.group_advantage(scale * reward, GROUP, normalise_std=False)
    torch.testing.assert_close(plain, scale * advantages.group_advantage(reward, GROUP, normalise_std=False))


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, -0.7, 1e9 + 0.1])
def test_equal_rewards_are_exactly_0(value: float, dtype: torch.dtype, std: bool) -> None:
    """Three times 0.1 has a mean that is not 0.1, and a spread of nearly 0 must not blow that up."""
    for size in (1, 2, 3, 6, 7, 49):
        reward = torch.full((size,), value, dtype=dtype)
        found = advantages.group_advantage(reward, torch.zeros(size, dtype=torch.int64), normalise_std=std)
        assert found.tolist() == [0.0] * size
        assert found.dtype == dtype


def test_right_against_wrong() -> None:
    """One right of four: `(1 - 1/4) / sqrt(3/16)`, the population's deviation."""
    found = advantages.group_advantage(numbers(1, 0, 0, 0), torch.zeros(4, dtype=torch.int64), normalise_std=True)
    assert found.tolist() == pytest.approx([math.sqrt(3)] + [-1 / math.sqrt(3)] * 3, rel=1e-5)
    assert advantages.group_advantage(numbers(), torch.zeros(0, dtype=torch.int64), normalise_std=True).tolist() == []


def weights(gap: Tensor, kind: str, low: float = 0.5, high: float = 2.0, own: Tensor | None = None) -> Tensor:
    """`importance` where `log S_old - log mu` is `gap`."""
    own = torch.ones(len(gap), dtype=torch.bool) if own is None else own
    found = advantages.importance(gap, torch.zeros_like(gap), own, kind, low, high)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_corrections_at_and_beyond_their_bounds() -> None:
    """TIS only cuts above; IcePop keeps its closed interval and drops the rest."""
    gap = numbers(0.0, -0.7, 0.7, -0.2, 0.2, -INF, 20.0)
    ratio = gap.exp()
    low, high = float(ratio[1]), float(ratio[2])
    assert weights(gap, "tis", low, high).tolist() == [1.0, low, high, float(ratio[3]), float(ratio[4]), 0.0, high]
    assert weights(gap, "icepop", low, high).tolist() == [1.0, low, high, float(ratio[3]), float(ratio[4]), 0.0, 0.0]
    inside = (math.nextafter(low, 1.0), math.nextafter(high, 1.0))
    assert weights(gap, "icepop", *inside).tolist()[1:3] == [0.0, 0.0]
    assert weights(gap, "tis", *inside).tolist()[1:3] == [low, inside[1]]
    assert advantages.importance(gap, None, gap > 0, "none", 0.5, 2.0) is None


@pytest.mark.parametrize("kind", ["tis", "icepop"])
def test_a_token_that_nobody_sampled_weighs_1(kind: str) -> None:
    gap, own = numbers(math.nan, 0.3, math.nan, 9.0), torch.tensor([False, True, False, False])
    assert weights(gap, kind, own=own).tolist() == [1.0, pytest.approx(math.exp(0.3)), 1.0, 1.0]
    with pytest.raises(ScoreError, match="rollout_logprob"):
        advantages.importance(gap, None, own, kind, 0.5, 2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["tis", "icepop"])
def test_a_sampled_token_without_its_number_is_an_error(kind: str) -> None:
    """Law 9: never a weight of 1, or 0."""
    world = Enumerated.make()
    missing = world.batch.rollout_logprob.clone()  # type: ignore[union-attr]
    missing[4] = math.nan
    with pytest.raises(ScoreError, match="rollout_logprob is NaN on 1 "):
        world.evaluate(OPD(correction=kind), batch=replace(world.batch, rollout_logprob=missing))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(0, 0.0), (15, 0.0), (16, 0.0), (17, -0.25), (18, -0.5), (19, -0.75), (20, -1.0), (21, -1.0), (500, -1.0)],
)
def test_the_penalty_grows_over_the_buffer(length: int, penalty: float) -> None:
    assert advantages.overlong_penalty(length, 20, 4) == penalty
    assert advantages.overlong_penalty(length, 20, 0) == 0.0


def test_a_buffer_as_long_as_the_limit_starts_at_once() -> None:
    assert [advantages.overlong_penalty(n, 4, 4) for n in range(6)] == [0.0, -0.25, -0.5, -0.75, -1.0, -1.0]


def test_the_largest_share() -> None:
    value, mask = numbers(3, math.nan, 5, 1, INF, 4, 2), torch.tensor([1, 0, 1, 1, 0, 1, 1]).bool()

    def chosen(share: float) -> list[int]:
        return advantages.top_share(value, mask, share).nonzero().squeeze(-1).tolist()

    assert chosen(0.0) == []
    assert chosen(0.01) == chosen(0.2) == [2]
    assert chosen(0.21) == chosen(0.4) == [2, 5]
    assert chosen(1.0) == [0, 2, 3, 5, 6]
    empty = torch.zeros(7, dtype=torch.bool)
    assert not advantages.top_share(value, empty, 1.0).any()
    assert advantages.top_share(numbers(), torch.zeros(0, dtype=torch.bool), 0.5).tolist() == []


def test_equal_values_stand_together() -> None:
    value, mask = numbers(1, 2, 2, 2, 0), torch.ones(5, dtype=torch.bool)
    assert advantages.top_share(value, mask, 0.2).tolist() == [False, True, True, True, False]
    assert advantages.top_share(torch.ones(5), mask, 0.2).all()
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(advantages.top_share(value[order], mask, 0.6), advantages.top_share(value, mask, 0.6)[order])


@pytest.mark.parametrize(
    "share",
    [
        "0.2",
        "0.5",
        "0.25",
        "0.07",
    ],
)
def test_a_share_is_that_of_its_decimal(share: str) -> None:
    """`ceil(share N)` tokens, without a token that only a rounding adds."""
    for size in (1, 2, 3, 5, 10, 15, 50, 100, 150, 300):
        found = advantages.top_share(normal(size), torch.ones(size, dtype=torch.bool), float(share))
        assert int(found.sum()) == math.ceil(Fraction(share) * size), size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_the_entropy_of_k_and_a_rest_is_a_lower_bound(seed: int, dtype: torch.dtype) -> None:
    """It grows with K, up to the entropy itself at K = V."""
    logp = (2 * normal(8 * 6, seed).reshape(8, 6)).to(dtype).log_softmax(-1)
    full = -(logp.double().exp() * logp.double()).sum(-1)
    ordered = logp.sort(-1, descending=True).values
    bounds = [advantages.entropy_from_topk(ordered[:, :k]).double() for k in range(1, 7)]
    # the rest at K = V is a rounding r, and contributes r log r
    slack = 1e-12 if dtype == torch.float64 else 1e-4
    for low, high in zip(bounds, [*bounds[1:], full], strict=True):
        assert (low >= 0).all()
        assert (low <= high + slack).all()
    assert (bounds[0] < full - 0.01).any()
    torch.testing.assert_close(bounds[-1], full, rtol=0, atol=slack)


def test_a_sure_teacher_has_no_entropy() -> None:
    assert advantages.entropy_from_topk(numbers(0.0, -INF)[None]).tolist() == [0.0]
    assert advantages.entropy_from_topk(numbers(math.log(0.5))[None]).tolist() == pytest.approx([math.log(2)])


def test_acceptance_is_the_smaller_of_the_ratio_and_1() -> None:
    teacher, student = numbers(-1.0, -2.0, -0.5, -INF, -800.0, 0.0), numbers(-2.0, -1.0, -0.5, -1.0, -1.0, -800.0)
    assert advantages.acceptance(teacher, student).tolist() == [1.0, pytest.approx(math.exp(-1)), 1.0, 0.0, 0.0, 1.0]
    p, q = (normal(V, seed).softmax(-1) for seed in (1, 2))
    kept = (p * advantages.acceptance(q.log(), p.log())).sum()
    assert float(kept) == pytest.approx(1 - float((p - q).abs().sum()) / 2, rel=1e-12)


def test_eopd_says_where_it_estimates_the_entropy() -> None:
    """From K probabilities it is a lower bound: no token is uncertain by the estimate alone."""
    world, method = Enumerated.make(), EOPD(k=2, threshold=1.0)
    head, found = LMHead(torch.eye(V, dtype=torch.float64)), {}
    for entropy in (world.batch.teacher_entropy, None):
        batch = replace(world.judged(method), teacher_entropy=entropy)
        metrics = evaluate(method, batch, world.student, head).metrics
        found[entropy is None] = metrics["uncertain"].value
        assert metrics["teacher_entropy_estimated"].value == float(entropy is None)
    assert found[True] < found[False]
    # every entry is given: nothing is estimated away
    whole = replace(method, k=V)
    bare = replace(world.judged(whole), teacher_entropy=None)
    for one, other in zip(world.evaluate(whole, batch=bare), world.evaluate(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_an_empty_mask_is_0(name: str) -> None:
    """A micro-batch in which nothing is trained: no NaN, no gradient."""
    world = Enumerated.make()
    nothing = replace(world, batch=replace(world.batch, mask=torch.zeros_like(world.batch.mask)))
    loss, gradient = nothing.evaluate(CASES[name][0])
    assert float(loss) == 0.0
    assert not gradient.any()


@pytest.mark.parametrize("hole", [INF, -INF, 1e300])
@pytest.mark.parametrize("name", REWARDED)
def test_what_stands_in_masked_places_is_nothing(name: str, hole: float) -> None:
    """Law 8: the worlds hold NaN there; anything else gives the same bits."""
    world = Enumerated.make()
    values = {
        key: torch.where(world.batch.mask, value, hole)
        for key, value in vars(world.batch).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    other = replace(world, batch=replace(world.batch, **values))
    for one, two in zip(other.evaluate(REWARDED[name]), world.evaluate(REWARDED[name]), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", REWARDED)
def test_responses_of_one_token(name: str) -> None:
    """Each token a sample of its own: at S = S_old without a teacher or reference the loss is minus the mean advantage."""
    world = Enumerated.make(stale=False)
    batch = replace(world.batch, sequence=torch.arange(len(world.batch)), on_policy=torch.ones_like(world.batch.mask))
    off = {key: 0.0 for key in ("kl_coef", "distil_coef", "beta") if hasattr(REWARDED[name], key)}
    method = replace(REWARDED[name], **off)  # type: ignore[arg-type]
    loss, gradient = world.evaluate(method, batch=batch)
    trained = batch.outcome_advantage[batch.mask]  # type: ignore[index]
    assert float(loss) == pytest.approx(-float(trained.mean()) / (9 if name == "dr_grpo" else 1), rel=1e-12)
    assert gradient[batch.mask].abs().sum(-1).min() > 0
    whole = world.evaluate(REWARDED[name], batch=batch)
    assert whole[0].isfinite()
    assert whole[1].isfinite().all()


@pytest.mark.parametrize("field", ["outcome_advantage", "teacher_logprob", "reference_logprob"])
@pytest.mark.parametrize("name", ["grpo", "kdrl", "ovd"])
def test_a_missing_reward_or_score_is_an_error(name: str, field: str) -> None:
    """Law 9: absent or NaN on one trained token, never 0; what the method does not read may be absent."""
    world, method = Enumerated.make(), REWARDED[name]
    spoilt = getattr(world.batch, field).clone()
    spoilt[4] = math.nan
    for value, words in ((None, "does not have"), (spoilt, "NaN on 1 ")):
        batch = replace(world.batch, **{field: value})
        if field in method.requires:
            with pytest.raises(ScoreError, match=words):
                world.evaluate(method, batch=batch)
        else:
            assert torch.equal(world.evaluate(method, batch=batch)[1], world.evaluate(method)[1])
