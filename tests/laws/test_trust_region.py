"""Expectations by enumeration: G-OPD's target, TrOPD's region, and what changes over a run (laws 1, 3 and 10)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from understudy.engines.requests import cut_prefix
from understudy.errors import ScoreError
from understudy.linear import Evaluation, LMHead, evaluate
from understudy.losses import advantages
from understudy.methods import AOPD, GOPD, KDRL, OPD, REOPOLD, TOPD, Phases, TopKTail, TrOPD
from understudy.methods.base import Method
from understudy.types import TokenBatch

V = 5
OUTLIERS = ["forward_kl", "clip", "mask", "scalar"]
ALMOST_1 = 1 - 2.0**-53
"""The largest number below 1."""


def logits(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and reference. [V] each"""
    draw = torch.Generator().manual_seed(seed)
    one, two, three = (torch.randn(V, generator=draw, dtype=torch.float64) for _ in range(3))
    return one, two, three


def visits(student: Tensor, teacher: Tensor, target: Tensor, **values: Any) -> tuple[TokenBatch, Tensor, Tensor]:
    """One row for each of `target`, all at the same place. [N], [N, V], [N, V]"""
    size, ones = len(target), torch.ones(len(target), dtype=torch.bool)
    logq = teacher.log_softmax(-1)
    top = logq.topk(len(logq))
    batch = TokenBatch(
        target,
        ones,
        ones,
        torch.arange(size),
        teacher_logprob=logq[target],
        topk_ids=top.indices.expand(size, -1),
        topk_logprob=top.values.expand(size, -1),
        uniform=torch.full((size,), 0.5, dtype=torch.float64),
    )
    return replace(batch, **values), student.expand(size, -1).clone(), teacher.expand(size, -1)


def judge(method: Method, world: tuple[TokenBatch, Tensor, Tensor], **options: Any) -> tuple[Evaluation, Tensor]:
    """What the evaluation says, and the gradient of the sum over the rows."""
    batch, z, _ = world
    if method.reads.topk is not None:
        k = method.reads.k
        batch = replace(batch, topk_ids=batch.topk_ids[:, :k], topk_logprob=batch.topk_logprob[:, :k])  # type: ignore[index]
    z = z.clone().requires_grad_()
    head = LMHead(torch.eye(z.shape[1], dtype=z.dtype))
    found = evaluate(method, batch, z, head, counts={"tokens": 1.0, "sequences": 1.0}, **options)
    found.loss.backward()
    assert z.grad is not None
    return found, z.grad


def metric(method: Method, world: tuple[TokenBatch, Tensor, Tensor], name: str) -> float:
    return judge(method, world)[0].metrics[name].value


def toward(student: Tensor, target: Tensor) -> Tensor:
    """`grad KL(S || target / Z)` for logits of the target. [V]"""
    z = student.clone().requires_grad_()
    logp = z.log_softmax(-1)
    (logp.exp() * (logp - target.log_softmax(-1))).sum().backward()
    assert z.grad is not None
    return z.grad


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.25, 2.0])
def test_gopd_pulls_to_the_power_mixture(scale: float, seed: int) -> None:
    """Law 1: the expectation of the sampled form and the full form are `grad KL(S || T^l R^(1-l) / Z)`."""
    student, teacher, reference = logits(seed)
    target = teacher.softmax(-1) ** scale * reference.softmax(-1) ** (1 - scale)
    expected = toward(student, target.log())
    world = visits(student, teacher, torch.arange(V), reference_logprob=reference.log_softmax(-1))
    sampled = (student.softmax(-1)[:, None] * judge(GOPD(scale=scale), world)[1]).sum(0)
    torch.testing.assert_close(sampled, expected, rtol=1e-10, atol=1e-14)

    head = LMHead(torch.eye(V, dtype=torch.float64))
    models = {"teacher": (world[2], head), "reference": (reference.expand(V, -1), head)}
    full = judge(GOPD(scale=scale, form="full"), world, **models)
    torch.testing.assert_close(full[1], expected.expand(V, -1), rtol=1e-10, atol=1e-14)
    p, q = student.softmax(-1), target / target.sum()
    assert float(full[0].loss.detach()) == pytest.approx(V * float((p * (p / q).log()).sum()), rel=1e-11)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mix", [0.05, 0.2, 0.7, 1.0])
