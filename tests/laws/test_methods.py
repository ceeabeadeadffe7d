"""What follows from the mathematics for every method, and the limits between methods."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.worlds import CASES, DISTILLATION, TRUNCATED, World
from understudy.errors import ScoreError
from understudy.linear import LMHead, evaluate
from understudy.methods import AOPD, GKD, METHODS, OPD, REFUSED, SFT, Method, Phases, RolloutPlan, TopK
from understudy.types import TokenBatch

V = 6
EYE = LMHead(torch.eye(V, dtype=torch.float64))


def logits_of_two(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student and teacher logits of one row. [V], [V]"""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(V, generator=draw, dtype=torch.float64), torch.randn(V, generator=draw, dtype=torch.float64)


def every_token(student: Tensor, teacher: Tensor) -> tuple[TokenBatch, Tensor, Tensor]:
    """A batch in which each token of the vocabulary is sampled once, and the two sides' logits. [V, V]"""
    ones = torch.ones(V, dtype=torch.bool)
    batch = TokenBatch(
        target=torch.arange(V),
        mask=ones,
        on_policy=ones,
        sequence=torch.arange(V),
        teacher_logprob=teacher.log_softmax(-1),
    )
    return batch, student.expand(V, V).clone(), teacher.expand(V, V).clone()


def gradient_of_each_token(method: Method, student: Tensor, teacher: Tensor) -> Tensor:
    """d loss / d logits where row y is the outcome "y was sampled", each as if it were alone. [V, V]"""
    batch, z, z_teacher = every_token(student, teacher)
    z.requires_grad_()
    counts = {"tokens": 1.0, "sequences": 1.0}
    evaluate(method, batch, z, EYE, teacher=(z_teacher, EYE), counts=counts).loss.backward()
    assert z.grad is not None
    return z.grad


def reverse_kl_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    """`grad KL(S || T)` by autograd from its formula. [V]"""
    z = student.clone().requires_grad_()
    logp = z.log_softmax(-1)
    (logp.exp() * (logp - teacher.log_softmax(-1))).sum().backward()
    assert z.grad is not None
    return z.grad


@pytest.mark.parametrize(
    "method",
    [OPD(), OPD(baseline=True), OPD(baseline=True, baseline_k=3), OPD(reduce="sequence")],
    ids=["plain", "baseline", "baseline over k", "sequence"],
)
def test_the_expected_gradient_of_opd_is_that_of_the_reverse_kl(method: Method) -> None:
    """Law 1. It holds for the sign, the teacher and the baseline at once: none can be wrong and pass."""
    student, teacher = logits_of_two()
    expected = (student.softmax(-1)[:, None] * gradient_of_each_token(method, student, teacher)).sum(0)
    torch.testing.assert_close(expected, reverse_kl_gradient(student, teacher), rtol=1e-10, atol=1e-13)


def test_the_baseline_takes_the_mean_out_of_the_advantage() -> None:
    """vOPD: `E_{y~S}[A] = 0`; without it the expected advantage is `-KL(S || T)`, so the expected loss is the KL."""
    student, teacher = logits_of_two()
    batch, z, z_teacher = every_token(student, teacher)

    def expected_loss(method: Method) -> float:
        rows = [batch.rows(torch.tensor([y])) for y in range(V)]
        losses = [evaluate(method, row, z[:1], EYE, teacher=(z_teacher[:1], EYE)).loss for row in rows]
        return float((student.softmax(-1) * torch.stack(losses)).sum())

    reverse = float(evaluate(GKD(), batch, z, EYE, teacher=(z_teacher, EYE)).loss)
    assert expected_loss(OPD()) == pytest.approx(reverse, rel=1e-12)
    assert expected_loss(OPD(baseline=True)) == pytest.approx(0.0, abs=1e-14)


def test_the_value_of_the_log_ratio_has_no_teacher_in_its_gradient() -> None:
    """Peers 3: why `k1_loss` is refused. Its expected gradient is zero for every teacher, and OPD's is not."""
    student, _ = logits_of_two()
    z = student.expand(V, V).clone().requires_grad_()
    (student.softmax(-1) * z.log_softmax(-1).diagonal()).sum().backward()
    assert z.grad is not None
    assert z.grad.sum(0).abs().max() < 1e-15
    assert "zero" in REFUSED["k1_loss"]
    assert "k1_loss" not in METHODS


