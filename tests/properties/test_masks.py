"""Whatever is masked and however tokens are grouped: only trained tokens count, each once."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worlds import CASES, World
from understudy.linear import count_denominators
from understudy.methods import GKD, OPD, SFT, TopK
from understudy.methods.base import Method

NUM_TOKENS = 10
masks = st.lists(st.booleans(), min_size=NUM_TOKENS, max_size=NUM_TOKENS).map(torch.tensor)
methods = st.sampled_from([OPD(), OPD(reduce="sequence"), OPD(discount=0.7), GKD(), GKD(beta=0.4), TopK(k=2), SFT()])


def world_of(mask: torch.Tensor, seed: int) -> World:
    """Ten tokens in samples of three, with the given mask."""
    world = World.make(num_tokens=NUM_TOKENS, seed=seed)
    return replace(world, batch=replace(world.batch, mask=mask, sequence=torch.arange(NUM_TOKENS) // 3))


@settings(max_examples=60, deadline=None)
@given(mask=masks, method=methods, seed=st.integers(0, 100))
def test_leaving_masked_tokens_out_changes_nothing(mask: torch.Tensor, method: Method, seed: int) -> None:
    world = world_of(mask, seed)
    full = world.evaluate(method)
    states, head = world.teacher
    kept = replace(world, hidden=world.hidden[mask], teacher=(states[mask], head), batch=world.batch.rows(mask))
    found = kept.evaluate(method)
    torch.testing.assert_close(found.loss, full.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.d_hidden, full.d_hidden[mask], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.d_weight, full.d_weight, rtol=1e-10, atol=1e-14)


@settings(max_examples=60, deadline=None)
@given(mask=masks, method=methods, seed=st.integers(0, 100), parts=st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_any_grouping_of_samples_adds_up(mask: torch.Tensor, method: Method, seed: int, parts: list[int]) -> None:
    """Each of the four samples goes to one of three micro-batches, some of them empty."""
    world = world_of(mask, seed)
    batch, (states, head) = world.judged(method), world.teacher
    groups = [torch.tensor(parts)[batch.sequence] == part for part in range(3)]
    counts = count_denominators([batch.rows(group) for group in groups])
    total = torch.zeros((), dtype=torch.float64)
    d_hidden = torch.zeros_like(world.hidden)
    for group in groups:
        part = replace(world, hidden=world.hidden[group])
        teacher = (states[group], head) if "full" in method.needs else None
        found = part.evaluate(method, batch=batch.rows(group), teacher=teacher, counts=counts)
        total += found.loss
        d_hidden[group] = found.d_hidden
    whole = world.evaluate(method)
    torch.testing.assert_close(total, whole.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(d_hidden, whole.d_hidden, rtol=1e-10, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(mask=masks, name=st.sampled_from(sorted(CASES)))
def test_metrics_count_the_trained_tokens(mask: torch.Tensor, name: str) -> None:
    method = CASES[name]
    found = world_of(mask, 0).evaluate(method)
    for metric in ("student_entropy", "student_logprob"):
        if metric in found.evaluation.metrics:
            assert found.evaluation.metrics[metric].count == int(mask.sum())