def test_topd_pulls_to_the_mixture_with_the_student(mix: float, seed: int) -> None:
    """`E_{y~S}[A_t grad log S] = -grad KL(S || mix T + (1 - mix) sg[S])`, and no reward is below log(1 - mix)."""
    student, teacher, _ = logits(seed)
    target = mix * teacher.softmax(-1) + (1 - mix) * student.softmax(-1)
    world = visits(student, teacher, torch.arange(V))
    sampled = (student.softmax(-1)[:, None] * judge(TOPD(mix=mix), world)[1]).sum(0)
    torch.testing.assert_close(sampled, toward(student, target.log()), rtol=1e-10, atol=1e-14)
    if mix < 1:
        excluded = visits(student, torch.tensor([0.0, -1e6, 0, 0, 0], dtype=torch.float64), torch.tensor([1]))
        assert float(judge(TOPD(mix=mix), excluded)[0].loss.detach()) == pytest.approx(-math.log(1 - mix), rel=1e-6)


@pytest.mark.parametrize("excludes", [False, True], ids=["", "excluding"])
@pytest.mark.parametrize("k", [*range(1, V + 1), 64])
def test_exact_at_k_tokens_and_sampled_outside_is_the_reverse_kl(k: int, excludes: bool) -> None:
    """`E_{y~S}` of its gradient is that of `KL(S || T)` for every K; with K = V every sampled token gives it, and the value."""
    for seed in (0, 1, 2):
        student, teacher, _ = logits(seed)
        logp, least = student.log_softmax(-1), -20.0
        if excludes:
            teacher = teacher.index_fill(0, torch.tensor([seed, 4]), -torch.inf)
        logq = teacher.log_softmax(-1)
        logq = torch.where(logq.isneginf(), logp + least, logq)
        mask = torch.where(teacher.isneginf(), -torch.inf, 0.0)
        head = LMHead(torch.eye(V, dtype=torch.float64), bias=mask if excludes else None)
        batch, z, states = visits(student, teacher.nan_to_num(neginf=0.0), torch.arange(V))
        batch = replace(batch, teacher_logprob=None, topk_ids=None, topk_logprob=None)
        gradients, values = [], []
        for row in range(V):
            hidden = z[[row]].clone().requires_grad_()
            counts = {"tokens": 1.0, "sequences": 1.0}
            one = batch.rows(torch.tensor([row]))
            eye = LMHead(torch.eye(V, dtype=torch.float64))
            loss = evaluate(TopKTail(k=k), one, hidden, eye, counts=counts, teacher=(states[[row]], head)).loss
            loss.backward()
            assert hidden.grad is not None
            gradients.append(hidden.grad[0])
            values.append(loss.detach())
        kl = (logp.exp() * (logp - logq)).sum()
        exact = logp.exp() * (logp - logq - kl)
        found = torch.stack(gradients)
        torch.testing.assert_close((logp.exp()[:, None] * found).sum(0), exact, rtol=1e-10, atol=1e-13)
        if k >= V:
            torch.testing.assert_close(found, exact.expand(V, -1), rtol=1e-10, atol=1e-13)
            torch.testing.assert_close(torch.stack(values), kl.expand(V), rtol=1e-12, atol=1e-14)


def test_a_small_share_of_the_teacher_is_the_forward_kl() -> None:
    """`A / mix -> T/S - 1`, whose expected gradient is `-grad KL(T || S)`; the rest is of the order of `mix`."""
    student, teacher, _ = logits(3)
    world = visits(student, teacher, torch.arange(V))
    sampled = (student.softmax(-1)[:, None] * judge(TOPD(mix=1e-6), world)[1]).sum(0) / 1e-6
    torch.testing.assert_close(sampled, student.softmax(-1) - teacher.softmax(-1), rtol=0, atol=1e-4)


