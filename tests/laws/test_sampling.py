"""The inverse-CDF draw is the distribution: exactly, not on average."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tests.tiny_models import letters, request, tiny
from understudy.engines import HFEngine
from understudy.engines.hf.decode import draw
from understudy.types import Sampling

GRID = 20_000
LAST = 1.0 - 2.0**-53
"""The largest number that `keyed_uniform` gives."""


def measure(logits: Tensor, sampling: Sampling) -> Tensor:
    """The share of [0, 1) that each token takes, found by walking over a grid of uniform numbers. [V]."""
    uniform = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    ids, _ = draw(logits.expand(GRID, -1), uniform, sampling)
    return ids.bincount(minlength=logits.numel()).double() / GRID


def filtered_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """The filters of transformers, in its order."""
    warpers = LogitsProcessorList()
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    probs: Tensor = warpers(None, logits[None]).softmax(-1)[0]
    return probs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_token_takes_its_probability_of_the_unit_interval(dtype: torch.dtype) -> None:
    logits = torch.randn(50, dtype=dtype) * 3
    # an interval of length p holds p * GRID grid points, give or take one; float32 weights err by 1e-6 on top
    torch.testing.assert_close(
        measure(logits, Sampling()),
        logits.double().softmax(-1),
        rtol=0,
        atol=1 / GRID + (1e-6 if dtype == torch.float32 else 0),
    )


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=5),
        Sampling(top_k=99),
        Sampling(top_p=0.7),
        Sampling(top_p=1e-6),
        Sampling(min_p=0.1),
        Sampling(min_p=1.0),
        Sampling(top_k=8, top_p=0.8, min_p=0.05),
    ],
    ids=str,
)
def test_filters_are_those_of_transformers(sampling: Sampling) -> None:
    logits = torch.randn(30, dtype=torch.float64) * 2
    torch.testing.assert_close(measure(logits, sampling), filtered_probs(logits, sampling), rtol=0, atol=1 / GRID)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=3), Sampling(top_p=0.5), Sampling(min_p=0.3)], ids=str)
def test_logprob_refers_to_the_unfiltered_distribution(sampling: Sampling) -> None:
    logits = torch.randn(64, 20, dtype=torch.float64) * 4
    ids, logprob = draw(logits, torch.rand(64, dtype=torch.float64), sampling)
    expected = logits.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    torch.testing.assert_close(logprob, expected, rtol=0, atol=1e-13)


def test_greedy_takes_the_peak_whatever_the_number() -> None:
    logits = torch.randn(64, 20, dtype=torch.float64)
    ids, logprob = draw(logits, torch.rand(64, dtype=torch.float64), Sampling(temperature=0.0))
    assert torch.equal(ids, logits.argmax(-1))
    torch.testing.assert_close(logprob, logits.log_softmax(-1).amax(-1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=4)], ids=str)
@pytest.mark.parametrize("uniform", [0.0, LAST])
def test_the_ends_of_the_interval_draw_no_impossible_token(
    dtype: torch.dtype, sampling: Sampling, uniform: float
) -> None:
    """A cumulative sum that ends at 0.9999999 and a first token of weight 0 are the two classic traps."""
    logits = torch.tensor([-math.inf, -1e4, 0.1, 0.3, 0.2, -1e4, -math.inf], dtype=dtype).repeat(4, 1)
    ids, logprob = draw(logits, torch.full((4,), uniform, dtype=torch.float64), sampling)
    assert bool(((ids >= 2) & (ids <= 4)).all())
    assert bool(logprob.isfinite().all())


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=40),
    st.one_of(st.floats(0, LAST), st.sampled_from([0.0, LAST])),
)
def test_the_number_lies_in_the_interval_of_its_token(values: list[float], uniform: float) -> None:
    logits = torch.tensor([values], dtype=torch.float64)
    ids, _ = draw(logits, torch.tensor([uniform], dtype=torch.float64), Sampling())
    edges = logits.softmax(-1).cumsum(-1)[0]
    token = int(ids)
    below = float(edges[token - 1]) if token else 0.0
    # the cumulative sums are formed in another order here: a few roundings of numbers up to 1
    assert below - 1e-14 <= uniform <= float(edges[token]) + 1e-14


def test_two_tokens_of_a_model_follow_its_joint_distribution() -> None:
    """Chi-square over all pairs, on draws that are the same in every run."""
    model, size, num = tiny(num_rows=5, sharp=10.0), 5, 4000
    engine = HFEngine(model, letters(5), seed=3, stop_ids=(99,), vocab_size=size)
    made = engine.generate([request("a", [2, 3], i) for i in range(num)], Sampling(1.3, max_new_tokens=2), step=0)
    pairs = torch.stack([sample.response_ids for sample in made])
    found = (pairs[:, 0] * size + pairs[:, 1]).bincount(minlength=size * size).double()
    with torch.no_grad():
        first = (model(torch.tensor([[2, 3]])).logits[0, -1] / 1.3).softmax(-1)
        second = torch.stack([(model(torch.tensor([[2, 3, t]])).logits[0, -1] / 1.3).softmax(-1) for t in range(size)])
    expected = (first[:, None] * second).flatten() * num
    assert float(expected.min()) > 5
    chi_square = float(((found - expected).square() / expected).sum())
    # 24 degrees of freedom: above 51.2 with probability 1e-3
    assert chi_square < 51.2
