"""Every method against its formula in plain loops over tokens and vocabulary, written from the papers' equations.

Loss and gradient with respect to the logits. Half of the worlds have a student that has moved since the batch was
built, so that ratios differ from 1 and clips are active; masked places hold NaN throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from understudy.linear import LMHead, evaluate
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
from understudy.types import TokenBatch

V = 5
SEQUENCE = torch.tensor([7] * 5 + [0] + [3] * 4 + [4] * 2 + [1] * 3 + [2] * 5)
"""Six samples of different lengths, their names in no order."""
PREFIX = [0, 1, 6, 12, 13, 14]
"""Tokens that the student did not write: two prefixes, and sample 1 as a whole."""
MASKED = [2, 8, 10, 11, 17]
"""What the environment wrote, and sample 4 as a whole."""


@dataclass(frozen=True)
class Enumerated:
    """Logits of student, teacher and reference, and the batch with every score. [T, V]"""

    batch: TokenBatch
    student: Tensor
    teacher: Tensor
    reference: Tensor

    @staticmethod
    def make(seed: int = 0, *, stale: bool = True, vocabulary: int = V) -> Enumerated:
        """`stale`: the student has moved since `student_logprob`; otherwise the batch leaves that to the evaluation."""
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        size = len(SEQUENCE)
        old, teacher, reference = (normal(size, vocabulary) for _ in range(3))
        student = old + 0.5 * normal(size, vocabulary) if stale else old
        target = torch.randint(0, vocabulary, (size,), generator=draw)
        on_policy, mask = torch.ones(size, dtype=torch.bool), torch.ones(size, dtype=torch.bool)
        on_policy[PREFIX] = False
        mask[MASKED] = False
        logp, logq = old.log_softmax(-1), teacher.log_softmax(-1)
        at_old, advantage = at(logp, target), normal(8)[SEQUENCE]
        batch = TokenBatch(
            target,
            mask,
            on_policy,
            SEQUENCE,
            student_logprob=at_old if stale else None,
            student_entropy=-(logp.exp() * logp).sum(-1) if stale else None,
            rollout_logprob=torch.where(on_policy, at_old + 0.4 * normal(size), torch.nan),
            teacher_logprob=at(logq, target),
            reference_logprob=at(reference.log_softmax(-1), target),
            teacher_entropy=-(logq.exp() * logq).sum(-1),
            outcome_advantage=advantage,
            correct=advantage > 0,
            uniform=torch.rand(size, generator=draw, dtype=torch.float64),
        )
        hole = torch.where(mask, 0.0, torch.nan)
        spoilt = {
            name: value + hole
            for name, value in vars(batch).items()
            if isinstance(value, Tensor) and value.is_floating_point() and name != "uniform"
        }
        return Enumerated(replace(batch, **spoilt), student + hole[:, None], teacher, reference)

    def judged(self, method: Method) -> TokenBatch:
        """The batch with the teacher's top tokens, as many as the method reads."""
        if method.reads.topk is None:
            return self.batch
        top = self.teacher.log_softmax(-1).topk(min(method.reads.k, self.teacher.shape[-1]))
        return replace(self.batch, topk_ids=top.indices, topk_logprob=top.values)

    def evaluate(self, method: Method, *, step: int = 0, batch: TokenBatch | None = None) -> tuple[Tensor, Tensor]:
        """Loss, and its gradient with respect to the student's logits. [], [T, V]"""
        head = LMHead(torch.eye(self.student.shape[-1], dtype=torch.float64))
        full = "full" in method.needs
        z = self.student.clone().requires_grad_()
        loss = evaluate(
            method,
            self.judged(method.at(step)[0]) if batch is None else batch,
            z,
            head,
            step=step,
            teacher=(self.teacher, head) if full else None,
            reference=(self.reference, head) if full and "reference" in method.needs else None,
            chunk_tokens=4,
        ).loss
        loss.backward()
        assert z.grad is not None
        return loss.detach(), z.grad

    def rows(self, z: Tensor, correction: Callable[[float], float] = lambda gap: 1.0) -> list[Row]:
        """The trained tokens, one by one, as functions of the logits `z`."""
        found, batch = [], self.batch
        for t in batch.mask.nonzero().squeeze(-1).tolist():
            y, logp = int(batch.target[t]), z[t] - z[t].exp().sum().log()
            q, r = (torch.softmax(row[t], -1).tolist() for row in (self.teacher, self.reference))
            old = float(logp[y].detach()) if batch.student_logprob is None else float(batch.student_logprob[t])
            entropy = -sum(math.exp(v) * v for v in logp.tolist())
            if batch.student_entropy is not None:
                entropy = float(batch.student_entropy[t])
            own = bool(batch.on_policy[t])
            gap = math.exp(old - float(batch.rollout_logprob[t])) if own else 1.0  # type: ignore[index]
            advantage, u = float(batch.outcome_advantage[t]), float(batch.uniform[t])  # type: ignore[index]
            weight, sample = correction(gap) if own else 1.0, int(batch.sequence[t])
            found.append(Row(y, logp, q, r, old, gap, weight, entropy, own, sample, advantage, u))
        return found