@pytest.mark.parametrize("name", sorted(DISTILLATION.keys() - TRUNCATED))
def test_teacher_equal_to_student_has_exactly_zero_gradient(name: str) -> None:
    """Law 2: zero, whatever the sampled tokens are. Sums over K entries or a mixture leave the rounding of float64, and a
    target that is put together from two models does."""
    method = DISTILLATION[name]
    world = World.make().with_teacher_equal_to_student()
    found = world.evaluate(method, batch=world.batch, teacher=world.teacher, reference=world.reference)
    rounds = isinstance(method, TopK | AOPD) or (isinstance(method, GKD) and 0 < method.beta < 1) or name == "gopd full"
    limit = 1e-15 if rounds else 0.0
    assert found.d_hidden.abs().max() <= limit
    assert found.d_weight.abs().max() <= limit


@pytest.mark.parametrize("name", sorted(DISTILLATION.keys() & TRUNCATED))
def test_forms_that_truncate_are_zero_where_k_is_the_vocabulary(name: str) -> None:
    """Law 2 for sums over K tokens: with K = V nothing is left out, and teacher = student has no gradient."""
    world = World.make().with_teacher_equal_to_student()
    method = DISTILLATION[name].at(0)[0]
    found = world.evaluate(replace(method, k=7), batch=world.batch, teacher=world.teacher, reference=None)  # type: ignore[call-arg]
    assert found.d_hidden.abs().max() <= 1e-15


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_truncated_sum_is_no_divergence(direction: str) -> None:
    """Why `tail="none"` is not the default: at teacher = student it still pushes mass between the K tokens and the rest."""
    world = World.make().with_teacher_equal_to_student()
    method = TopK(k=3, direction=direction, tail="none")  # type: ignore[arg-type]
    assert world.evaluate(method, batch=world.batch, teacher=world.teacher).d_hidden.abs().max() > 1e-3


def test_gkd_is_the_written_divergence() -> None:
    """Against sums over the vocabulary, written from the paper's equation and not from `divergences`."""
    student, teacher = logits_of_two(1)
    p, q = student.softmax(-1), teacher.softmax(-1)
    batch, z, z_teacher = every_token(student, teacher)

    def loss(beta: float) -> float:
        return float(evaluate(GKD(beta=beta), batch, z, EYE, teacher=(z_teacher, EYE)).loss)

    def kl(a: Tensor, b: Tensor) -> float:
        return sum(float(x) * math.log(float(x) / float(y)) for x, y in zip(a, b, strict=True))

    assert loss(0.0) == pytest.approx(kl(q, p), rel=1e-12)
    assert loss(1.0) == pytest.approx(kl(p, q), rel=1e-12)
    mixture = 0.7 * p + 0.3 * q
    assert loss(0.3) == pytest.approx(0.3 * kl(q, mixture) + 0.7 * kl(p, mixture), rel=1e-12)
    # the interpolation vanishes at its ends: the ends are cases of their own
    assert loss(1e-9) < 1e-6 < loss(0.0)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("tail", ["bucket", "none", "renormalise"])
