"""Per-token losses, with gradient, as functions of the student's log-probabilities.

A loss reads `Rows`, never logits: the log-probabilities of the sampled token and of K given tokens, the mass outside
them, the entropy, or a divergence of the whole row. `linear/` has the logits: it fills the rows and carries the
gradients of these few numbers back to the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from understudy.lazy import Tensor, torch
from understudy.losses.divergences import MIN_LOG_RATIO, Direction, Tail, floor_excluded, topk_divergence

Reduce = Literal["token", "sequence", "constant"]
"""Mean over all tokens; mean per sample, then over samples; or sum per sample, then mean over samples."""
Over = Literal["trained", "own", "given"]


@dataclass(frozen=True)
class Reads:
    """Parts of a row that a method's losses read, besides the sampled token and the entropy."""

    topk: Literal["teacher", "student"] | None = None
    """The model whose top-K tokens are read: from the row with a full-vocabulary teacher, else from the batch."""
    k: int = 0
    tail: bool = False
    """The student's mass outside the K tokens."""
    divergence: float | None = None
    """`beta` of the generalised Jensen-Shannon divergence over the whole row; needs a full-vocabulary teacher."""
    extrapolate: float | None = None
    """The divergence is to the normalised `T^lam R^(1-lam)` instead of T; needs a full-vocabulary reference too."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The student's numbers for C tokens; every tensor carries gradient."""

    logprob: Tensor
    """[C] log S(y_t)."""
    entropy: Tensor
    """[C] nats."""
    topk_logp: Tensor | None = None
    """[C, K] log S at the K tokens, from the full softmax."""
    tail_logp: Tensor | None = None
    """[C] log of S's mass outside the K tokens; None where K = V."""
    divergence: Tensor | None = None
    """[C]"""


class Loss(Protocol):
    """A frozen dataclass whose tensors have one row per token; maps the `Rows` of these tokens to losses [C]."""

    def __call__(self, rows: Rows) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class PolicyGradient:
    """`-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`, `r = S / sg[S_old]`; without a clip `-r A`.

    At S = S_old the value is -A and the gradient `-A grad log S(y_t)`. `old_logprob=None`: S_old is the current S.
    Source: PPO, arXiv 1707.06347, eq. 7.
    """

    advantage: Tensor
    """[C]"""
    old_logprob: Tensor | None = None
    """[C]"""
    clip: tuple[float, float] | None = None
    baseline: bool = False
    """Add sg[KL(S || T)], the negative expectation of the log-ratio, to the advantage; reads the reverse divergence."""
    weight: Tensor | None = None
    """[C] without gradient: the importance weight of the engine's draw, `losses.advantages.importance`."""
    baseline_logp: Tensor | None = None
    """[C, K] log T: the baseline is summed over K tokens, `sg[sum_k S(k)(log S(k) - log T(k))]`, instead of all."""
    min_log_ratio: float = MIN_LOG_RATIO
    """log T - log S where T excludes one of the K tokens."""

    def __call__(self, rows: Rows) -> Tensor:
        old = rows.logprob.detach() if self.old_logprob is None else self.old_logprob
        ratio = torch.exp(rows.logprob - old)
        advantage = self.advantage
        if self.baseline:
            assert rows.divergence is not None
            advantage = advantage + rows.divergence.detach()
        if self.baseline_logp is not None:
            assert rows.topk_logp is not None
            logp = rows.topk_logp.detach()
            floored = floor_excluded(self.baseline_logp, logp, self.min_log_ratio)
            advantage = advantage + (logp.exp() * (logp - floored)).sum(-1)
        gain = ratio * advantage
        if self.clip is not None:
            low, high = self.clip
            gain = torch.minimum(gain, ratio.clamp(1.0 - low, 1.0 + high) * advantage)
        return -gain if self.weight is None else -gain * self.weight


@dataclass(frozen=True, eq=False)
class NLL:
    """`-log S(y_t)`."""

    def __call__(self, rows: Rows) -> Tensor:
        return -rows.logprob


