"""A teacher or a reference that gives a token probability 0: its log-ratio is `min_log_ratio`, and nothing becomes NaN.

The token is excluded by a score of -inf, or by a head whose bias masks it, in a world where the student samples it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.definition import evaluate as evaluate_definition
from tests.laws.test_formulas import Enumerated, on_policy_only
from tests.worlds import CASES, World
from understudy.errors import ScoreError
from understudy.linear import LMHead, evaluate
from understudy.methods import AOPD, EOPD, GKD, GOPD, GRPO, KDRL, OPD, Method, TopK, TrOPD
from understudy.methods.base import ScoreMethod
from understudy.types import EXCLUDED, TokenBatch

V = 7
ROW = 5
"""A trained token that the student wrote; the token that is sampled there is the excluded one."""
SCORED = {name: method for name, method in CASES.items() if isinstance(method, ScoreMethod)}
TEACHER, REFERENCE = "teacher", "reference"


def masking(world: World, *models: str) -> World:
    """The world in which these models exclude one token, wherever it stands."""
    bias = torch.zeros(V, dtype=torch.float64)
    bias[world.batch.target[ROW]] = -torch.inf

    def masked(model: tuple[Tensor, LMHead]) -> tuple[Tensor, LMHead]:
        return model[0], replace(model[1], bias=bias)

    return replace(world, **{name: masked(getattr(world, name)) for name in models})


def judged(world: World, method: Method) -> TokenBatch:
    """The batch with -inf where a score says that the token is excluded."""
    batch = world.judged(method)
    scores = {name: getattr(batch, name) for name in ("teacher_logprob", "reference_logprob", "topk_logprob")}
    return replace(
        batch,
        **{
            name: torch.where(value <= EXCLUDED, -torch.inf, value)
            for name, value in scores.items()
            if value is not None
        },
    )


# a method that asks no reference is the same where the reference excludes the token
MASKED = [(name, (TEACHER, REFERENCE)) for name in CASES] + [
    (name, (alone,)) for name, method in CASES.items() if "reference" in method.needs for alone in (TEACHER, REFERENCE)
]


@pytest.mark.parametrize(
    ("name", "models"), MASKED, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_loss_and_gradient_stay_finite_and_are_the_definitions(name: str, models: tuple[str, ...]) -> None:
    world, method = masking(World.make(), *models), CASES[name]
    batch = judged(world, method)
    found = world.evaluate(method, batch=batch, chunk_tokens=3)
    assert found.loss.isfinite()
    assert found.d_hidden.isfinite().all()
    assert found.d_weight.isfinite().all()
    found.same_as(world.evaluate(method, batch=batch, run=evaluate_definition))


@pytest.mark.parametrize("least", [-20.0, -3.0])
@pytest.mark.parametrize("name", [name for name, method in SCORED.items() if "full" not in method.needs])
def test_an_excluded_token_is_a_teacher_of_exp_min_log_ratio_times_the_student(name: str, least: float) -> None:
    """`T(y) = R(y) = e^min_log_ratio S(y)`, for sampled tokens, and for the K tokens of a reverse divergence."""
    world, method = masking(World.make(), TEACHER, REFERENCE), replace(SCORED[name], min_log_ratio=least)
    batch = judged(world, method)
    floored = world.student_logp + least
    sampled = floored.gather(-1, batch.target[:, None])[:, 0]
    given = {}
    for field in ("teacher_logprob", "reference_logprob"):
        value = getattr(batch, field)
        given[field] = torch.where(value.isneginf(), sampled, value)
    assert batch.teacher_logprob.isneginf()[batch.mask & batch.on_policy].any()  # type: ignore[union-attr]
    if batch.topk_logprob is not None and isinstance(method, TopK) and method.direction == "reverse":
        topk = floored.gather(-1, batch.topk_ids)  # type: ignore[arg-type]
        given["topk_logprob"] = torch.where(batch.topk_logprob.isneginf(), topk, batch.topk_logprob)
    found, expected = world.evaluate(method, batch=batch), world.evaluate(method, batch=replace(batch, **given))
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.d_hidden, expected.d_hidden, rtol=1e-10, atol=1e-13)


def by_hand(student: Tensor, teacher: Tensor, beta: float, least: float) -> Tensor:
    """GKD's divergence with the excluded tokens left out where T weighs them, and floored where S does. [T]"""
    logp, q = student.log_softmax(-1), teacher.softmax(-1)
    p, kept = logp.exp(), q > 0
    logq = torch.where(kept, q, 1.0).log()

    def from_teacher(other: Tensor) -> Tensor:
        return torch.where(kept, q * (logq - other), 0.0).sum(-1)

    if beta == 0:
        return from_teacher(logp)
    if beta == 1:
        return (p * (logp - torch.where(kept, logq, logp.detach() + least))).sum(-1)
    mixture = ((1 - beta) * p + beta * q).log()
    return beta * from_teacher(mixture) + (1 - beta) * (p * (logp - mixture)).sum(-1)