def test_at_the_power_mixture_gopd_rests() -> None:
    """There `A` is one constant, `log Z`, whose expected gradient is 0, though no single row's is."""
    _, teacher, reference = logits(2)
    student = 1.25 * teacher - 0.25 * reference
    world = visits(student, teacher, torch.arange(V), reference_logprob=reference.log_softmax(-1))
    gradient = judge(GOPD(), world)[1]
    assert gradient.abs().max() > 0.01
    assert (student.softmax(-1)[:, None] * gradient).sum(0).abs().max() < 1e-15


@pytest.mark.parametrize("seed", range(4))
def test_the_expected_rejection_is_the_total_variation(seed: int) -> None:
    """Law 3, over the tokens and over a grid of draws; a grid of N draws is off by at most 1/2N a token."""
    student, teacher, _ = logits(seed)
    p, q, size = student.softmax(-1), teacher.softmax(-1), 2000
    draws = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    rejected = 0.0
    for y in range(V):
        world = visits(student, teacher, torch.full((size,), y), uniform=draws)
        trusted = metric(TrOPD(outlier="mask"), world, "trusted")
        assert metric(TrOPD(outlier="mask"), world, "total_variation") == pytest.approx(
            max(0.0, 1 - float(q[y] / p[y])), abs=1e-12
        )
        assert trusted == pytest.approx(min(float(q[y] / p[y]), 1.0), abs=0.5 / size + 1e-9)
        rejected += float(p[y]) * (1 - trusted)
    assert rejected == pytest.approx(float((p - q).abs().sum()) / 2, abs=0.5 / size)