def test_with_k_equal_to_v_every_top_k_form_is_the_full_divergence(direction: str, support: str, tail: str) -> None:
    """Law 5, in loss and gradient."""
    world = World.make()
    full = world.evaluate(GKD(beta=0.0 if direction == "forward" else 1.0))
    found = world.evaluate(TopK(k=7, direction=direction, support=support, tail=tail), teacher=world.teacher)  # type: ignore[arg-type]
    torch.testing.assert_close(found.loss, full.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.d_hidden, full.d_hidden, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_bucket_is_a_lower_bound_that_grows_with_k(direction: str) -> None:
    """Law 5, peers 4: never negative, never above the full divergence; a truncated sum is negative at times."""
    world = World.make(num_tokens=60, seed=4)
    full = float(world.evaluate(GKD(beta=0.0 if direction == "forward" else 1.0)).loss)
    bounds = [
        float(world.evaluate(TopK(k=k, direction=direction), teacher=world.teacher).loss)  # type: ignore[arg-type]
        for k in range(1, 8)
    ]
    assert bounds[0] >= 0
    # 1e-9: the teacher's tail is 1 minus a sum, which cancels at K = V - 1
    assert all(low <= high + 1e-9 for low, high in itertools.pairwise(bounds))
    assert bounds[-1] == pytest.approx(full, rel=1e-12)


def test_renormalising_one_token_says_nothing() -> None:
    """Peers 4: K = 1 renormalised is 0 whatever the student does; the bucket is not."""
    world = World.make()
    assert float(world.evaluate(TopK(k=1, tail="renormalise")).loss) == 0.0
    assert float(world.evaluate(TopK(k=1)).loss) > 0.01


def test_the_tail_pulls_back_mass_outside_the_top_k() -> None:
    """Peers 4: a reverse KL without a tail is lowered by moving mass outside the K tokens; with the bucket that is punished."""
    student, teacher = logits_of_two(2)
    outside = int(teacher.argmin())
    batch, z, z_teacher = every_token(student, teacher)

    def push_outside(tail: str) -> float:
        leaf = z.clone().requires_grad_()
        method = TopK(k=V - 1, direction="reverse", tail=tail)  # type: ignore[arg-type]
        evaluate(method, batch, leaf, EYE, teacher=(z_teacher - 20 * (torch.arange(V) == outside), EYE)).loss.backward()
        assert leaf.grad is not None
        return float(leaf.grad[:, outside].sum())

    assert push_outside("bucket") > 0.1
    assert push_outside("none") < push_outside("bucket") - 0.1


def test_folding_the_top_k_into_an_advantage_would_lose_the_teacher() -> None:
    """Peers 5: a number that does not depend on the sampled token has no expected policy gradient. TopK differentiates it."""
    student, teacher = logits_of_two()
    p = student.softmax(-1)
    score = torch.eye(V, dtype=torch.float64) - p  # grad log S(y), one row a token
    folded = (p[:, None] * 0.37 * score).sum(0)
    assert folded.abs().max() < 1e-15
    assert gradient_of_each_token(TopK(k=3), student, teacher).abs().max() > 0.01


def test_sft_is_cross_entropy() -> None:
    world = World.make()
    index = world.batch.mask.nonzero().squeeze(-1)
    expected = torch.nn.functional.cross_entropy(world.head.logits(world.hidden[index]), world.batch.target[index])
    torch.testing.assert_close(world.evaluate(SFT()).loss, expected, rtol=1e-12, atol=0)


def test_sequence_reduction_weighs_samples_and_not_tokens() -> None:
    """Mean over the tokens of each sample, then over samples; a token mean differs when lengths do."""
    world = World.make()
    mask = torch.tensor([True] * 4 + [True, False, False, False] + [True] * 4)
    batch = replace(world.judged(OPD()), mask=mask, on_policy=torch.ones(12, dtype=torch.bool))
    d = (batch.teacher_logprob - world.student_logp.gather(-1, batch.target[:, None]).squeeze(-1)).tolist()  # type: ignore[union-attr, operator]
    means = [sum(d[:4]) / 4, d[4], sum(d[8:]) / 4]
    assert float(world.evaluate(OPD(reduce="sequence"), batch=batch).loss) == pytest.approx(-sum(means) / 3, rel=1e-12)
    assert float(world.evaluate(OPD(), batch=batch).loss) == pytest.approx(-(sum(d[:5]) + sum(d[8:])) / 9, rel=1e-12)


def test_the_discount_sums_what_follows() -> None:
    """`A_t = sum_u gamma^(u-t) d_u` within the sample: 0 is the plain log-ratio, 1 the whole rest."""
    world = World.make(num_tokens=4)
    ones = torch.ones(4, dtype=torch.bool)
    batch = replace(world.judged(OPD()), mask=ones, on_policy=ones, sequence=torch.tensor([0, 0, 0, 1]))
    d = (batch.teacher_logprob - world.student_logp.gather(-1, batch.target[:, None]).squeeze(-1)).tolist()  # type: ignore[union-attr, operator]
    expected = -(d[0] + 0.5 * d[1] + 0.25 * d[2] + d[1] + 0.5 * d[2] + d[2] + d[3]) / 4
    assert float(world.evaluate(OPD(discount=0.5), batch=batch).loss) == pytest.approx(expected, rel=1e-12)


def test_temperature_is_one_on_both_sides() -> None:
    """Peers 7: at temperature tau the reverse KL is that of both rows divided by tau, not of one."""
    world = World.make(temperature=0.5)
    p, q = (head.logits(hidden) for hidden, head in ((world.hidden, world.head), world.teacher))
    warm = World.make()
    torch.testing.assert_close(p, 2 * warm.head.logits(warm.hidden), rtol=1e-12, atol=0)
    index = world.batch.mask
    logp, logq = p.log_softmax(-1)[index], q.log_softmax(-1)[index]
    expected = (logp.exp() * (logp - logq)).sum(-1).mean()
    torch.testing.assert_close(world.evaluate(GKD()).loss, expected, rtol=1e-12, atol=0)


def test_padding_of_the_vocabulary_carries_no_probability() -> None:
    """Peers 9 and 13: rows past the tokenizer are cut off, so two models that differ in padding alone have no divergence."""
    world = World.make(vocabulary=7)
    head = replace(world.head, vocab_size=7)
    padded = LMHead(torch.cat([world.head.weight, torch.zeros(3, 5, dtype=torch.float64)]), vocab_size=7)
    found = evaluate(GKD(), world.batch, world.hidden, head, teacher=(world.hidden, padded))
    assert abs(float(found.loss)) < 1e-15


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GKD(beta=1.5), "beta is 1.5"),
        (lambda: GKD(on_policy_share=-0.1), "on_policy_share is -0.1"),
        (lambda: OPD(discount=2.0), "discount is 2;"),
        (lambda: OPD(discount=0.5, baseline=True), "baseline"),
        (lambda: TopK(k=0), "k is 0"),
    ],
)
def test_settings_out_of_range_are_refused(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]