@pytest.mark.parametrize("least", [-20.0, -4.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spelling", ["a bias of -inf", "an absent id"])
def test_whole_rows_with_zeros(beta: float, least: float, spelling: str) -> None:
    """Forward: 0 log 0 = 0. Reverse: the log-ratio of a token that T excludes is floored. The mixture needs neither."""
    world = World.make(vocabulary=V, width=V)
    out = int(world.batch.target[ROW])
    states, head = world.teacher
    bias = torch.zeros(V, dtype=torch.float64).index_fill(0, torch.tensor([out]), -torch.inf)
    head = replace(head, bias=bias) if "bias" in spelling else replace(head, absent=torch.tensor([out]))
    found = replace(world, teacher=(states, head)).evaluate(GKD(beta=beta, min_log_ratio=least), chunk_tokens=3)
    index, hidden = world.batch.mask, world.hidden.clone().requires_grad_()
    logits = world.teacher[1].logits(states).index_fill(-1, torch.tensor([out]), -torch.inf)
    expected = by_hand(world.head.logits(hidden)[index], logits[index], beta, least).mean()
    expected.backward()
    torch.testing.assert_close(found.loss, expected.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.d_hidden, hidden.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("scale", [0.05, 0.5, 1.25, 2.0])
@pytest.mark.parametrize(
    "models", [(TEACHER,), (REFERENCE,), (TEACHER, REFERENCE)], ids=["teacher", "reference", "both"]
)
def test_the_expected_gradient_of_gopd_is_that_of_its_full_form(scale: float, models: tuple[str, ...]) -> None:
    """Law 1 with zeros: `A_t = scale (-20) + (1 - scale) log R/S` where T excludes the token, in both forms."""
    draw = torch.Generator().manual_seed(3)
    student, *others = (torch.randn(V, generator=draw, dtype=torch.float64) for _ in range(3))
    mask = torch.zeros(V, dtype=torch.float64)
    mask[2] = -torch.inf
    eye = LMHead(torch.eye(V, dtype=torch.float64))
    rows = dict(zip((TEACHER, REFERENCE), others, strict=True))
    heads = {name: replace(eye, bias=mask if name in models else None) for name in rows}
    scores = {name: heads[name].logits(row).log_softmax(-1) for name, row in rows.items()}
    ones = torch.ones(V, dtype=torch.bool)
    batch = TokenBatch(
        torch.arange(V),
        ones,
        ones,
        torch.arange(V),
        teacher_logprob=scores[TEACHER],
        reference_logprob=scores[REFERENCE],
    )

    def gradient(method: Method, **models: tuple[Tensor, LMHead]) -> Tensor:
        z = student.expand(V, V).clone().requires_grad_()
        evaluate(method, batch, z, eye, counts={"tokens": 1.0, "sequences": 1.0}, **models).loss.backward()  # type: ignore[arg-type]
        assert z.grad is not None
        return z.grad

    sampled = (student.softmax(-1)[:, None] * gradient(GOPD(scale=scale))).sum(0)
    full = gradient(
        GOPD(scale=scale, form="full"), **{name: (row.expand(V, V), heads[name]) for name, row in rows.items()}
    )
    assert sampled.abs().max() > 0.1
    torch.testing.assert_close(sampled, full[0], rtol=1e-10, atol=1e-12)


NOT_TAKEN: dict[str, tuple[Method, Method]] = {
    "kdrl on what is right": (KDRL(beta=0.3), GRPO()),
    "a masked outlier": (TrOPD(outlier="mask"), TrOPD(outlier="mask")),
    "aopd's gate": (AOPD(k=3, reduce="token"), TopK(k=3, tail="none")),
    "an outlier of tropd": (TrOPD(k=3), TopK(k=3, tail="none")),
}


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_a_term_that_is_not_taken_has_no_gradient(name: str) -> None:
    """An infinity that no term reads leaves the row's gradient as it is without it, to the last bit."""
    method, same = NOT_TAKEN[name]
    world = on_policy_only(Enumerated.make(4, stale=False))
    row = int(world.batch.mask.nonzero()[3])
    score = world.batch.teacher_logprob.clone()  # type: ignore[union-attr]
    score[row] = -torch.inf
    batch = replace(world.batch, teacher_logprob=score, correct=torch.ones_like(world.batch.mask))
    world = replace(world, batch=batch)
    _, gradient = world.evaluate(method)
    assert gradient[world.batch.mask].isfinite().all()
    if name == "a masked outlier":
        assert (gradient[row] == 0).all()
    else:
        torch.testing.assert_close(gradient[row], world.evaluate(same)[1][row], rtol=1e-12, atol=1e-14)


def test_a_loss_that_is_not_taken_is_never_multiplied() -> None:
    """0 times the slope of an infinity is NaN: rows are chosen before the loss."""
    world = on_policy_only(Enumerated.make(4, stale=False))
    sure = torch.full_like(world.batch.uniform, 0.5)  # type: ignore[arg-type]
    far = torch.full_like(sure, 900.0)
    # S / S_old overflows on every token, and every token is right
    batch = replace(world.batch, student_logprob=-far, correct=torch.ones_like(world.batch.mask))
    advantage = torch.zeros_like(sure)
    quiet = replace(batch, outcome_advantage=advantage, student_logprob=None)
    _, gradient = replace(world, batch=quiet).evaluate(KDRL(beta=0.3))
    assert (gradient[world.batch.mask] == 0).all()
    _, gradient = replace(world, batch=batch).evaluate(EOPD(k=3, coef=0.0, clip=0.2))
    assert gradient[world.batch.mask].isfinite().logical_not().any()
    _, gradient = replace(world, batch=batch).evaluate(AOPD(k=3, threshold=1.0))
    assert gradient[world.batch.mask].isfinite().all()


@pytest.mark.parametrize("name", SCORED)
def test_nan_stays_an_error(name: str) -> None:
    """Excluded is a fact, missing is none."""
    world, method = World.make(), SCORED[name]
    batch = world.judged(method)
    if "teacher_logprob" not in method.at(0)[0].requires or "full" in method.needs:
        return
    score = batch.teacher_logprob.clone()  # type: ignore[union-attr]
    score[ROW] = torch.nan
    with pytest.raises(ScoreError, match="teacher_logprob is NaN on 1 trained tokens"):
        world.evaluate(method, batch=replace(batch, teacher_logprob=score))


def test_excluded_tokens_are_counted_and_left_out_of_the_mean_log_ratio() -> None:
    world = masking(World.make(), TEACHER)
    batch = judged(world, OPD())
    metrics = world.evaluate(OPD(), batch=batch).evaluation.metrics
    own = batch.mask & batch.on_policy
    gone = own & batch.teacher_logprob.isneginf()  # type: ignore[union-attr]
    assert metrics["teacher_excluded"].total == int(gone.sum()) > 0
    assert metrics["teacher_excluded"].count == metrics["log_ratio_positive"].count == int(own.sum())
    ratio = batch.teacher_logprob - world.student_logp.gather(-1, batch.target[:, None])[:, 0]  # type: ignore[operator]
    assert metrics["log_ratio"].value == pytest.approx(float(ratio[own & ~gone].mean()), rel=1e-12)


def test_one_number_of_a_server_stands_for_minus_infinity() -> None:
    world = masking(World.make(), TEACHER)
    batch = judged(world, OPD())
    clamped = replace(batch, teacher_logprob=batch.teacher_logprob.clamp_min(EXCLUDED))  # type: ignore[union-attr]
    world.evaluate(OPD(), batch=clamped).same_as(world.evaluate(OPD(), batch=batch), rtol=0, atol=0)


@pytest.mark.parametrize("value", [1.0, float("nan"), float("-inf")])
def test_a_floor_must_be_a_finite_number_below_0(value: float) -> None:
    with pytest.raises(ValueError, match="min_log_ratio"):
        OPD(min_log_ratio=value)