def at(logp: Tensor, target: Tensor) -> Tensor:
    return logp.gather(-1, target[:, None]).squeeze(-1)


@dataclass(frozen=True)
class Row:
    """One trained token: what it is, and every distribution at its place."""

    y: int
    logp: Tensor
    """log S, the only thing with a gradient."""
    q: list[float]
    r: list[float]
    old: float
    gap: float
    """S_old / mu."""
    weight: float
    """What a policy gradient is multiplied by because of the gap."""
    entropy: float
    own: bool
    sample: int
    advantage: float
    u: float

    @property
    def d(self) -> float:
        return math.log(self.q[self.y]) - self.old

    @property
    def ratio_to_teacher(self) -> float:
        return self.q[self.y] / math.exp(self.old)

    @property
    def now(self) -> float:
        return float(self.logp[self.y])

    def gradient(self, advantage: float, low: float = math.inf, high: float = math.inf) -> Tensor:
        """PPO's surrogate by cases: which of the two products is the smaller depends on the sign of A alone."""
        ratio = (self.logp[self.y] - self.old).exp()
        if advantage >= 0 and float(ratio.detach()) > 1 + high:
            return torch.tensor(-self.weight * (1 + high) * advantage, dtype=torch.float64)
        if advantage < 0 and float(ratio.detach()) < 1 - low:
            return torch.tensor(-self.weight * (1 - low) * advantage, dtype=torch.float64)
        return -self.weight * ratio * advantage

    def top(self, k: int) -> list[int]:
        return sorted(range(len(self.q)), key=lambda v: -self.q[v])[:k]

    def forward_kl(self, k: int, *, renormalised: bool = False) -> Tensor:
        """`sum_{v in TopK_T} T(v) (log T(v) - log S(v))`."""
        mass = sum(self.q[v] for v in self.top(k)) if renormalised else 1.0
        total = torch.zeros((), dtype=torch.float64)
        for v in self.top(k):
            total = total + self.q[v] / mass * (math.log(self.q[v] / mass) - self.logp[v])
        return total

    def reverse_kl(self, toward: Sequence[float]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for v in range(len(toward)):
            total = total + self.logp[v].exp() * (self.logp[v] - math.log(toward[v]))
        return total

    def entropy_of_teacher(self) -> float:
        return -sum(p * math.log(p) for p in self.q)


ZERO = torch.zeros((), dtype=torch.float64)
Formula = Callable[[list[Row]], Tensor]


def mean(values: Sequence[Tensor], rows: list[Row], kind: str = "token", constant: int = 1) -> Tensor:
    """Over the trained tokens; over each sample's and then samples; or sums over samples, divided by a constant."""
    if kind == "token":
        return torch.stack(list(values)).sum() / len(rows)
    samples = sorted({row.sample for row in rows})
    total = ZERO
    for name in samples:
        own = [value for value, row in zip(values, rows, strict=True) if row.sample == name]
        total = total + torch.stack(own).sum() / (len(own) if kind == "sequence" else constant)
    return total / len(samples)


def each(loss: Callable[[Row], Tensor], kind: str = "token", constant: int = 1) -> Formula:
    """The mean of a loss of one token."""
    return lambda rows: mean([loss(row) for row in rows], rows, kind, constant)


def apart(loss: Callable[[Row], Tensor], kind: str = "token") -> Formula:
    """A mean over the tokens that the student wrote plus one over the others."""

    def total(rows: list[Row]) -> Tensor:
        parts = [[row for row in rows if row.own], [row for row in rows if not row.own]]
        return torch.stack([mean([loss(row) for row in part], part, kind, 1) for part in parts]).sum()

    return total


def own(loss: Callable[[Row], Tensor]) -> Callable[[Row], Tensor]:
    """What concerns the student's own choices: tokens of others give nothing, and count in the mean."""
    return lambda row: loss(row) if row.own else ZERO


def extrapolated(row: Row, scale: float) -> float:
    return scale * math.log(row.q[row.y]) + (1 - scale) * math.log(row.r[row.y]) - row.old


def power_mixture(row: Row, scale: float) -> list[float]:
    mass = [q**scale * r ** (1 - scale) for q, r in zip(row.q, row.r, strict=True)]
    return [m / sum(mass) for m in mass]


def discounted(gamma: float) -> Formula:
    def loss(rows: list[Row]) -> Tensor:
        values = []
        for i, row in enumerate(rows):
            rest = [later for later in rows[i:] if later.sample == row.sample]
            advantage = sum(gamma**n * later.d for n, later in enumerate(rest))
            values.append(row.gradient(advantage) if row.own else ZERO)
        return mean(values, rows)

    return loss


def generalised_js(beta: float) -> Callable[[Row], Tensor]:
    def loss(row: Row) -> Tensor:
        total = ZERO
        for v, q in enumerate(row.q):
            p = row.logp[v].exp()
            middle = (1 - beta) * p + beta * q
            total = total + beta * q * (math.log(q) - middle.log()) + (1 - beta) * p * (row.logp[v] - middle.log())
        return total

    return loss


def top_k(k: int, direction: str, support: str, tail: str) -> Callable[[Row], Tensor]:
    def loss(row: Row) -> Tensor:
        chosen = row.top(k) if support == "teacher" else row.logp.argsort(descending=True)[:k].tolist()
        p, q = [row.logp[v].exp() for v in chosen], [torch.tensor(row.q[v], dtype=torch.float64) for v in chosen]
        if tail == "renormalise":
            p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        elif tail == "bucket" and k < len(row.q):
            rest = [v for v in range(len(row.q)) if v not in chosen]
            p.append(sum(row.logp[v].exp() for v in rest))
            q.append(torch.tensor(sum(row.q[v] for v in rest), dtype=torch.float64))
        left, right = (q, p) if direction == "forward" else (p, q)
        return sum((a * (a.log() - b.log()) for a, b in zip(left, right, strict=True)), ZERO)

    return loss


def reopold(floor: float, phase: str, share: float = 0.2, kind: str = "token") -> Formula:
    def loss(rows: list[Row]) -> Tensor:
        num_trained, rows = len(rows), [row for row in rows if row.own]
        kept = rows
        if phase == "exploration":
            kept = [row for row in rows if row.d >= floor]
        elif phase == "refinement":
            kept = sorted(rows, key=lambda row: -row.entropy)[: math.ceil(share * len(rows))]
        if not kept:
            return ZERO
        values = [row.gradient(max(row.d, floor)) for row in kept]
        return torch.stack(values).sum() / num_trained if phase == "clip" else mean(values, kept, kind)

    return loss


def eopd(k: int, threshold: float, coef: float, clip: float) -> Callable[[Row], Tensor]:
    def loss(row: Row) -> Tensor:
        policy = row.gradient(row.d, clip, clip)
        uncertain = row.entropy_of_teacher() > threshold
        return policy + (coef * row.forward_kl(k, renormalised=True) if uncertain else ZERO)

    return own(loss)


def aopd(k: int, threshold: float, over: int = 1, tail: str = "none") -> Callable[[Row], Tensor]:
    def loss(row: Row) -> Tensor:
        gated = row.q[row.y] - math.exp(row.old) <= threshold
        return top_k(k, "forward", "teacher", tail)(row) / over if gated else row.gradient(row.d)

    return own(loss)


def tropd(
    k: int,
    region: str,
    outlier: str,
    *,
    threshold: float = 1.0,
    guidance: float = 0.0,
    also_positive: bool = False,
    tail: str = "none",
) -> Callable[[Row], Tensor]:
    forward = top_k(k, "forward", "teacher", tail)

    def loss(row: Row) -> Tensor:
        if not row.own:
            return -guidance * row.logp[row.y]
        ratio = row.ratio_to_teacher
        trusted = row.u < min(ratio, 1.0) if region == "bernoulli" else ratio >= threshold
        if trusted and also_positive and ratio <= 1:
            return forward(row)
        if trusted:
            return row.gradient(row.d)
        treatments: dict[str, Callable[[], Tensor]] = {
            "forward_kl": lambda: forward(row),
            "clip": lambda: row.gradient(max(row.d, -0.7)),
            "mask": lambda: ZERO,
            "scalar": lambda: row.gradient(-float(forward(row).detach())),
        }
        return treatments[outlier]()

    return loss


def topd(ratio: float, mix: float) -> float:
    return math.log(mix * math.exp(ratio) + 1 - mix)


def topk_tail(k: int) -> Callable[[Row], Tensor]:
    def loss(row: Row) -> Tensor:
        chosen = row.logp.argsort(descending=True)[:k].tolist()
        exact = sum((row.logp[v].exp() * (float(row.logp[v]) - math.log(row.q[v])) for v in chosen), ZERO)
        return exact if row.y in chosen else exact + row.gradient(row.d)

    return own(loss)


def reference_kl(row: Row) -> Tensor:
    x = math.log(row.r[row.y]) - row.logp[row.y]
    return x.exp() - x - 1


def grpo(low: float = 0.2, high: float = 0.2, kl: float = 0.0, distil: float = 0.0) -> Callable[[Row], Tensor]:
    return own(lambda row: row.gradient(row.advantage + distil * row.d, low, high) + kl * reference_kl(row))


def ovd(clip: float, kl: float) -> Callable[[Row], Tensor]:
    """Slots that the teacher filled are trained on like the others."""
    return lambda row: row.gradient(row.advantage, clip, clip) + kl * reference_kl(row)


def kdrl(beta: float, *, skip: bool) -> Callable[[Row], Tensor]:
    def loss(row: Row) -> Tensor:
        pull = beta / 2 * (math.log(row.q[row.y]) - row.logp[row.y]) ** 2
        return row.gradient(row.advantage, 0.2, 0.2) + (ZERO if skip and row.advantage > 0 else pull)

    return own(loss)


def aopd_in_a_region(row: Row) -> Tensor:
    """TrOPD with AOPD: the forward KL where either gives it."""
    if not row.own:
        return ZERO
    gated = row.q[row.y] - math.exp(row.old) <= -0.1
    outlier = row.u >= min(row.ratio_to_teacher, 1.0)
    return top_k(3, "forward", "teacher", "none")(row) if gated or outlier else row.gradient(row.d)


MIXTURE, ODDS = math.log(0.3) / 0.7, math.log(0.3 / 0.7)
CASES: dict[str, tuple[Method, Formula]] = {
    "opd": (OPD(), each(own(lambda row: row.gradient(row.d)))),
    "opd sequence": (OPD(reduce="sequence"), each(own(lambda row: row.gradient(row.d)), "sequence")),
    "opd discount": (OPD(discount=0.8), discounted(0.8)),
    "opd baseline": (
        OPD(baseline=True),
        each(own(lambda row: row.gradient(row.d + float(row.reverse_kl(row.q).detach())))),
    ),
    "eopd all": (EOPD(k=V, threshold=0.0, coef=0.7, clip=0.1), each(eopd(V, 0.0, 0.7, 0.1))),
    "eopd": (EOPD(k=2, threshold=1.2), each(eopd(2, 1.2, 1.0, 0.2))),
    "aopd": (AOPD(k=3), each(aopd(3, 0.0), "sequence")),
    "aopd bucket": (AOPD(k=2, tail="bucket"), each(aopd(2, 0.0, tail="bucket"), "sequence")),
    "aopd threshold": (AOPD(k=3, threshold=0.1, reduce="token"), each(aopd(3, 0.1))),
    "aopd mean over k": (AOPD(k=3, mean_over_k=True), each(aopd(3, 0.0, 3), "sequence")),
    "aopd k is v": (AOPD(k=V, threshold=-0.1, mean_over_k=True, reduce="token"), each(aopd(V, -0.1, V))),
    "reopold mixture": (REOPOLD(switch_step=1), reopold(MIXTURE, "exploration")),
    "reopold odds": (REOPOLD(switch_step=1, floor="odds"), reopold(ODDS, "exploration")),
    "reopold number": (REOPOLD(switch_step=1, floor=0.1), reopold(0.1, "exploration")),
    "reopold nothing kept": (REOPOLD(switch_step=1, floor=50.0), reopold(50.0, "exploration")),
    "reopold refinement": (REOPOLD(switch_step=0), reopold(MIXTURE, "refinement")),
    "reopold refinement half": (REOPOLD(switch_step=0, floor=-0.2, top_share=0.5), reopold(-0.2, "refinement", 0.5)),
    "reopold exploration sequence": (
        REOPOLD(switch_step=1, reduce="sequence"),
        reopold(MIXTURE, "exploration", kind="sequence"),
    ),
    "reopold refinement sequence": (
        REOPOLD(switch_step=0, floor=-0.2, top_share=0.5, reduce="sequence"),
        reopold(-0.2, "refinement", 0.5, "sequence"),
    ),
    "reopold clip": (REOPOLD(phases=False, floor=-0.3), reopold(-0.3, "clip")),
    "tropd also positive": (
        TrOPD(k=3, also_positive=True, outlier="mask", guidance=0.0),
        apart(tropd(3, "bernoulli", "mask", also_positive=True)),
    ),
    "tropd also positive ratio": (
        TrOPD(k=3, also_positive=True, outlier="clip", floor=-0.7, region="ratio", threshold=0.4, guidance=0.0),
        apart(tropd(3, "ratio", "clip", threshold=0.4, also_positive=True)),
    ),
    "tropd and aopd": (
        TrOPD(k=3, also_positive=True, positive_threshold=-0.1, guidance=0.0),
        apart(aopd_in_a_region),
    ),
    "tropd joint": (
        TrOPD(k=3, guidance=0.3, denominator="joint"),
        each(tropd(3, "bernoulli", "forward_kl", guidance=0.3)),
    ),
    "tropd joint sequence": (
        TrOPD(k=3, guidance=0.3, denominator="joint", reduce="sequence"),
        each(tropd(3, "bernoulli", "forward_kl", guidance=0.3), "sequence"),
    ),
    "tropd sequence": (
        TrOPD(k=3, guidance=0.3, reduce="sequence"),
        apart(tropd(3, "bernoulli", "forward_kl", guidance=0.3), "sequence"),
    ),
    "tropd clip sequence": (
        TrOPD(outlier="clip", floor=-0.7, guidance=0.3, reduce="sequence"),
        apart(tropd(3, "bernoulli", "clip", guidance=0.3), "sequence"),
    ),
    "eopd sequence": (EOPD(k=2, threshold=1.2, coef=0.5, reduce="sequence"), each(eopd(2, 1.2, 0.5, 0.2), "sequence")),
    "gkd sequence": (GKD(beta=0.3, reduce="sequence"), each(generalised_js(0.3), "sequence")),
    "topk sequence": (TopK(k=2, reduce="sequence"), each(top_k(2, "forward", "teacher", "bucket"), "sequence")),
    "tropd bucket": (
        TrOPD(k=2, tail="bucket", guidance=0.0),
        apart(tropd(2, "bernoulli", "forward_kl", tail="bucket")),
    ),
    "tropd bucket folded": (
        TrOPD(k=2, tail="bucket", outlier="scalar", guidance=0.0),
        apart(tropd(2, "bernoulli", "scalar", tail="bucket")),
    ),
    "topd": (TOPD(), each(own(lambda row: row.gradient(topd(row.d, 0.2))))),
    "topd sequence": (
        TOPD(mix=0.9, reduce="sequence"),
        each(own(lambda row: row.gradient(topd(row.d, 0.9))), "sequence"),
    ),
    "topk tail": (TopKTail(k=2), each(topk_tail(2))),
    "topk tail sequence": (TopKTail(k=1, reduce="sequence"), each(topk_tail(1), "sequence")),
    "ovd": (OVD(clip=0.1, kl_coef=0.2), each(ovd(0.1, 0.2))),
    "ovd without reference": (OVD(kl_coef=0.0), each(ovd(0.2, 0.0))),
    "grpo": (GRPO(), each(grpo())),
    "grpo sequence": (GRPO(length="sequence"), each(grpo(), "sequence")),
    "grpo constant": (GRPO(length="constant", max_tokens=9), each(grpo(), "constant", 9)),
    "grpo bounds": (GRPO(clip_low=0.05, clip_high=0.4), each(grpo(0.05, 0.4))),
    "grpo reference": (GRPO(kl_coef=0.3), each(grpo(kl=0.3))),
    "grpo reference constant": (
        GRPO(kl_coef=0.3, length="constant", max_tokens=9),
        each(grpo(kl=0.3), "constant", 9),
    ),
    "dr_grpo": (DrGRPO(max_tokens=11), each(grpo(), "constant", 11)),
    "dapo": (DAPO(), each(grpo(0.2, 0.28))),
    "grpo teacher": (GRPO(distil_coef=0.5), each(grpo(distil=0.5))),
    "grpo teacher sequence": (GRPO(distil_coef=0.5, length="sequence"), each(grpo(distil=0.5), "sequence")),
    "kdrl": (KDRL(beta=0.3), each(kdrl(0.3, skip=True))),
    "kdrl everywhere": (KDRL(beta=0.3, skip_correct=False), each(kdrl(0.3, skip=False))),
    "sft": (SFT(), each(lambda row: -row.logp[row.y])),
    "gkd forward": (GKD(beta=0.0), each(lambda row: row.forward_kl(V))),
    "gkd reverse": (GKD(beta=1.0), each(lambda row: row.reverse_kl(row.q))),
    "gkd mixed": (GKD(beta=0.3), each(generalised_js(0.3))),
    "phases first": (
        Phases(parts=[{"until": 0.5, "type": "sft"}, {"type": "gkd"}], num_steps=2),
        each(lambda row: -row.logp[row.y]),
    ),
}
for scale in (0.0, 0.5, 1.25):
    CASES[f"gopd {scale}"] = (GOPD(scale=scale), each(own(lambda row, s=scale: row.gradient(extrapolated(row, s)))))
    CASES[f"gopd sequence {scale}"] = (
        GOPD(scale=scale, reduce="sequence"),
        each(own(lambda row, s=scale: row.gradient(extrapolated(row, s))), "sequence"),
    )
    CASES[f"gopd full {scale}"] = (
        GOPD(scale=scale, form="full"),
        each(own(lambda row, s=scale: row.reverse_kl(power_mixture(row, s)))),
    )
    CASES[f"gopd full sequence {scale}"] = (
        GOPD(scale=scale, form="full", reduce="sequence"),
        each(own(lambda row, s=scale: row.reverse_kl(power_mixture(row, s))), "sequence"),
    )
for region, threshold in (("bernoulli", 1.0), ("ratio", 1.0), ("ratio", 0.4)):
    for outlier in ("forward_kl", "clip", "mask", "scalar"):
        for k in (2, V):
            CASES[f"tropd {region} {threshold} {outlier} {k}"] = (
                TrOPD(k=k, region=region, threshold=threshold, outlier=outlier, floor=-0.7, guidance=0.3),
                apart(tropd(k, region, outlier, threshold=threshold, guidance=0.3)),
            )
for direction in ("forward", "reverse"):
    for support in ("teacher", "student"):
        for tail in ("bucket", "none", "renormalise"):
            for k in (2, V):
                CASES[f"topk {direction} {support} {tail} {k}"] = (
                    TopK(k=k, direction=direction, support=support, tail=tail),
                    each(top_k(k, direction, support, tail)),
                )
CORRECTED = [
    *(
        "opd",
        "opd sequence",
        "opd discount",
        "opd baseline",
        "gopd 1.25",
        "eopd",
        "aopd",
        "reopold mixture",
        "reopold clip",
    ),
    *(f"tropd bernoulli 1.0 {outlier} 2" for outlier in ("forward_kl", "clip", "mask", "scalar")),
    *("ovd", "grpo reference", "grpo teacher", "dr_grpo", "dapo", "kdrl"),
]
"""Those with a policy gradient, which all take the weight for the engine's mismatch."""
CORRECTIONS: dict[str, Callable[[float], float]] = {
    "none": lambda gap: 1.0,
    "tis": lambda gap: min(gap, 1.2),
    "icepop": lambda gap: gap if 0.8 <= gap <= 1.2 else 0.0,
}
for name in CORRECTED:
    for kind in ("tis", "icepop"):
        method, formula = CASES[name]
        weighted = replace(method, correction=kind, correction_low=0.8, correction_high=1.2)  # type: ignore[call-arg]
        CASES[f"{name} {kind}"] = (weighted, formula)


def on_policy_only(world: Enumerated) -> Enumerated:
    """The student wrote every token."""
    rollout = torch.where(world.batch.on_policy, world.batch.rollout_logprob, world.batch.teacher_logprob)
    everything = torch.ones_like(world.batch.on_policy)
    return replace(world, batch=replace(world.batch, on_policy=everything, rollout_logprob=rollout))


def check(method: Method, formula: Formula, world: Enumerated) -> None:
    loss, gradient = world.evaluate(method)
    z = world.student.clone().requires_grad_()
    expected = formula(world.rows(z, CORRECTIONS[getattr(method, "correction", "none")]))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-11, atol=1e-13)
    wanted = torch.zeros_like(z)
    if expected.requires_grad:
        (wanted,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-13)