def test_every_registered_method_is_tested() -> None:
    assert {type(method) for method in CASES.values()} == set(METHODS.values())


def test_the_fixed_names_and_defaults() -> None:
    """Section 3: the names that recipes and outside checks rely on."""
    assert METHODS["opd"]() == OPD(discount=0.0, baseline=False, reduce="token")
    assert METHODS["gkd"]() == GKD(beta=1.0, on_policy_share=1.0)
    assert METHODS["topk"]() == TopK(k=64, direction="forward", support="teacher", tail="bucket")
    assert METHODS["sft"]() == SFT()


@dataclass(frozen=True)
class Warm(OPD):
    """OPD that begins on given responses."""

    def plan(self, step: int) -> RolloutPlan:
        return RolloutPlan(on_policy_share=0.0 if step < 3 else 1.0)


def test_what_a_method_uses_is_asked_of_every_step() -> None:
    """A schedule that begins off-policy still needs an engine; one that never leaves it does not."""
    warm = Warm().uses(10)
    assert (warm.own_samples, warm.given_responses, warm.takes_responses) == (True, True, True)
    assert not Warm().uses(3).own_samples
    parts = Phases(parts=({"until": 0.5, "type": "sft"}, {"type": "tropd", "anneal_steps": 2}))
    both = parts.for_run(8, 16).uses(8)
    assert both.own_samples
    assert both.given_responses
    assert both.prefixes
    assert not both.rewards


@pytest.mark.parametrize("name", list(METHODS))
def test_uses_covers_every_plan(name: str) -> None:
    method = CASES.get(name, METHODS[name]() if name != "phases" else OPD())
    uses = method.uses(300)
    for plan in map(method.plan, (0, 1, 150, 299)):
        assert uses.own_samples or plan.on_policy_share == 0
        assert uses.given_responses or plan.on_policy_share == 1
        assert uses.prefixes or plan.prefix_share == 0
        assert uses.judge or plan.acceptance is None
        assert plan.rewards is None or plan.rewards.source in uses.rewards


SCORES = ("teacher_logprob", "reference_logprob", "topk_logprob", "outcome_advantage", "rollout_logprob")
GIVEN_BY: dict[str, str] = {"sampled": "teacher_logprob", "topk": "topk_logprob", "reference": "reference_logprob"}


@pytest.mark.parametrize("name", CASES)
def test_a_missing_score_is_refused_or_not_read(name: str) -> None:
    """Law 9 for the declaration: what a method reads it `requires`, so NaN there is an error and never a loss."""
    method, world = CASES[name], World.make()
    batch = world.judged(method)
    plain = world.evaluate(method, batch=batch).loss
    for field in SCORES:
        value = getattr(batch, field)
        if value is None:
            continue
        try:
            without = world.evaluate(method, batch=replace(batch, **{field: torch.full_like(value, torch.nan)})).loss
        except ScoreError:
            continue
        assert torch.equal(without, plain), f"{name} reads {field} and does not require it"


@pytest.mark.parametrize("name", CASES)
def test_a_score_that_was_not_asked_for_is_not_read(name: str) -> None:
    """A teacher is asked for `needs` alone: whatever else a batch holds changes nothing."""
    method, world = CASES[name], World.make()
    batch = world.judged(method)
    needs = method.needs
    unasked = {GIVEN_BY[need]: None for need in GIVEN_BY if need not in needs and "full" not in needs}
    if "topk" in needs:
        # a teacher gives the sampled token's score beside its K tokens
        unasked.pop("teacher_logprob", None)
    bare = dict.fromkeys(("teacher", "reference")) if "full" not in needs else {}
    plain = world.evaluate(method, batch=batch, **bare).loss
    assert torch.equal(world.evaluate(method, batch=replace(batch, **unasked), **bare).loss, plain)
