"""The chunked evaluation is the definition, for every method, head and cut of the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.definition import evaluate as evaluate_definition
from tests.worlds import CASES, Outcome, World
from understudy.errors import ScoreError
from understudy.linear import LMHead, evaluate, score
from understudy.linear import head as head_module
from understudy.linear.columns import Columns
from understudy.methods import GKD, OPD, SFT, TopK
from understudy.methods.base import Method
from understudy.types import TokenBatch

every_method = pytest.mark.parametrize("method", CASES.values(), ids=CASES.keys())
HEADS = {
    "plain": {},
    "bias": {"with_bias": True},
    "soft-cap": {"softcap": 2.0},
    "scale": {"scale": 0.3},
    "temperature": {"temperature": 0.7},
    "padded": {"vocab_size": 5},
    "everything": {"with_bias": True, "softcap": 3.0, "scale": 1.7, "temperature": 1.3, "vocab_size": 6},
}


WAYS = {(method.reads, method.needs, method.scope): name for name, method in CASES.items()}.values()
"""One method for each way in which rows are read: a head and its chunks know no more of a method."""
HEADS_OF = [(name, "everything") for name in CASES] + [
    (name, head) for name in WAYS for head in HEADS if head != "everything"
]


@pytest.mark.parametrize(("name", "head"), HEADS_OF)
def test_chunks_equal_the_definition(name: str, head: str) -> None:
    """Law 6; also peers 1: soft-cap, scale, bias and temperature reach the loss and its gradient."""
    world, method = World.make(**HEADS[head]), CASES[name]  # type: ignore[arg-type]
    definition = world.evaluate(method, run=evaluate_definition)
    for chunk_tokens in (1, 3, 100):
        world.evaluate(method, chunk_tokens=chunk_tokens).same_as(definition)


@pytest.mark.parametrize(
    "name", [name for name in CASES if name != "tropd scalar" and "baseline" not in name and "topk tail" not in name]
)
def test_gradcheck(name: str) -> None:
    """Law 7. A policy gradient is the gradient of its surrogate with S_old held fixed, so S_old is given. (vOPD's baseline,
    a folded divergence and the log-ratios of a student's top K are functions of the student that are held fixed too, which
    finite differences would move.)"""
    method = CASES[name]
    world = World.make(num_tokens=5, vocabulary=5, width=3, with_bias=True, softcap=3.0)
    batch = replace(world.judged(method), mask=torch.ones(5, dtype=torch.bool))
    batch = replace(batch, student_logprob=world.student_logp.gather(-1, batch.target[:, None]).squeeze(-1))

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        head = replace(world.head, weight=weight, bias=bias)
        return evaluate(method, batch, hidden, head, chunk_tokens=2, **world.full(method)).loss  # type: ignore[arg-type]

    assert world.head.bias is not None
    inputs = [value.clone().requires_grad_() for value in (world.hidden, world.head.weight, world.head.bias)]
    # along one random direction, which meets every entry, so precisely that a thousandth of one entry shows; entry by entry
    # it takes two evaluations for each of 35 numbers
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True, rtol=1e-6, atol=1e-9)


@every_method
def test_any_split_into_micro_batches_and_any_order_is_one_loss(method: Method) -> None:
    """Law 6, peers 2: denominators are counted over the whole step, by whole samples and in any order."""
    world = World.make(num_tokens=16)
    shuffled = torch.tensor([2, 0, 3, 1])
    parts = [
        torch.cat([torch.arange(4) + 4 * name for name in group.tolist()]) for group in (shuffled[:1], shuffled[1:])
    ]
    world.evaluate_in_parts(method, parts).same_as(world.evaluate(method))


@pytest.mark.parametrize(
    ("name", "poison"), [(name, torch.nan) for name in CASES] + [(name, -torch.inf) for name in WAYS]
)
def test_masked_tokens_have_no_influence(name: str, poison: float) -> None:
    """Law 8, peers 11: not even as NaN or -inf, in hidden states and in every score."""
    world, method = World.make(), CASES[name]
    clean = world.evaluate(method)
    batch, states = world.judged(method), world.teacher[0].clone()
    masked = ~batch.mask
    dirty = {}
    for field in (
        "teacher_logprob",
        "reference_logprob",
        "topk_logprob",
        "teacher_entropy",
        "student_logprob",
        "rollout_logprob",
        "outcome_advantage",
        "uniform",
    ):
        value = getattr(batch, field)
        if value is not None:
            dirty[field] = value.clone()
            dirty[field][masked] = poison
    hidden = world.hidden.clone()
    others = world.reference[0].clone()
    for value in (hidden, states, others):
        value[masked] = poison
    poisoned = replace(world, hidden=hidden, teacher=(states, world.teacher[1]), reference=(others, world.reference[1]))
    found = poisoned.evaluate(method, batch=replace(batch, **dirty))
    found.same_as(clean, rtol=0, atol=0)
    assert (found.d_hidden[masked] == 0).all()


@every_method
def test_nothing_to_train_is_zero_and_not_nan(method: Method) -> None:
    """An empty mask gives a loss of 0 whose gradient is 0."""
    world = World.make()
    batch = replace(world.judged(method), mask=torch.zeros(12, dtype=torch.bool))
    found = world.evaluate(method, batch=batch)
    assert found.loss == 0
    assert (found.d_hidden == 0).all()
    assert (found.d_weight == 0).all()


@pytest.mark.parametrize("method", [OPD(), OPD(discount=0.5), TopK(k=3)], ids=["opd", "opd discounted", "topk"])
def test_a_missing_score_is_an_error_that_names_it(method: Method) -> None:
    """Law 9: NaN on a trained token is never 0.0, and an absent field is refused."""
    world = World.make()
    batch = world.judged(method)
    field = "topk_logprob" if isinstance(method, TopK) else "teacher_logprob"
    value = getattr(batch, field).clone()
    value[5] = float("nan")
    with pytest.raises(ScoreError, match=rf"{field} is NaN on 1 trained tokens, first in sample 1"):
        world.evaluate(method, batch=replace(batch, **{field: value}))
    with pytest.raises(ScoreError, match=field if field == "teacher_logprob" else "topk"):
        world.evaluate(method, batch=world.batch)


def test_a_full_divergence_without_the_teachers_rows_is_refused() -> None:
    with pytest.raises(ScoreError, match="whole next-token distribution"):
        World.make().evaluate(GKD(), teacher=None)


def test_vocabularies_of_different_size_are_refused() -> None:
    """Peers 9: never padded with logit 0."""
    world = World.make()
    smaller = LMHead(world.teacher[1].weight[:-1])
    with pytest.raises(ValueError, match="7 tokens and the teacher's 6"):
        world.evaluate(GKD(), teacher=(world.teacher[0], smaller))


@pytest.mark.parametrize("method", [GKD(), OPD(), SFT(), TopK(k=3)], ids=["gkd", "opd", "sft", "topk"])
def test_a_frozen_head_builds_no_weight_gradient(method: Method) -> None:
    """Peers 17: with LoRA nobody pays for dW; the gradient of the hidden states is the same."""
    world = World.make()
    teacher = world.teacher if "full" in method.needs else None
    hidden = world.hidden.clone().requires_grad_()
    found = evaluate(method, world.judged(method), hidden, world.head, teacher=teacher)
    saved = found.loss.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert [value is None for value in saved] == [False, True, True]
    found.loss.backward()
    torch.testing.assert_close(hidden.grad, world.evaluate(method).d_hidden, rtol=0, atol=0)


def test_masked_tokens_are_not_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head sees trained tokens only, once each: no projection in the backward."""
    from understudy.linear import chunked

    projected: list[int] = []
    plain = chunked.project

    def counting(hidden: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        projected.append(len(hidden))
        return plain(hidden, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(chunked, "project", counting)
    world = World.make()
    world.evaluate(OPD(), chunk_tokens=3)
    assert sum(projected) == int(world.batch.mask.sum())


def test_a_tied_head_gets_both_gradients() -> None:
    """The gradient through the embedding and the one through the head add up in one tensor."""
    world = World.make(vocabulary=7, width=5)
    tied = world.head.weight.clone().requires_grad_()
    evaluate(GKD(), world.batch, tied[world.batch.target], LMHead(tied), teacher=world.teacher).loss.backward()
    dense = world.head.weight.clone().requires_grad_()
    hidden = dense[world.batch.target]
    evaluate_definition(GKD(), world.batch, hidden, LMHead(dense), teacher=world.teacher).loss.backward()
    torch.testing.assert_close(tied.grad, dense.grad, rtol=1e-10, atol=1e-13)


def test_the_loss_scales_the_gradient() -> None:
    """What multiplies the loss multiplies every gradient."""
    world = World.make()
    hidden, weight = world.hidden.clone().requires_grad_(), world.head.weight.clone().requires_grad_()
    (3.0 * evaluate(GKD(), world.batch, hidden, LMHead(weight), teacher=world.teacher).loss).backward()
    plain = world.evaluate(GKD())
    torch.testing.assert_close(hidden.grad, 3.0 * plain.d_hidden, rtol=1e-12, atol=0)
    torch.testing.assert_close(weight.grad, 3.0 * plain.d_weight, rtol=1e-12, atol=0)


def test_backward_may_be_repeated_where_the_graph_is_kept() -> None:
    world = World.make()
    hidden = world.hidden.clone().requires_grad_()
    loss = evaluate(GKD(), world.batch, hidden, world.head, teacher=world.teacher).loss
    first, second, doubled = (torch.autograd.grad(loss * factor, hidden, retain_graph=True)[0] for factor in (1, 1, 2))
    assert torch.equal(first, second)
    torch.testing.assert_close(doubled, 2 * first, rtol=1e-15, atol=0)


def test_logits_with_an_identity_head() -> None:
    """`hidden` = logits and `weight` = identity: the loss of given logits."""
    world = World.make(vocabulary=7, width=7)
    logits, teacher_logits = world.head.logits(world.hidden), world.teacher[1].logits(world.teacher[0])
    eye = LMHead(torch.eye(7, dtype=torch.float64))
    given = evaluate(GKD(), world.batch, logits, eye, teacher=(teacher_logits, eye)).loss
    torch.testing.assert_close(given, world.evaluate(GKD()).loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", [GKD(), GKD(beta=0.0), OPD(), TopK(k=3)], ids=["reverse", "forward", "opd", "topk"])
def test_bf16_inputs_keep_a_float32_gradient(method: Method) -> None:
    """Law 11, peers 10: arithmetic is float32 by name, so only the inputs are rounded, and float64 on the same rounded
    inputs agrees to bf16's rounding of the result (2^-8 of the largest entry)."""
    world = World.make(num_tokens=24, vocabulary=301, width=16, seed=3)

    def cast(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, Outcome | None]:
        hidden, weight, states, head = (
            value.to(torch.bfloat16).to(dtype)
            for value in (world.hidden, world.head.weight, world.teacher[0], world.teacher[1].weight)
        )
        hidden.requires_grad_()
        weight.requires_grad_()
        teacher = (states, LMHead(head)) if "full" in method.needs else None
        evaluate(method, world.judged(method), hidden, LMHead(weight), teacher=teacher).loss.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        return hidden.grad, weight.grad, None

    for ours, exact in zip(cast(torch.bfloat16)[:2], cast(torch.float64)[:2], strict=True):
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error < 2**-8


def test_float32_loss_over_a_large_vocabulary_is_not_off_by_its_softmax() -> None:
    """A vectorised softmax sums 150,000 entries lane by lane and loses 1e-5; the loss may not."""
    draw = torch.Generator().manual_seed(0)
    logits, other = (3 * torch.randn(4, 151_936, generator=draw) for _ in range(2))
    batch = TokenBatch(
        target=torch.zeros(4, dtype=torch.int64),
        mask=torch.ones(4, dtype=torch.bool),
        on_policy=torch.ones(4, dtype=torch.bool),
        sequence=torch.zeros(4, dtype=torch.int64),
    )
    from understudy.linear import rows
    from understudy.linear.columns import Columns

    def divergence(dtype: torch.dtype) -> torch.Tensor:
        z, aux = logits.to(dtype), other.to(dtype)
        visit = rows.Visit(GKD().reads, z.clone(), aux.clone(), batch, Columns(z.shape[1]))
        found = visit.read(keep_logits=False)[0].divergence
        assert found is not None
        return found.detach()

    torch.testing.assert_close(divergence(torch.float32).double(), divergence(torch.float64), rtol=2e-6, atol=0)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 100])
def test_score_is_the_log_softmax(chunk_tokens: int) -> None:
    world = World.make(with_bias=True, softcap=2.0)
    logprob, entropy = score(world.hidden, world.head, world.batch.target, chunk_tokens=chunk_tokens)
    logp = world.student_logp
    torch.testing.assert_close(
        logprob, logp.gather(-1, world.batch.target[:, None]).squeeze(-1), rtol=1e-12, atol=1e-13
    )
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1), rtol=1e-12, atol=1e-13)