def test_the_metrics_over_a_batch_that_is_the_distribution() -> None:
    """S = 8:4:2:2, T = 2:4:8:2, every token as often as S has it: both metrics are TV = 6/16, to the last draw."""
    p, q = (torch.tensor(x, dtype=torch.float64) for x in ([8, 4, 2, 2], [2, 4, 8, 2]))
    target = torch.repeat_interleave(torch.arange(4), p.long())
    draws = torch.cat([(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in p.tolist()])
    world = visits(p.log(), q.log(), target, uniform=draws)
    assert 1 - metric(TrOPD(outlier="mask"), world, "trusted") == pytest.approx(6 / 16, abs=1e-12)
    assert metric(TrOPD(outlier="mask"), world, "total_variation") == pytest.approx(6 / 16, abs=1e-12)


def test_the_metrics_leave_out_what_the_student_did_not_write() -> None:
    student, teacher, _ = logits(0)
    batch, z, zt = visits(student, teacher, torch.arange(V))
    own = torch.tensor([True, True, False, False, True])
    for name in ("trusted", "total_variation"):
        mixed = judge(TrOPD(outlier="mask", denominator="joint"), (replace(batch, on_policy=own), z, zt))[0].metrics[
            name
        ]
        alone = judge(TrOPD(outlier="mask"), (batch.rows(own), z[own], zt[own]))[0].metrics[name]
        assert (mixed.count, mixed.total) == (3, pytest.approx(alone.total))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("draw", [0.0, 0.5, 0.999, ALMOST_1])
def test_what_the_teacher_likes_as_much_is_always_trusted(draw: float, dtype: torch.dtype) -> None:
    """Law 3 for T >= S, law 2 for T = S: no draw below 1 rejects, whatever it is rounded to."""
    student, teacher, _ = (value.to(dtype) for value in logits(3))
    liked = (teacher.log_softmax(-1) >= student.log_softmax(-1)).nonzero().squeeze(-1)
    assert 0 < len(liked) < V
    for zt, target in ((teacher, liked), (student, torch.arange(V))):
        uniform = torch.full((len(target),), draw, dtype=torch.float64)
        world = visits(student, zt, target, uniform=uniform)
        assert metric(TrOPD(outlier="mask"), world, "trusted") == 1.0
        assert metric(TrOPD(outlier="mask", region="ratio"), world, "trusted") == 1.0


def moved(value: Tensor, ulps: int) -> Tensor:
    """The number that lies so many representable numbers above (below: negative)."""
    for _ in range(abs(ulps)):
        value = value.nextafter(torch.full_like(value, math.copysign(math.inf, ulps)))
    return value


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("ulps", [-3, -2, -1, 0, 1, 2, 3])
@pytest.mark.parametrize("region", ["bernoulli", "ratio"])
def test_trust_does_not_hang_on_the_last_bits(region: str, ulps: int, dtype: torch.dtype) -> None:
    """Law 2 for T = S by two routes: log S is a difference of numbers of size 1 and more, so where it is near 0 as well as
    where it is large, the routes differ by ulps of the larger of |log S| and 1."""
    student = torch.tensor([12.0, 4.0, 0.0, -20.0, -60.0], dtype=dtype)
    same = student.log_softmax(-1)
    assert float(same[0]) > -1e-3
    assert float(same[-1]) < -70
    # adding 1 and taking it away rounds as the logits do that log S is the difference of
    off = torch.where(same > -1, moved(same - 1, ulps) + 1, moved(same, ulps))
    uniform = torch.full((V,), ALMOST_1, dtype=torch.float64)
    world = visits(student, student, torch.arange(V), teacher_logprob=off, uniform=uniform)
    method = TrOPD(outlier="mask", region=region)  # type: ignore[arg-type]
    assert metric(method, world, "trusted") == 1.0
    assert metric(method, world, "total_variation") == 0.0


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float64, 1e-12), (torch.float32, 1e-3)])
@pytest.mark.parametrize("region", ["bernoulli", "ratio"])
def test_what_is_clearly_below_is_not_trusted(region: str, gap: float, dtype: torch.dtype) -> None:
    """A draw just above T / S rejects, and so does the threshold."""
    student = logits(1)[0].to(dtype)
    uniform = torch.full((V,), math.exp(-0.9 * gap), dtype=torch.float64)
    world = visits(student, student, torch.arange(V), teacher_logprob=student.log_softmax(-1) - gap, uniform=uniform)
    method = TrOPD(outlier="mask", region=region)  # type: ignore[arg-type]
    assert metric(method, world, "trusted") == 0.0
    assert metric(method, world, "total_variation") == pytest.approx(-math.expm1(-gap), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("ulps", [-3, 0, 3])
def test_a_token_that_both_like_alike_is_no_gain(ulps: int, dtype: torch.dtype) -> None:
    """AOPD gates `T <= S`, TrOPD + AOPD takes the forward KL there; equal but for rounding is equal."""
    student = logits(3)[0].to(dtype)
    world = visits(student, student, torch.arange(V), teacher_logprob=moved(student.log_softmax(-1), ulps))
    assert metric(AOPD(k=V), world, "gated") == 1.0
    both = TrOPD(k=V, also_positive=True)
    torch.testing.assert_close(judge(both, world)[0].loss, judge(AOPD(k=V), world)[0].loss)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0, 1.7])
def test_the_fixed_region_is_a_threshold(threshold: float) -> None:
    student, teacher, _ = logits(1)
    ratio = teacher.softmax(-1) / student.softmax(-1)
    for y in range(V):
        world = visits(student, teacher, torch.tensor([y]), uniform=None)
        method = TrOPD(outlier="mask", region="ratio", threshold=threshold)
        assert metric(method, world, "trusted") == float(ratio[y] >= threshold)