@dataclass(frozen=True, eq=False)
class FullDivergence:
    """The divergence over the whole vocabulary that `Reads.divergence` names."""

    def __call__(self, rows: Rows) -> Tensor:
        assert rows.divergence is not None
        return rows.divergence


@dataclass(frozen=True, eq=False)
class TopKDivergence:
    """`divergences.topk_divergence` between T and S at the same K tokens."""

    teacher_logp: Tensor
    """[C, K]"""
    direction: Direction
    tail: Tail
    min_log_ratio: float = MIN_LOG_RATIO

    def __call__(self, rows: Rows) -> Tensor:
        assert rows.topk_logp is not None
        return topk_divergence(
            rows.topk_logp,
            self.teacher_logp,
            self.direction,
            self.tail,
            rows.tail_logp,
            min_log_ratio=self.min_log_ratio,
        )


@dataclass(frozen=True, eq=False)
class ExpectedLogRatio:
    """`sum_k S(k) sg[log S(k) - log T(k)]` at K tokens: their part of the reverse KL in value and in gradient.

    Differentiating the logarithm too adds `sum_k grad S(k)`, which is 0 only over the whole vocabulary: over K tokens it
    moves mass away from them even at S = T.
    """

    teacher_logp: Tensor
    """[C, K]"""
    min_log_ratio: float = MIN_LOG_RATIO

    def __call__(self, rows: Rows) -> Tensor:
        assert rows.topk_logp is not None
        logp = rows.topk_logp.detach()
        gap = logp - floor_excluded(self.teacher_logp, logp, self.min_log_ratio)
        return (rows.topk_logp.exp() * gap).sum(-1)


@dataclass(frozen=True, eq=False)
class FoldedTopK:
    """`-r_t A_t` with `A_t = -sg[KL(T || S)]` over the K tokens: a divergence folded into one number.

    An advantage that does not depend on the sampled token carries no teacher signal in expectation; it only makes
    sampled tokens less likely. Provided because released code reportedly does this.
    """

    teacher_logp: Tensor
    """[C, K]"""
    tail: Tail
    old_logprob: Tensor | None = None
    """[C]"""
    weight: Tensor | None = None
    """[C], see `PolicyGradient`."""

    def __call__(self, rows: Rows) -> Tensor:
        divergence = TopKDivergence(self.teacher_logp, "forward", self.tail)(rows).detach()
        return PolicyGradient(-divergence, self.old_logprob, weight=self.weight)(rows)


@dataclass(frozen=True, eq=False)
class SquaredLogRatio:
    """`(log T(y_t) - log S(y_t))^2 / 2`, whose gradient is OPD's, `-d_t grad log S(y_t)`; only its value differs."""

    teacher_logprob: Tensor
    """[C]"""

    def __call__(self, rows: Rows) -> Tensor:
        return 0.5 * (self.teacher_logprob - rows.logprob) ** 2


@dataclass(frozen=True, eq=False)
class ReferenceKL:
    """GRPO's estimate of `KL(S || R)`, `e^x - x - 1` with `x = log R(y_t) - log S(y_t)`: unbiased for y ~ S, never negative.

    Source: arXiv 2402.03300, eq. 4.
    """

    reference_logprob: Tensor
    """[C]"""

    def __call__(self, rows: Rows) -> Tensor:
        gap = self.reference_logprob - rows.logprob
        return torch.expm1(gap) - gap


@dataclass(frozen=True, eq=False)
class Term:
    """One summand of a method's loss: `coef * sum_t mask_t loss_t / (number of tokens that the mean is over)`.

    `reduce="sequence"` takes the mean per sample, then over the samples that have such tokens;
    "constant" averages each sample's sum over the samples.
    """

    name: str
    loss: Loss
    mask: Tensor | None = None
    """[T] bool, the tokens included; None: all trained ones."""
    over: Over = "trained"
    """The tokens that the mean is over: all trained ones, those that the student wrote, or the others."""
    per: Tensor | None = None
    """[T] bool, overrides `over` for batch-scope terms."""
    coef: float = 1.0
    reduce: Reduce = "token"
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Metrics per token, [T] each, averaged over trained tokens; NaN where undefined."""
