"""Small worlds to test methods in: a vocabulary that can be enumerated, float64, every score that a method may ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from understudy.linear import Evaluation, LMHead, evaluate
from understudy.methods import GKD, OPD, SFT, TopK
from understudy.methods.base import Method
from understudy.types import TokenBatch

CASES: dict[str, Method] = {
    "opd": OPD(),
    "opd discounted": OPD(discount=0.9),
    "opd with baseline": OPD(baseline=True),
    "opd per sequence": OPD(reduce="sequence"),
    "gkd reverse": GKD(),
    "gkd forward": GKD(beta=0.0),
    "gkd mixed": GKD(beta=0.3),
    "sft": SFT(),
} | {
    f"topk {direction} {support} {tail}": TopK(k=3, direction=direction, support=support, tail=tail)
    for direction in ("forward", "reverse")
    for support in ("teacher", "student")
    for tail in ("bucket", "none", "renormalise")
}
"""Every method, in every form that differs in its formula. A new method adds its forms here and is tested."""

DISTILLATION = {name: method for name, method in CASES.items() if not isinstance(method, SFT)}


@dataclass(frozen=True)
class World:
    """T tokens over V entries; student and teacher are (hidden, head) pairs."""

    batch: TokenBatch
    hidden: Tensor
    head: LMHead
    teacher: tuple[Tensor, LMHead]

    @staticmethod
    def make(num_tokens: int = 12, vocabulary: int = 7, width: int = 5, seed: int = 0, **head: object) -> World:
        """Random student and teacher; two thirds of the tokens are trained."""
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        bias = normal(vocabulary) if head.pop("with_bias", False) else None
        target = torch.randint(0, int(head.get("vocab_size") or vocabulary), (num_tokens,), generator=draw)  # type: ignore[call-overload]
        batch = TokenBatch(
            target=target,
            mask=torch.arange(num_tokens) % 3 != 1,
            on_policy=torch.ones(num_tokens, dtype=torch.bool),
            sequence=torch.arange(num_tokens) // 4,
        )
        student = LMHead(normal(vocabulary, width), bias, **head)  # type: ignore[arg-type]
        teacher = LMHead(normal(vocabulary, width), bias, **head)  # type: ignore[arg-type]
        return World(batch, normal(num_tokens, width), student, (normal(num_tokens, width), teacher))

    @property
    def teacher_logp(self) -> Tensor:
        return self.teacher[1].logits(self.teacher[0]).log_softmax(-1)

    @property
    def student_logp(self) -> Tensor:
        return self.head.logits(self.hidden).log_softmax(-1)

    def with_teacher_equal_to_student(self) -> World:
        return replace(self, teacher=(self.hidden, self.head))

    def judged(self, method: Method) -> TokenBatch:
        """The batch with what a teacher server would have sent for the method's needs."""
        logp = self.teacher_logp
        batch = replace(self.batch, teacher_logprob=logp.gather(-1, self.batch.target[:, None]).squeeze(-1))
        if "topk" in method.needs:
            top = logp.topk(min(method.reads.k, logp.shape[-1]))
            batch = replace(batch, topk_ids=top.indices, topk_logprob=top.values)
        return batch

    def evaluate(self, method: Method, run: Callable[..., Evaluation] = evaluate, **options: object) -> Outcome:
        """Loss, metrics and the gradients of hidden states, weight and bias."""
        batch = options.pop("batch") if "batch" in options else self.judged(method)
        teacher = options.pop("teacher", self.teacher if "full" in method.needs else None)
        hidden = self.hidden.clone().requires_grad_()
        bias = None if self.head.bias is None else self.head.bias.clone().requires_grad_()
        head = replace(self.head, weight=self.head.weight.clone().requires_grad_(), bias=bias)
        found = run(method, batch, hidden, head, teacher=teacher, **options)
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