@pytest.mark.parametrize("outlier", OUTLIERS)
def test_the_draw_decides_and_nothing_else(outlier: str) -> None:
    """The same numbers twice, in chunks and in another order; other draws give another loss; without draws an error."""
    student, teacher, _ = logits(0)
    target = torch.arange(40) % V
    uniform = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    method = TrOPD(k=V, outlier=outlier, floor=-0.3)  # type: ignore[arg-type]
    batch, z, zt = visits(student, teacher, target, uniform=uniform)
    found, gradient = judge(method, (batch, z, zt))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    for again, back in (
        (judge(method, (batch, z, zt), chunk_tokens=7), slice(None)),
        (judge(method, (batch.rows(order), z[order], zt[order])), order.argsort()),
    ):
        torch.testing.assert_close(again[0].loss, found.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(again[1][back], gradient, rtol=1e-12, atol=0)
    other = judge(method, (replace(batch, uniform=uniform.flip(0)), z, zt))[0].loss
    assert abs(float((other - found.loss).detach())) > 1e-3
    with pytest.raises(ScoreError, match="uniform"):
        judge(method, (replace(batch, uniform=None), z, zt))


def no_hope(probability: float) -> tuple[TokenBatch, Tensor, Tensor]:
    """The teacher gives this to the token that the student drew each time."""
    student, teacher, _ = logits(0)
    teacher = teacher.clone()
    teacher[2] = math.log(probability) if probability else -math.inf
    return visits(student, teacher, torch.full((4,), 2))


@pytest.mark.parametrize("probability", [1e-300, 0.0])
@pytest.mark.parametrize("k", [3, V])
@pytest.mark.parametrize("outlier", OUTLIERS)
def test_a_batch_of_outliers(outlier: str, k: int, probability: float) -> None:
    """Every token rejected: finite, and each treatment is its own formula."""
    world = no_hope(probability)
    found, gradient = judge(TrOPD(k=k, outlier=outlier, floor=-2.0), world)  # type: ignore[arg-type]
    assert found.metrics["trusted"].value == 0.0
    logp, q = world[1][0].log_softmax(-1), world[2][0].softmax(-1)
    score = torch.nn.functional.one_hot(torch.tensor(2), V) - logp.exp()
    top = q.topk(k).indices
    divergence = float(torch.special.xlogy(q[top], q[top]).sum() - (q * logp)[top].sum())
    onehots = torch.nn.functional.one_hot(top, V)
    pulled = -(q[top, None] * (onehots - logp.exp())).sum(0)
    loss, row = {
        "forward_kl": (divergence, pulled),
        "clip": (2.0, 2.0 * score),
        "mask": (0.0, 0.0 * score),
        "scalar": (divergence, divergence * score),
    }[outlier]
    assert float(found.loss.detach()) == pytest.approx(4 * loss, rel=1e-11)
    torch.testing.assert_close(gradient, row.expand(4, -1), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(AOPD(k=3), id="aopd"),
        pytest.param(TrOPD(outlier="mask", region="ratio"), id="tropd"),
        pytest.param(REOPOLD(switch_step=1), id="reopold"),
        pytest.param(REOPOLD(phases=False), id="reopold clip"),
    ],
)
def test_a_token_that_the_teacher_excludes_is_no_hole(method: Method) -> None:
    """`d = -inf` where the method gates, floors or drops it, beside a token that it trains on."""
    batch, z, zt = no_hope(0.0)
    target = torch.tensor([2, 0, 1, 3])
    batch = replace(batch, target=target, teacher_logprob=zt[0].log_softmax(-1)[target])
    found, gradient = judge(method, (batch, z, zt))
    assert found.loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("outlier", OUTLIERS)
def test_prefixes_do_not_dilute_the_students_part(outlier: str) -> None:
    """Own gradient beside 0, 3 and 12 prefix tokens: one and the same, where a joint mean has n / (n + m) of it."""
    student, teacher, _ = logits(2)

    def gradient(num_prefix: int, denominator: str) -> Tensor:
        target = torch.arange(V).repeat(1 + num_prefix)[: V + num_prefix]
        batch, z, zt = visits(student, teacher, target)
        batch = replace(batch, on_policy=torch.arange(len(target)) < V)
        method = TrOPD(k=3, outlier=outlier, denominator=denominator)  # type: ignore[arg-type]
        top = zt.log_softmax(-1).topk(3)
        batch = replace(batch, topk_ids=top.indices, topk_logprob=top.values)
        z = z.clone().requires_grad_()
        eye = LMHead(torch.eye(V, dtype=z.dtype))
        evaluate(method, batch, z, eye).loss.backward()
        assert z.grad is not None
        return z.grad[:V]

    alone = gradient(0, "separate")
    assert alone.abs().max() > 1e-3
    for num_prefix in (3, 12):
        torch.testing.assert_close(gradient(num_prefix, "separate"), alone, rtol=1e-12, atol=1e-15)
        diluted = alone * V / (V + num_prefix)
        torch.testing.assert_close(gradient(num_prefix, "joint"), diluted, rtol=1e-12, atol=1e-15)


