"""Small worlds to test methods in: a vocabulary that can be enumerated, float64, every score that a method may ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from understudy.linear import Evaluation, LMHead, Slice, count_denominators, count_own, cut_terms, evaluate, score
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
from understudy.types import Metric, TokenBatch

CASES: dict[str, Method] = {
    "opd": OPD(),
    "opd discounted": OPD(discount=0.9),
    "opd with baseline": OPD(baseline=True),
    "opd with a baseline over k": OPD(baseline=True, baseline_k=3),
    "opd per sequence": OPD(reduce="sequence"),
    "gkd reverse": GKD(),
    "gkd forward": GKD(beta=0.0),
    "gkd mixed": GKD(beta=0.3),
    "sft": SFT(),
    "opd truncated importance": OPD(correction="tis", correction_high=1.1),
    "opd clipped": OPD(clip=0.2),
    "opd icepop": OPD(correction="icepop", correction_low=0.8, correction_high=1.3),
    "gopd": GOPD(),
    "gopd per sequence": GOPD(scale=0.5, reduce="sequence"),
    "gopd full": GOPD(form="full"),
    "gopd without reference": GOPD(scale=1.0),
    "reopold exploration": REOPOLD(switch_step=10),
    "reopold refinement": REOPOLD(switch_step=0),
    "reopold clip": REOPOLD(phases=False, floor=-0.5),
    "reopold odds": REOPOLD(switch_step=10, floor="odds", mix=0.4),
    "eopd": EOPD(k=3, threshold=1.2),
    "aopd": AOPD(k=3),
    "aopd mean over k": AOPD(k=3, mean_over_k=True, reduce="token"),
    "aopd bucket": AOPD(k=3, tail="bucket"),
    "tropd": TrOPD(k=3, guidance=0.1),
    "tropd bucket": TrOPD(k=3, tail="bucket"),
    "tropd ratio": TrOPD(k=3, region="ratio", threshold=0.5),
    "tropd clip": TrOPD(outlier="clip", floor=-0.5),
    "tropd mask": TrOPD(outlier="mask"),
    "tropd scalar": TrOPD(k=3, outlier="scalar"),
    "tropd also positive": TrOPD(k=3, also_positive=True, outlier="mask"),
    "tropd and aopd": TrOPD(k=3, also_positive=True, positive_threshold=-0.1),
    "tropd joint": TrOPD(k=3, guidance=0.1, denominator="joint"),
    "tropd per sequence": TrOPD(k=3, guidance=0.1, reduce="sequence"),
    "eopd per sequence": EOPD(k=3, threshold=1.2, reduce="sequence"),
    "reopold per sequence": REOPOLD(switch_step=0, reduce="sequence"),
    "gkd per sequence": GKD(reduce="sequence"),
    "topk per sequence": TopK(k=3, reduce="sequence"),
    "topd": TOPD(),
    "topd per sequence": TOPD(mix=0.7, reduce="sequence"),
    "topk tail": TopKTail(k=3),
    "topk tail per sequence": TopKTail(k=2, reduce="sequence", clip=0.2),
    "ovd": OVD(),
    "ovd without reference": OVD(kl_coef=0.0, reward="verbal"),
    "grpo": GRPO(),
    "grpo with reference": GRPO(kl_coef=0.1, length="sequence"),
    "grpo with teacher": GRPO(distil_coef=0.5),
    "dr_grpo": DrGRPO(max_tokens=20),
    "dapo": DAPO(),
    "kdrl": KDRL(beta=0.3),
    "kdrl everywhere": KDRL(beta=0.3, skip_correct=False),
    "phases": Phases(parts=[{"until": 0.5, "type": "aopd", "k": 3}, {"type": "opd"}], num_steps=2),
} | {
    f"topk {direction} {support} {tail}": TopK(k=3, direction=direction, support=support, tail=tail)
    for direction in ("forward", "reverse")
    for support in ("teacher", "student")
    for tail in ("bucket", "none", "renormalise")
}
"""Every method, in every form that differs in its formula. A new method adds its forms here and is tested."""

IMITATION_OR_REWARD = (SFT, GRPO, KDRL, OVD)
DISTILLATION = {name: method for name, method in CASES.items() if not isinstance(method, IMITATION_OR_REWARD)}
"""Those whose loss is nothing but the teacher's word on the student's tokens."""
TRUNCATED = {
    name
    for name, method in CASES.items()
    if not isinstance(method, TopKTail)
    and getattr(method.at(0)[0], "k", 7) < 7
    and getattr(method.at(0)[0], "tail", "none") == "none"
    and method.reads.topk
}
"""Forms that sum over fewer than all tokens without a bucket for the rest: no divergence, so not 0 at teacher = student."""


@dataclass(frozen=True)
class World:
    """T tokens over V entries; student, teacher and reference are (hidden, head) pairs."""

    batch: TokenBatch
    hidden: Tensor
    head: LMHead
    teacher: tuple[Tensor, LMHead]
    reference: tuple[Tensor, LMHead]

    @staticmethod
    def make(num_tokens: int = 12, vocabulary: int = 7, width: int = 5, seed: int = 0, **head: object) -> World:
        """Random models; two thirds of the tokens are trained. Every sample of four begins with a token of the teacher's."""
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        bias = normal(vocabulary) if head.pop("with_bias", False) else None
        target = torch.randint(0, int(head.get("vocab_size") or vocabulary), (num_tokens,), generator=draw)  # type: ignore[call-overload]
        student, teacher, reference = (LMHead(normal(vocabulary, width), bias, **head) for _ in range(3))  # type: ignore[arg-type]
        hidden, teacher_hidden, reference_hidden = (normal(num_tokens, width) for _ in range(3))
        sequence = torch.arange(num_tokens) // 4
        on_policy = torch.arange(num_tokens) % 4 != 0
        logp = student.logits(hidden).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
        advantage = normal(int(sequence.max()) + 1)[sequence]
        batch = TokenBatch(
            target=target,
            mask=torch.arange(num_tokens) % 3 != 1,
            on_policy=on_policy,
            sequence=sequence,
            # an engine whose numbers are a little off, and no number for what it did not sample
            rollout_logprob=torch.where(on_policy, logp + 0.3 * normal(num_tokens), torch.nan),
            uniform=torch.rand(num_tokens, generator=draw, dtype=torch.float64),
            outcome_advantage=advantage,
            correct=advantage > 0.5,
        )
        return World(batch, hidden, student, (teacher_hidden, teacher), (reference_hidden, reference))

    @property
    def teacher_logp(self) -> Tensor:
        return self.teacher[1].logits(self.teacher[0]).log_softmax(-1)

    @property
    def student_logp(self) -> Tensor:
        return self.head.logits(self.hidden).log_softmax(-1)

    def with_teacher_equal_to_student(self) -> World:
        """Teacher, reference and the engine's copy are the student, and it wrote every token."""
        batch = replace(
            self.batch, on_policy=torch.ones_like(self.batch.on_policy), rollout_logprob=self._at(self.student_logp)
        )
        return replace(self, batch=batch, teacher=(self.hidden, self.head), reference=(self.hidden, self.head))

    def _at(self, logp: Tensor) -> Tensor:
        return logp.gather(-1, self.batch.target[:, None]).squeeze(-1)

    def rows(self, index: Tensor) -> World:
        """The world of some tokens."""
        (states, head), (others, other_head) = self.teacher, self.reference
        return replace(
            self,
            batch=self.batch.rows(index),
            hidden=self.hidden[index],
            teacher=(states[index], head),
            reference=(others[index], other_head),
        )

    def cut(self, part: Slice, num_tokens: int) -> World:
        """The same with all heads cut to a part of the vocabulary."""
        (states, head), (others, other_head) = self.teacher, self.reference
        return replace(
            self,
            head=self.head.cut(part, num_tokens),
            teacher=(states, head.cut(part, num_tokens)),
            reference=(others, other_head.cut(part, num_tokens)),
        )

    def full(self, method: Method) -> dict[str, object]:
        """The models whose whole rows the method asks for, as `evaluate` takes them."""
        wants_reference = "full" in method.needs and "reference" in method.needs
        return {
            "teacher": self.teacher if "full" in method.needs else None,
            "reference": self.reference if wants_reference else None,
        }

    def judged(self, method: Method) -> TokenBatch:
        """The batch with what a teacher server would have sent for the method's needs."""
        logp = self.teacher_logp
        reference = self.reference[1].logits(self.reference[0]).log_softmax(-1)
        batch = replace(self.batch, teacher_logprob=self._at(logp), reference_logprob=self._at(reference))
        if "topk" in method.needs:
            top = logp.topk(min(method.reads.k, logp.shape[-1]))
            entropy = -(logp.exp() * logp).sum(-1)
            batch = replace(batch, topk_ids=top.indices, topk_logprob=top.values, teacher_entropy=entropy)
        return batch

    def in_parts(
        self, method: Method, parts: Sequence[Tensor], batch: TokenBatch | None = None
    ) -> tuple[list[TokenBatch], Sequence[object], dict[str, float]]:
        """As a step does it: micro-batches of the tokens at `parts`, what is evaluated of each, denominators of all."""
        batch = self.judged(method) if batch is None else batch
        pieces = [batch.rows(index) for index in parts]
        in_force, step = method.at(0)
        counts = count_denominators(pieces)
        methods: Sequence[object] = [in_force] * len(parts)
        if in_force.scope == "batch":
            # the scoring pass of a step
            at_target, entropy = score(self.hidden, self.head, self.batch.target)
            scored = replace(batch, student_logprob=at_target, student_entropy=entropy)
            if "full" in method.needs:
                scored = replace(scored, teacher_logprob=score(*self.teacher, self.batch.target)[0])
            pieces = [scored.rows(index) for index in parts]
            methods = cuts = cut_terms(in_force, pieces, step)
            counts |= count_own(pieces, cuts)
        return pieces, methods, counts

    def evaluate_in_parts(self, method: Method, parts: Sequence[Tensor], batch: TokenBatch | None = None) -> Outcome:
        """The same, with the gradients of all parts added up."""
        pieces, methods, counts = self.in_parts(method, parts, batch)
        d_hidden, found = torch.zeros_like(self.hidden), []
        for index, piece, method_here in zip(parts, pieces, methods, strict=True):
            world = self.rows(index)
            found.append(world.evaluate(method_here, batch=piece, counts=counts, **world.full(method)))  # type: ignore[arg-type]
            d_hidden[index] = found[-1].d_hidden
        bias = None if self.head.bias is None else torch.stack([part.d_bias for part in found]).sum(0)  # type: ignore[misc]
        metrics: dict[str, Metric] = {}
        for part in found:
            for name, metric in part.evaluation.metrics.items():
                metrics[name] = metrics[name] + metric if name in metrics else metric
        loss = torch.stack([part.loss for part in found]).sum()
        d_weight = torch.stack([part.d_weight for part in found]).sum(0)
        return Outcome(Evaluation(loss, metrics), loss, d_hidden, d_weight, bias)

    def evaluate(self, method: Method, run: Callable[..., Evaluation] = evaluate, **options: object) -> Outcome:
        """Loss, metrics and the gradients of hidden states, weight and bias."""
        batch = options.pop("batch") if "batch" in options else self.judged(method)
        options = options if "teacher" in options else self.full(method) | options
        hidden = self.hidden.clone().requires_grad_()
        bias = None if self.head.bias is None else self.head.bias.clone().requires_grad_()
        head = replace(self.head, weight=self.head.weight.clone().requires_grad_(), bias=bias)
        found = run(method, batch, hidden, head, **options)
        found.loss.backward()
        d_bias = None if bias is None else bias.grad
        return Outcome(found, found.loss.detach(), hidden.grad, head.weight.grad, d_bias)


@dataclass(frozen=True)
class Outcome:
    """What one evaluation gave."""

    evaluation: Evaluation
    loss: Tensor
    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor | None

    def same_as(self, other: Outcome, rtol: float = 1e-10, atol: float = 1e-12) -> None:
        """Asserts equal loss, gradients and metrics, up to float64 rounding."""
        close = {"rtol": rtol, "atol": atol}
        torch.testing.assert_close(self.loss, other.loss, **close)
        torch.testing.assert_close(self.d_hidden, other.d_hidden, **close)
        torch.testing.assert_close(self.d_weight, other.d_weight, **close)
        if self.d_bias is not None or other.d_bias is not None:
            torch.testing.assert_close(self.d_bias, other.d_bias, **close)
        ours, theirs = self.evaluation.metrics, other.evaluation.metrics
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].count == theirs[name].count, name
            assert abs(ours[name].total - theirs[name].total) <= atol + rtol * abs(theirs[name].total), name