def test_products_of_bf16_matrices_keep_a_float32_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU computes of bf16 inputs, with its product in place of that of a CPU: logits as from upcast inputs, and the
    gradient of the logits in two parts, which keep 2^-16 of it."""
    world = World.make(num_tokens=24, vocabulary=301, width=16, seed=3)
    hidden, weight, states, other = (
        value.bfloat16() for value in (world.hidden, world.head.weight, world.teacher[0], world.teacher[1].weight)
    )

    def gradients() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = head_module.Gradients(LMHead(weight), hidden, True, True, False)
        logits = head_module.project(hidden, LMHead(weight))
        rows = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)
        found.add(torch.arange(24), hidden, rows, Columns(len(weight)))
        assert found._weight is not None
        given = (value.clone().requires_grad_() for value in (hidden, weight))
        mine, head = given
        evaluate(GKD(), world.batch, mine, LMHead(head), teacher=(states, LMHead(other))).loss.backward()
        assert mine.grad is not None
        return logits, found._weight, mine.grad.float()

    expected = gradients()
    monkeypatch.setattr(head_module, "has_tensor_cores", lambda *_: True)
    monkeypatch.setattr(head_module, "PRODUCT_ELEMENTS", 16 * 100)
    monkeypatch.setattr(head_module, "multiply_bfloat16", upcast_product)
    for found, exact, limit in zip(gradients(), expected, (1e-6, 2**-16, 2**-8), strict=True):
        assert (found - exact).abs().max() / exact.abs().max() <= limit


def upcast_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    assert a.dtype == b.dtype == torch.bfloat16
    return torch.mm(a.float(), b.float(), out=out)


def test_torch_has_the_product_of_bf16_matrices_in_float32() -> None:
    """On the meta device, which computes nothing: shapes and types alone."""
    a, b = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((4, 8), (8, 16)))
    out = torch.empty(4, 16, device="meta")
    for found in (head_module.multiply_bfloat16(a, b), head_module.multiply_bfloat16(a, b, out=out)):
        assert found.dtype == torch.float32
        assert found.shape == (4, 16)