def test_both_thresholds_of_the_hybrid_count() -> None:
    """At tau = 0 the outliers lie inside of AOPD's gate, so the union is the gate; between -1 and 0 neither holds the other."""
    for seed in range(20):
        student, teacher, _ = logits(seed)
        z, zt = (row.log_softmax(-1) for row in (student, teacher))
        outlier = zt < z - 1.0
        assert not (outlier & ~advantages.gate(zt, z, 0.0)).any()
    below = torch.tensor([0.5, 0.001]).double().log(), torch.tensor([0.3, 0.0001]).double().log()
    gated = advantages.gate(below[1], below[0], -0.1)
    assert gated.tolist() == [True, False]
    assert (advantages.acceptance(below[1], below[0]) > 0.5).tolist() == [True, False]


def test_a_maximum_length_is_the_same_for_every_response() -> None:
    """`prefix: length`: 1,000 tokens under a budget of 8,192, step 150 of 200: c = 0.146, so 146 tokens or 999."""
    share = TrOPD(anneal_steps=200).plan(150).prefix_share
    response = torch.arange(1000)
    cuts = [cut_prefix(response, share, max_new_tokens=8192, of=of) for of in ("share", "length")]  # type: ignore[arg-type]
    assert [0 if cut is None else len(cut) for cut in cuts] == [146, 999]
    plan = TrOPD(prefix="length").plan(0)
    assert (plan.prefix, plan.prefix_share) == ("length", 1.0)
    late = TrOPD(anneal_steps=200).plan(190).prefix_share
    lengths = [cut_prefix(torch.arange(n), late, max_new_tokens=8192, of="length") for n in (2, 30, 1000, 9000)]
    assert [0 if cut is None else len(cut) for cut in lengths] == [1, 29, 50, 50]
    assert cut_prefix(response, 0.0, max_new_tokens=8192, of="length") is None


def test_prefixes_fade_out() -> None:
    """Law 10: `c = (1 + cos(pi min(step / anneal, 1))) / 2`, and `floor(c L)` tokens, one always left to the student."""
    method = TrOPD(anneal_steps=200, guided="replace")
    shares = [method.plan(step).prefix_share for step in (0, 50, 100, 150, 200, 201, 10_000)]
    quarter = (1 + math.sqrt(0.5)) / 2
    assert shares == pytest.approx([1.0, quarter, 0.5, 1 - quarter, 0.0, 0.0, 0.0], abs=1e-15)
    assert shares[-3:] == [0.0, 0.0, 0.0]
    assert method.plan(3).guided == "replace"
    assert TrOPD(anneal_steps=0).plan(0).prefix_share == 0.0
    cuts = [cut_prefix(torch.arange(12), share, max_new_tokens=8) for share in shares]
    assert [0 if cut is None else len(cut) for cut in cuts] == [7, 6, 4, 1, 0, 0, 0]


@pytest.mark.parametrize(("num_steps", "switch"), [(1, 0), (10, 5), (11, 5), (200, 100)])
def test_reopold_switches_at_half_of_the_run(num_steps: int, switch: int) -> None:
    method = REOPOLD().for_run(num_steps, 64)
    assert method == REOPOLD(switch_step=switch)
    assert [method.explores(step) for step in range(num_steps + 2)] == [step < switch for step in range(num_steps + 2)]  # type: ignore[attr-defined]
    assert REOPOLD(switch_step=3).for_run(num_steps, 64) == REOPOLD(switch_step=3)


def test_the_floors_are_the_formulas() -> None:
    """The paper's default is -1.72."""
    assert REOPOLD().least_reward == pytest.approx(math.log(0.3) / 0.7)
    assert REOPOLD(floor="odds").least_reward == pytest.approx(math.log(0.3 / 0.7))
    assert REOPOLD(floor=-4).least_reward == -4


