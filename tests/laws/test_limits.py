"""Methods that become each other, in loss and gradient, under the same reduction."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.laws.test_formulas import Enumerated, V, on_policy_only
from understudy.methods import (
    AOPD,
    DAPO,
    EOPD,
    GKD,
    GOPD,
    GRPO,
    KDRL,
    OPD,
    OVD,
    REOPOLD,
    SFT,
    TOPD,
    DrGRPO,
    Phases,
    TopK,
    TopKTail,
    TrOPD,
)
from understudy.methods.base import Method

WIDE = 1e12
"""A clip that is never reached."""
GUIDED = [Enumerated.make(seed, stale=seed > 4) for seed in (4, 5, 6)]
OWN = [on_policy_only(world) for world in GUIDED]
"""The same, but the student wrote every token: for limits between methods that differ on what others wrote."""


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], scale: float = 1.0) -> None:
    """Equal loss and gradient, and a gradient that is not 0 by accident."""
    torch.testing.assert_close(found[0], scale * expected[0], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found[1], scale * expected[1], rtol=1e-9, atol=1e-13)
    assert expected[1].abs().max() > 1e-3


def changed(world: Enumerated, **values: object) -> Enumerated:
    return replace(world, batch=replace(world.batch, **values))


EVERYWHERE: dict[str, tuple[Method, Method]] = {
    "exopd of scale 1 is opd": (GOPD(scale=1.0), OPD()),
    "exopd of scale 1 is opd, by samples": (GOPD(scale=1.0, reduce="sequence"), OPD(reduce="sequence")),
    "eopd of a sure teacher is opd": (EOPD(threshold=float("inf"), clip=WIDE), OPD()),
    "eopd without its second part is opd": (EOPD(coef=0.0, clip=WIDE), OPD()),
    "aopd that gates nothing is opd": (AOPD(k=3, threshold=-1.0, reduce="token"), OPD()),
    "aopd that gates nothing is opd, by samples": (AOPD(k=3, threshold=-1.0), OPD(reduce="sequence")),
    "topd with nothing but the teacher is opd": (TOPD(mix=1.0), OPD()),
    "reopold without floor or phases is opd": (REOPOLD(phases=False, floor=-float("inf")), OPD()),
    "a region without a bound is opd": (
        TrOPD(k=3, region="ratio", threshold=0.0, guidance=0.0, denominator="joint"),
        OPD(),
    ),
    "outliers clipped at no floor are opd": (
        TrOPD(outlier="clip", floor=-float("inf"), guidance=0.0, denominator="joint"),
        OPD(),
    ),
    "tropd on positive tokens is aopd": (
        TrOPD(k=3, also_positive=True, guidance=0.0, denominator="joint"),
        AOPD(k=3, threshold=0.0, reduce="token"),
    ),
    "a hard region at 1 is aopd": (
        TrOPD(k=3, region="ratio", guidance=0.0, denominator="joint"),
        AOPD(k=3, threshold=0.0, reduce="token"),
    ),
    "the hybrid without a gate is tropd": (
        TrOPD(k=3, also_positive=True, positive_threshold=-1.0),
        TrOPD(k=3),
    ),
    "the floor's number is its formula": (
        REOPOLD(phases=False, floor=-1.7199611490370513),
        REOPOLD(phases=False, mix=0.3),
    ),
    "a discount of almost 0 is none": (OPD(discount=1e-15), OPD()),
    "dapo with grpo's clip is grpo": (DAPO(clip_high=0.2), GRPO()),
    "kdrl without a teacher is grpo": (KDRL(beta=0.0), GRPO()),
    "dr_grpo is a constant": (DrGRPO(max_tokens=9), GRPO(length="constant", max_tokens=9)),
    "a baseline over all tokens": (OPD(baseline=True, baseline_k=V), OPD(baseline=True)),
    "a clip that is never reached": (AOPD(k=3, clip=WIDE), AOPD(k=3)),
    "a correction cut at infinity": (
        OPD(correction="icepop", correction_low=0.0, correction_high=float("inf")),
        OPD(correction="tis", correction_high=float("inf")),
    ),
}
WHERE_ALL_IS_OWN: dict[str, tuple[Method, Method]] = {
    "aopd that gates everything is forward kl": (
        AOPD(k=3, threshold=1.0, reduce="token"),
        TopK(k=3, direction="forward", tail="none"),
    ),
    "aopd that gates everything with k = v is gkd": (AOPD(k=V, threshold=1.0, reduce="token"), GKD(beta=0.0)),
    "tropd that trusts nothing with k = v is gkd": (TrOPD(k=V, region="ratio", threshold=WIDE), GKD(beta=0.0)),
    "tropd that trusts nothing is forward kl": (
        TrOPD(k=2, region="ratio", threshold=WIDE),
        TopK(k=2, direction="forward", tail="none"),
    ),
    "gopd of scale 1 in full is gkd": (GOPD(scale=1.0, form="full"), GKD(beta=1.0)),
    "reopold that explores without a floor is opd": (REOPOLD(switch_step=1, floor=-float("inf")), OPD()),
    "reopold that refines all is the clip": (
        REOPOLD(switch_step=0, top_share=1.0, floor=-0.4),
        REOPOLD(phases=False, floor=-0.4),
    ),
    "without prefixes there is one denominator": (TrOPD(k=3), TrOPD(k=3, denominator="joint")),
    "guidance without prefixes is nothing": (TrOPD(k=3, guidance=7.0), TrOPD(k=3, guidance=0.0)),
    "ovd without reference is grpo": (OVD(kl_coef=0.0), GRPO()),
    "ovd is grpo": (OVD(kl_coef=0.3), GRPO(kl_coef=0.3)),
}


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_limit_whoever_wrote_the_tokens(name: str) -> None:
    for world in GUIDED:
        one, other = EVERYWHERE[name]
        same(world.evaluate(one), world.evaluate(other))


@pytest.mark.parametrize("name", WHERE_ALL_IS_OWN)
def test_a_limit_where_the_student_wrote_everything(name: str) -> None:
    for world in OWN:
        one, other = WHERE_ALL_IS_OWN[name]
        same(world.evaluate(one), world.evaluate(other))


def test_opd_with_a_clip_is_grpo_with_nothing_but_the_teacher() -> None:
    """Also where S has moved away from S_old, so that the clip acts."""
    for world in GUIDED:
        silent = changed(world, outcome_advantage=torch.zeros(len(world.batch), dtype=torch.float64))
        same(world.evaluate(OPD(clip=0.2)), silent.evaluate(GRPO(distil_coef=1.0)))
    stale = [world for world in GUIDED if world.batch.student_logprob is not None]
    assert any(world.evaluate(OPD(clip=0.02))[0] != world.evaluate(OPD())[0] for world in stale)


@pytest.mark.parametrize("reference", [None, torch.nan, -torch.inf, 0.3])
def test_scale_1_does_not_look_at_the_reference(reference: float | None) -> None:
    world = GUIDED[0]
    value = None if reference is None else torch.full((len(world.batch),), reference, dtype=torch.float64)
    assert "reference" not in GOPD(scale=1.0).needs
    same(changed(world, reference_logprob=value).evaluate(GOPD(scale=1.0)), world.evaluate(OPD()))


@pytest.mark.parametrize("scale", [0.0, 0.7, 1.25, 2.0])
def test_a_reference_equal_to_the_teacher_is_opd_at_every_scale(scale: float) -> None:
    for world in GUIDED:
        equal = replace(
            changed(world, reference_logprob=world.batch.teacher_logprob),
            reference=world.teacher,
        )
        same(equal.evaluate(GOPD(scale=scale)), world.evaluate(OPD()))
        same(equal.evaluate(GOPD(scale=scale, form="full")), world.evaluate(GOPD(scale=1.0, form="full")))


def test_scale_0_follows_the_reference_alone() -> None:
    for world in OWN:
        swapped = replace(changed(world, teacher_logprob=world.batch.reference_logprob), teacher=world.reference)
        same(world.evaluate(GOPD(scale=0.0)), swapped.evaluate(OPD()))
        same(world.evaluate(GOPD(scale=0.0, form="full")), swapped.evaluate(GKD(beta=1.0)))


@pytest.mark.parametrize("outlier", ["forward_kl", "clip", "mask", "scalar"])
def test_a_draw_of_0_trusts_everything(outlier: str) -> None:
    """Law 4: then the treatment of outliers is never asked."""
    for world in GUIDED:
        sure = changed(world, uniform=torch.zeros_like(world.batch.uniform))
        same(sure.evaluate(TrOPD(k=3, outlier=outlier, guidance=0.0, denominator="joint")), world.evaluate(OPD()))  # type: ignore[arg-type]


def test_a_draw_of_almost_1_rejects_whatever_the_teacher_likes_less() -> None:
    """Law 4, with the random region: trained where T < S, everything is rejected, and K = V is the full forward KL."""
    for world in OWN:
        batch, at_old = world.batch, world.batch.student_logprob
        old = world.student.log_softmax(-1).gather(-1, batch.target[:, None])[:, 0] if at_old is None else at_old
        less = batch.mask & (batch.teacher_logprob < old)  # type: ignore[operator]
        strict = changed(world, uniform=torch.full_like(batch.uniform, 1 - 1e-12), mask=less)
        same(strict.evaluate(TrOPD(k=V)), strict.evaluate(GKD(beta=0.0)))


def test_tropd_that_masks_outliers_is_opd_on_what_it_trusts() -> None:
    """And the rejected still count in the mean."""
    world = GUIDED[1]
    ratio = (world.batch.teacher_logprob - world.batch.student_logprob).exp()  # type: ignore[operator]
    kept = world.batch.mask & (~world.batch.on_policy | (world.batch.uniform < ratio))
    share = int(kept.sum()) / int(world.batch.mask.sum())
    assert share < 1
    same(
        world.evaluate(TrOPD(outlier="mask", guidance=0.0, denominator="joint")),
        changed(world, mask=kept).evaluate(OPD()),
        share,
    )


def test_only_prefixes_leave_imitation() -> None:
    """Off-policy tokens alone: `guidance` times the cross-entropy on them."""
    for world in GUIDED:
        prefixes = changed(world, mask=world.batch.mask & ~world.batch.on_policy)
        same(prefixes.evaluate(TrOPD(k=3, guidance=0.3)), prefixes.evaluate(SFT()), 0.3)


def test_the_pull_of_kdrl_has_the_gradient_of_opd() -> None:
    """At S = S_old, with advantages of 0: `-beta d grad log S`, whatever its value is."""
    world = changed(GUIDED[0], outcome_advantage=torch.zeros(len(GUIDED[0].batch), dtype=torch.float64))
    _, gradient = world.evaluate(KDRL(beta=0.3, skip_correct=False))
    torch.testing.assert_close(gradient, 0.3 * world.evaluate(OPD())[1], rtol=1e-10, atol=1e-14)


def test_kdrl_leaves_what_is_right_to_the_reward() -> None:
    """`correct` decides where it is known, and the sign of the advantage where it is not."""
    for world in GUIDED:
        ones, advantage = torch.ones_like(world.batch.mask), world.batch.outcome_advantage
        same(changed(world, correct=ones).evaluate(KDRL(beta=0.3)), world.evaluate(GRPO()))
        same(changed(world, correct=~ones).evaluate(KDRL(beta=0.3)), world.evaluate(KDRL(beta=0.3, skip_correct=False)))
        positive = changed(world, outcome_advantage=advantage.abs() + 0.1, correct=None)  # type: ignore[union-attr]
        same(positive.evaluate(KDRL(beta=0.3)), positive.evaluate(GRPO()))


@pytest.mark.parametrize("length", ["token", "sequence"])
def test_the_teacher_in_grpo_is_opd_where_no_reward_differs(length: str) -> None:
    for world in GUIDED:
        flat = changed(world, outcome_advantage=torch.zeros(len(world.batch), dtype=torch.float64))
        method = GRPO(distil_coef=0.5, length=length, clip_low=WIDE, clip_high=WIDE)  # type: ignore[arg-type]
        same(flat.evaluate(method), world.evaluate(OPD(reduce=length)), 0.5)  # type: ignore[arg-type]


def test_the_means_agree_on_samples_of_one_length() -> None:
    """Token, sequence, and a constant that is that length."""
    world = GUIDED[1]
    mask = torch.zeros_like(world.batch.mask)
    mask[[1, 3, 6, 7, 15, 16]] = True  # two tokens of each of three samples
    equal = changed(world, mask=mask)
    by_token = equal.evaluate(GRPO(kl_coef=0.2))
    same(equal.evaluate(GRPO(kl_coef=0.2, length="sequence")), by_token)
    same(equal.evaluate(DrGRPO(kl_coef=0.2, max_tokens=2)), by_token)
    same(equal.evaluate(OPD(reduce="sequence")), equal.evaluate(OPD()))


@pytest.mark.parametrize("step", range(11))
def test_phases_are_their_parts(step: int) -> None:
    """At every step of the run, with the part's own count of steps: REOPOLD switches in the middle of its share."""
    parts = [{"until": 0.2, "type": "tropd", "k": 3}, {"until": 0.8, "type": "reopold"}, {"type": "dr_grpo"}]
    method = Phases(parts=parts).for_run(10, max_new_tokens=9)
    part, own_step = (
        (TrOPD(k=3), step)
        if step < 2
        else (REOPOLD(switch_step=3), step - 2)
        if step < 8
        else (DrGRPO(max_tokens=9), 0)
    )
    for world in GUIDED:
        same(world.evaluate(method, step=step), world.evaluate(part, step=own_step))
        assert method.plan(step) == part.plan(own_step)


