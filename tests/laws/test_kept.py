"""Numbers kept of single tokens are those of the models, and keeping them changes no bit of loss or gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.worlds import CASES, World
from understudy.linear import Kept, evaluate
from understudy.methods.base import Method

every_method = pytest.mark.parametrize("method", CASES.values(), ids=CASES.keys())


def run(world: World, method: Method, keep: Kept | None, chunk_tokens: int) -> list[Tensor]:
    """The loss, and its gradients to hidden states and head."""
    hidden, weight = (value.clone().requires_grad_() for value in (world.hidden, world.head.weight))
    head = type(world.head)(weight, world.head.bias)
    batch = world.judged(method)
    options = {"chunk_tokens": chunk_tokens, "keep": keep} | world.full(method)
    found = evaluate(method, batch, hidden, head, **options)  # type: ignore[arg-type]
    found.loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [found.loss.detach(), hidden.grad, weight.grad, *(torch.tensor(one.total) for one in found.metrics.values())]


@every_method
def test_nothing_changes_and_the_numbers_are_the_models_own(method: Method) -> None:
    world = World.make(with_bias=True)
    trained = world.batch.mask
    closely = torch.arange(len(trained)) % 5 != 4
    kept = Kept(closely)
    for one, other in zip(run(world, method, None, 5), run(world, method, kept, 5), strict=True):
        assert torch.equal(one, other)
    columns = kept.columns()
    near = trained & closely
    for whose, logp in (("student", world.student_logp), ("teacher", world.teacher_logp)):
        own = logp.gather(-1, world.batch.target[:, None])
        if f"{whose}_logprob" in columns:
            torch.testing.assert_close(columns[f"{whose}_logprob"][trained], own[trained, 0].float())
        if whose == "teacher" and "full" not in method.needs:
            # a teacher that is not here says no more than it was asked for
            assert "teacher_top" not in columns
            continue
        top = logp.topk(5)
        assert torch.equal(columns[f"{whose}_top"][near], top.indices[near])
        torch.testing.assert_close(columns[f"{whose}_top_logprob"][near], top.values[near], check_dtype=False)
        assert torch.equal(columns[f"{whose}_rank"][near], (logp > own).sum(-1)[near] + 1)
        assert bool((columns[f"{whose}_rank"][~near] == -1).all())
    assert bool(columns["student_logprob"][~trained].isnan().all())
    assert bool(columns["gradient"][~near].isnan().all())


def test_the_gradient_of_a_token_is_that_of_its_logits() -> None:
    """OPD: `A (p - e_y) / T` in every row, so the push at the sampled token is `A (1 - p_y) / T`."""
    world, method = World.make(), CASES["opd"]
    kept = Kept(torch.ones_like(world.batch.mask))
    run(world, method, kept, 3)
    columns = kept.columns()
    rows = world.batch.mask & world.batch.on_policy
    student = world.student_logp.gather(-1, world.batch.target[:, None])[:, 0]
    advantage = world.teacher_logp.gather(-1, world.batch.target[:, None])[:, 0] - student
    expected = advantage * (1 - student.exp()) / int(world.batch.mask.sum())
    torch.testing.assert_close(columns["push"][rows], expected[rows].float())
    one_hot = torch.nn.functional.one_hot(world.batch.target, world.student_logp.shape[-1])
    gradient = (advantage[:, None] * (world.student_logp.exp() - one_hot)).norm(dim=-1) / int(world.batch.mask.sum())
    torch.testing.assert_close(columns["gradient"][rows], gradient[rows].float())