WORLDS = [Enumerated.make(seed, stale=seed % 2 == 1) for seed in range(4)]


@pytest.mark.parametrize(
    "name",
    CASES,
)
def test_loss_and_gradient_are_those_of_the_formula(name: str) -> None:
    for world in WORLDS:
        check(*CASES[name], world)


def test_the_worlds_reach_every_branch() -> None:
    """Without this the formulas could agree because nothing was clipped, floored, rejected or uncertain."""
    rows = [row for world in WORLDS[1::2] for row in world.rows(world.student)]
    ratio = [(math.exp(row.now - row.old), row.advantage, row.d) for row in rows]
    for sign in (1, -1):
        for number in (1, 2):
            there = [entry[0] for entry in ratio if entry[number] * sign > 0]
            assert {0.8 < r < 1.2 for r in there} == {True, False}
            assert min(there) < 0.8
            assert max(there) > 1.2
    assert {(row.gap > 0.8) + (row.gap > 1.2) for row in rows if row.own} == {0, 1, 2}
    assert {row.u < min(row.ratio_to_teacher, 1) for row in rows} == {True, False}
    assert any(0.4 <= row.ratio_to_teacher < 1 for row in rows)
    assert any(row.ratio_to_teacher < 0.4 for row in rows)
    assert {row.entropy_of_teacher() > 1.2 for row in rows} == {True, False}
    assert any(row.d < ODDS for row in rows)
    assert any(MIXTURE < row.d < -0.7 for row in rows)


