"""Whatever is masked and however tokens are grouped: only trained tokens count, each once."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worlds import CASES, World
from understudy.methods.base import Method

NUM_TOKENS = 10
masks = st.lists(st.booleans(), min_size=NUM_TOKENS, max_size=NUM_TOKENS).map(torch.tensor)
methods = st.sampled_from(sorted(CASES)).map(CASES.__getitem__)


def world_of(mask: torch.Tensor, seed: int) -> World:
    """Ten tokens in samples of three, with the given mask."""
    world = World.make(num_tokens=NUM_TOKENS, seed=seed)
    return replace(world, batch=replace(world.batch, mask=mask, sequence=torch.arange(NUM_TOKENS) // 3))


@settings(max_examples=60, deadline=None)
@given(mask=masks, method=methods, seed=st.integers(0, 100))
def test_leaving_masked_tokens_out_changes_nothing(mask: torch.Tensor, method: Method, seed: int) -> None:
    world = world_of(mask, seed)
    full = world.evaluate(method)
    found = world.rows(mask).evaluate(method)
    torch.testing.assert_close(found.loss, full.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.d_hidden, full.d_hidden[mask], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.d_weight, full.d_weight, rtol=1e-10, atol=1e-14)


@settings(max_examples=60, deadline=None)
@given(mask=masks, method=methods, seed=st.integers(0, 100), parts=st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_any_grouping_of_samples_adds_up(mask: torch.Tensor, method: Method, seed: int, parts: list[int]) -> None:
    """Each of the four samples goes to one of three micro-batches, some of them empty."""
    world = world_of(mask, seed)
    groups = [(torch.tensor(parts)[world.batch.sequence] == part).nonzero().squeeze(-1) for part in range(3)]
    found, whole = world.evaluate_in_parts(method, groups), world.evaluate(method)
    torch.testing.assert_close(found.loss, whole.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.d_hidden, whole.d_hidden, rtol=1e-10, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(mask=masks, name=st.sampled_from(sorted(CASES)))
def test_metrics_count_the_trained_tokens(mask: torch.Tensor, name: str) -> None:
    method = CASES[name]
    found = world_of(mask, 0).evaluate(method)
    for metric in ("student_entropy", "student_logprob"):
        if metric in found.evaluation.metrics:
            assert found.evaluation.metrics[metric].count == int(mask.sum())
