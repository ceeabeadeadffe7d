"""What a teacher begins and the student ends: who wrote what, how much, and with which draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_models import ARCHITECTURES, EOS, letters, plain_logp, request, tiny
from understudy.engines import HFEngine
from understudy.engines.requests import cut_prefix, guided_requests
from understudy.errors import DataError
from understudy.randomness import keyed_uniform
from understudy.types import Author, Sampling

SHARES = st.floats(0, 1)
SIZES = st.integers(1, 60)
PROMPT = [5, 6]


def response(length: int) -> torch.Tensor:
    """Ends with EOS."""
    return torch.tensor([2 + place % 30 for place in range(length - 1)] + [EOS])


def cut_length(length: int, share: float, budget: int) -> int:
    found = cut_prefix(response(length), share, max_new_tokens=budget)
    return 0 if found is None else found.numel()


def make_engine(model: Any, **options: Any) -> HFEngine:
    return HFEngine(model, letters(), **{"seed": 4, "stop_ids": (EOS,), "vocab_size": 40} | options)


@given(SIZES, SHARES, SIZES)
def test_a_prefix_is_the_start_and_never_the_end(length: int, share: float, budget: int) -> None:
    whole = response(length)
    found = cut_prefix(whole, share, max_new_tokens=budget)
    givable = min(length, budget)
    assert cut_length(length, share, budget) == min(math.floor(share * givable), givable - 1)
    if found is not None:
        assert 1 <= found.numel() < givable
        assert torch.equal(found, whole[: found.numel()])
        assert EOS not in found.tolist()


@given(SIZES, SIZES)
def test_the_ends_of_the_schedule(length: int, budget: int) -> None:
    assert cut_length(length, 1.0, budget) == min(length, budget) - 1
    assert cut_length(length, 0.0, budget) == 0


@given(SIZES, SIZES, SHARES, SHARES)
def test_more_share_is_no_less_prefix(length: int, budget: int, one: float, other: float) -> None:
    assert cut_length(length, min(one, other), budget) <= cut_length(length, max(one, other), budget)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        cut_prefix(response(5), share, max_new_tokens=5)


def test_guided_requests_have_names_of_their_own() -> None:
    own = [request("a", PROMPT, 0), request("a", PROMPT, 1), request("b", [7])]
    made = guided_requests(own, [response(9), None, response(1)], 0.5, max_new_tokens=6, offset=2)
    assert [one.key for one in made] == ["a#2", "a#3", "b#2"]
    assert not {one.key for one in made} & {one.key for one in own}
    assert made[0].prefix_ids is not None
    assert made[0].prefix_ids.tolist() == response(9)[:3].tolist()
    assert made[1].prefix_ids is None
    assert made[2].prefix_ids is None
    assert [one.index for one in guided_requests(own, [None] * 3, 1.0, max_new_tokens=6)] == [0, 1, 0]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 14), SHARES), min_size=1, max_size=6), st.integers(1, 10), st.booleans())
def test_a_response_keeps_to_the_budget_and_its_authors(
    wanted: list[tuple[int, float]], budget: int, can_stop: bool
) -> None:
    """Prefix and continuation together are at most `max_new_tokens`, and one token or more is the student's."""
    model = tiny("gpt2", sharp=4.0, max_position_embeddings=len(PROMPT) + 10)
    asked = [
        guided_requests([request(f"p{place}", PROMPT)], [response(length)], share, max_new_tokens=budget)[0]
        for place, (length, share) in enumerate(wanted)
    ]
    made = make_engine(model, stop_ids=(EOS,) if can_stop else (99,)).generate(
        asked, Sampling(max_new_tokens=budget), step=0
    )
    for one, sample in zip(asked, made, strict=True):
        prefix = [] if one.prefix_ids is None else one.prefix_ids.tolist()
        num_own = sample.num_response_tokens - len(prefix)
        assert 1 <= num_own <= budget - len(prefix)
        assert sample.finish == ("stop" if can_stop and int(sample.token_ids[-1]) == EOS else "length")
        assert sample.finish == "stop" or sample.num_response_tokens == budget
        assert sample.response_ids[: len(prefix)].tolist() == prefix
        assert sample.author.tolist() == (
            [Author.PROMPT] * len(PROMPT) + [Author.TEACHER] * len(prefix) + [Author.STUDENT] * num_own
        )
        assert sample.rollout_logprob is not None
        assert sample.policy_version is not None
        assert bool(sample.rollout_logprob[:-num_own].isnan().all())
        assert bool(sample.rollout_logprob[-num_own:].isfinite().all())
        assert sample.policy_version.tolist() == [-1] * (len(PROMPT) + len(prefix)) + [0] * num_own
        written = sample.response_ids[: -1 if sample.finish == "stop" else None]
        assert sample.text == letters().decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_long_and_short_prefixes_share_a_batch(name: str) -> None:
    """Each row is what it is alone, though it ends long before its neighbours, at the last position of the model."""
    dtype = "float32" if name == "gemma2" else "float64"
    model = tiny(name, sharp=4.0, dtype=dtype, max_position_embeddings=len(PROMPT) + 12)
    asked = [
        *guided_requests([request("a", PROMPT)], [response(12)], 1.0, max_new_tokens=12),
        *guided_requests([request("b", PROMPT)], [response(12)], 0.5, max_new_tokens=12),
        # many that go on, so that the row that has ended stays in the batch for a while
        *(request("c", PROMPT, index) for index in range(5)),
        request("d", PROMPT[:1]),
    ]
    sampling = Sampling(0.8, max_new_tokens=12)
    together = make_engine(model, stop_ids=(99,)).generate(asked, sampling, step=1)
    for one, sample in zip(asked, together, strict=True):
        alone = make_engine(model, stop_ids=(99,)).generate([one], sampling, step=1)[0]
        assert torch.equal(sample.token_ids, alone.token_ids)
        assert sample.num_response_tokens == 12
        logp = plain_logp(model, sample.token_ids, 0.8).gather(-1, sample.token_ids[1:, None])[:, 0].float()
        own = sample.author == Author.STUDENT
        assert sample.rollout_logprob is not None
        torch.testing.assert_close(sample.rollout_logprob[own], logp[own[1:]], rtol=0, atol=1e-5)


def test_draws_are_those_of_the_position_in_the_response() -> None:
    model = tiny(sharp=4.0)
    asked = guided_requests([request("a", PROMPT)] * 2, [response(8), None], 0.5, max_new_tokens=8)
    made = make_engine(model, stop_ids=(99,)).generate(asked, Sampling(max_new_tokens=8), step=3)
    uniform = keyed_uniform(4, "sample", 3, ["a#0"], 8)[0]
    for sample in made:
        logp = plain_logp(model, sample.token_ids)[sample.prompt_length - 1 :]
        expected = torch.searchsorted(logp.exp().cumsum(-1), uniform[:, None], right=True)[:, 0]
        own = sample.author[sample.prompt_length :] == Author.STUDENT
        assert torch.equal(sample.response_ids[own], expected[own])


def test_a_prefix_that_fills_the_budget_is_refused() -> None:
    with pytest.raises(DataError, match=r"a#0: a prefix of 4 tokens leaves nothing of max_new_tokens 4"):
        make_engine(tiny()).generate([request("a", PROMPT, prefix=[3] * 4)], Sampling(max_new_tokens=4), step=0)