def test_the_teacher_of_kdrl_fades_linearly() -> None:
    """Law 10, in the weight and in the gradient."""
    method = KDRL(beta=0.4, anneal_to=0.1, skip_correct=False).for_run(11, 64)
    student, teacher, _ = logits(0)
    world = visits(student, teacher, torch.arange(V), outcome_advantage=torch.zeros(V, dtype=torch.float64))
    pull = judge(OPD(), world)[1]
    for step, weight in ((0, 0.4), (5, 0.25), (10, 0.1), (11, 0.1), (500, 0.1)):
        assert method.pull(step) == pytest.approx(weight)  # type: ignore[attr-defined]
        torch.testing.assert_close(judge(method, world, step=step)[1], weight * pull, rtol=1e-10, atol=1e-14)
    assert KDRL(beta=0.4).pull(7) == 0.4


@pytest.mark.parametrize(
    "method", [REOPOLD(), KDRL(anneal_to=0.0), Phases(parts=[{"until": 0.5, "type": "opd"}, {"type": "sft"}])]
)
def test_a_schedule_without_a_run_is_an_error(method: Method) -> None:
    student, teacher, _ = logits(0)
    world = visits(student, teacher, torch.arange(V), outcome_advantage=torch.zeros(V, dtype=torch.float64))
    with pytest.raises(ValueError, match="no run is known"):
        judge(method, world, step=1)


def test_the_boundaries_of_phases() -> None:
    parts = [{"until": 0.25, "type": "tropd", "anneal_steps": 4}, {"until": 0.5, "type": "reopold"}, {"type": "opd"}]
    method = Phases(parts=parts).for_run(40, 64)
    names = [type(method.at(step)[0]).__name__ for step in range(60)]
    assert names == ["TrOPD"] * 10 + ["REOPOLD"] * 10 + ["OPD"] * 40
    assert [method.at(step)[1] for step in (0, 9, 10, 19, 20, 39)] == [0, 9, 0, 9, 0, 19]
    assert method.plan(2).prefix_share == pytest.approx(0.5)
    assert method.plan(10).prefix_share == 0.0
    assert method.members[1] == REOPOLD(switch_step=5)
    assert method.needs == TrOPD().needs | REOPOLD().needs | OPD().needs


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([], "empty"),
        ([{"until": 0.5, "type": "opd"}, {"until": 0.5, "type": "sft"}, {"type": "opd"}], "must grow"),
        ([{"until": 0.7, "type": "opd"}, {"until": 0.2, "type": "sft"}, {"type": "opd"}], "must grow"),
        ([{"until": 0.0, "type": "opd"}, {"type": "sft"}], "must grow"),
        ([{"until": 1.0, "type": "opd"}, {"type": "sft"}], "must grow"),
        ([{"until": 0.5, "type": "opd"}, {"until": 0.9, "type": "sft"}], "must grow"),
        pytest.param([{"until": math.nan, "type": "opd"}, {"type": "sft"}], "until"),
        ([{"type": "opd"}, {"type": "sft"}], "needs `until`"),
        ([{"until": "half", "type": "opd"}, {"type": "sft"}], "needs `until`"),
        ([{"type": "tropo"}], r"parts\[0\].*tropo.*tropd"),
        ([{"until": 0.5, "type": "opd"}, {"k": 3}], r"parts\[1\]"),
        ([{"until": 0.5, "type": "opd"}, {"type": "k1_loss"}], r"parts\[1\].*refused.*zero"),
        ([{"type": "phases", "parts": [{"type": "opd"}]}], "one list"),
        ([{"type": "tropd", "kk": 3}], r"parts\[0\].*kk"),
        ([{"type": "gkd", "beta": 3.0}], r"parts\[0\].*beta"),
    ],
)
def test_phases_that_cannot_be_are_refused(parts: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Phases(parts=parts, num_steps=100)


@pytest.mark.parametrize(("num_steps", "until"), [(1, 0.5), (10, 0.01), (10, 0.99)])
def test_a_part_without_a_step_is_refused(num_steps: int, until: float) -> None:
    method = Phases(parts=[{"until": until, "type": "opd"}, {"type": "sft"}])
    with pytest.raises(ValueError, match="at least one"):
        method.for_run(num_steps, 64)