AT_THE_TEACHER: dict[str, Method] = {
    "opd": OPD(),
    "opd baseline": OPD(baseline=True),
    "opd discount": OPD(discount=0.9),
    "gopd": GOPD(),
    "gopd full": GOPD(form="full"),
    "reopold": REOPOLD(switch_step=5),
    "topd": TOPD(),
    "eopd": EOPD(k=V, threshold=0.0),
    "aopd": AOPD(k=V),
    "tropd": TrOPD(k=V, guidance=0.0),
    "tropd both": TrOPD(k=V, guidance=0.0, also_positive=True),
    "gkd": GKD(beta=0.5),
    "topk": TopK(k=2),
    "topk tail": TopKTail(k=2),
    "kdrl": KDRL(beta=0.3),
    "grpo": GRPO(distil_coef=0.5, kl_coef=0.3),
}


@pytest.mark.parametrize("name", AT_THE_TEACHER)
def test_at_the_teacher_nothing_pulls(name: str) -> None:
    """Law 2, where part of the tokens is not the student's, and for the teacher's part in a mixture with rewards."""
    world = GUIDED[0]
    at_target = world.student.log_softmax(-1).gather(-1, world.batch.target[:, None])[:, 0]
    logits = world.student.nan_to_num()
    batch = replace(
        world.batch,
        teacher_logprob=at_target,
        reference_logprob=at_target,
        outcome_advantage=torch.zeros_like(at_target),
    )
    _, gradient = Enumerated(batch, world.student, logits, logits).evaluate(AT_THE_TEACHER[name])
    assert gradient.abs().max() < 1e-15