@pytest.mark.parametrize("name", ["opd", "gopd 1.25", "reopold clip", "grpo", "tropd bernoulli 1.0 clip 2"])
def test_the_gradient_of_a_policy_term_is_the_advantage_times_the_score(name: str) -> None:
    """`-A_t grad log S(y_t)`: every row of the gradient is a multiple of `onehot(y) - S`, so A carries none itself."""
    world = on_policy_only(WORLDS[0])
    _, gradient = world.evaluate(CASES[name][0])
    seen = 0
    for t in world.batch.mask.nonzero().squeeze(-1).tolist():
        y = int(world.batch.target[t])
        score = torch.nn.functional.one_hot(world.batch.target[t], V) - world.student[t].softmax(-1)
        factor = float(gradient[t, y] / score[y])
        torch.testing.assert_close(gradient[t], factor * score, rtol=1e-10, atol=1e-14)
        seen += factor != 0
    assert seen > 5


@pytest.mark.parametrize(("step", "name"), [(0, "sft"), (4, "sft"), (5, "opd"), (9, "opd"), (50, "opd")])
def test_phases_compute_the_part_in_force(step: int, name: str) -> None:
    method = Phases(parts=[{"until": 0.5, "type": "sft"}, {"type": "opd"}], num_steps=10)
    for found, expected in zip(WORLDS[1].evaluate(method, step=step), WORLDS[1].evaluate(CASES[name][0]), strict=True):
        assert torch.equal(found, expected)
