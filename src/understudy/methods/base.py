"""Base of all methods: a frozen dataclass that turns a batch of scored tokens into loss terms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_type_hints

from understudy.errors import check_range
from understudy.lazy import Tensor, torch
from understudy.losses import advantages
from understudy.losses.divergences import MIN_LOG_RATIO
from understudy.losses.terms import Over, PolicyGradient, Reads, Reduce, Term
from understudy.types import EXCLUDED, Need, TokenBatch

Scope = Literal["token", "batch"]
OnReject = Literal["teacher", "continue", "drop", "resample"]
RewardSource = Literal["outcome", "verbal"]
Prefix = Literal["share", "length"]


@dataclass(frozen=True)
class Range:
    """Inclusive bounds of a method's key: `k: Annotated[int, Range(1)] = 64`. None passes."""

    low: float
    high: float = float("inf")


Share = Annotated[float, Range(0.0, 1.0)]
NonNegative = Annotated[float, Range(0.0)]
PositiveInt = Annotated[int, Range(1)]


@dataclass(frozen=True)
class Rewards:
    """Gives each sample a reward, and an advantage relative to the other samples of its prompt."""

    source: RewardSource = "outcome"
    """The verifier's score, or the judge's digit over 9."""
    normalise_std: bool = True
    dynamic_sampling: bool = False
    """Replace prompts whose samples all get the same reward with further prompts."""
    overlong_buffer: int = 0
    """Number of tokens before the length limit over which a penalty grows to -1; 0: no penalty."""


@dataclass(frozen=True)
class Acceptance:
    """A judge's digit decides which samples are trained on."""

    threshold: float
    on_reject: OnReject
    score: Literal["argmax", "expectation"]
    steps: bool

    @property
    def by_teacher(self) -> bool:
        """Whether a teacher replaces or completes rejected samples."""
        return self.on_reject in ("teacher", "continue")


@dataclass(frozen=True)
class RolloutPlan:
    """Sources of one step's samples."""

    on_policy_share: float = 1.0
    """Share of samples that the student writes; the rest are responses from the data or the teacher."""
    prefix_share: float = 0.0
    """Length of the teacher prefix of guided samples, as a share; 0: no guided samples."""
    prefix: Prefix = "share"
    """The whole of which `prefix_share` is a share: the teacher's response, or "length", the length budget."""
    guided: Literal["beside", "replace"] = "beside"
    """One guided sample per prompt, in addition to the others or instead of one of them."""
    rewards: Rewards | None = None
    acceptance: Acceptance | None = None


@dataclass(frozen=True)
class Uses:
    """Everything that the plans of a run use at any step. Recipes are checked against it."""

    own_samples: bool = False
    """Samples that the student writes."""
    given_responses: bool = False
    """Whole responses that the student imitates but did not write."""
    prefixes: bool = False
    """Teacher responses as prefixes of samples."""
    fills_slots: bool = False
    """Teacher responses that replace rejected samples."""
    continues: bool = False
    """Teacher continuations of rejected samples."""
    judge: bool = False
    """A digit for each sample."""
    judges_steps: bool = False
    """A digit for each step of a sample."""
    rewards: frozenset[RewardSource] = frozenset()
    """Sources of rewards; with any, samples of the same prompt are compared."""

    @property
    def takes_responses(self) -> bool:
        """Whether the run uses responses that the student did not write."""
        return self.given_responses or self.prefixes or self.fills_slots


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods. A method's fields are the keys of its section in a recipe.

    `terms` sees no logits and computes no gradient: it reads the batch and returns which losses apply to which tokens.
    """

    def __post_init__(self) -> None:
        """Raises ValueError for a key outside its `Range`."""
        for key, hint in get_type_hints(type(self), include_extras=True).items():
            for bound in getattr(hint, "__metadata__", ()):
                if isinstance(bound, Range):
                    check_range(self, bound.low, key, high=bound.high)

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """Scores that the teacher, or the reference model, must return."""

    @property
    def requires(self) -> tuple[str, ...]:
        """Fields of the batch that must be present, and not NaN on trained tokens."""
        return ()

    @property
    def scope(self) -> Scope:
        """Scope of the terms: "token" computes them chunk by chunk, "batch" from the whole batch after a scoring pass."""
        return "token"

    @property
    def reads(self) -> Reads:
        """Returns the parts of the student's rows of logits that the losses read."""
        return Reads()

    @property
    def min_log_ratio(self) -> float | None:
        """Log-ratio of tokens that the teacher or the reference excludes; None: the method reads no scores."""
        return None

    @abstractmethod
    def terms(self, batch: TokenBatch, step: int) -> list[Term]:
        """The loss terms for the trained tokens in `batch`; `batch.student_logprob` is always present."""

    def plan(self, step: int) -> RolloutPlan:
        """How to sample at `step`."""
        return RolloutPlan()

    def uses(self, num_steps: int) -> Uses:
        """The union of `plan` over a run of that many steps.

        Checks every step, because a schedule may move from off-policy to on-policy, or back.
        """
        # a set: over most of a long run the plan is the same
        plans = {self.plan(step) for step in range(num_steps)}
        rules = [plan.acceptance for plan in plans if plan.acceptance is not None]
        return Uses(
            own_samples=any(plan.on_policy_share > 0 for plan in plans),
            given_responses=any(plan.on_policy_share < 1 for plan in plans),
            prefixes=any(plan.prefix_share > 0 for plan in plans),
            fills_slots=any(rule.by_teacher for rule in rules),
            continues=any(rule.on_reject == "continue" for rule in rules),
            judge=bool(rules),
            judges_steps=any(rule.steps for rule in rules),
            rewards=frozenset(plan.rewards.source for plan in plans if plan.rewards is not None),
        )

    def at(self, step: int) -> tuple[Method, int]:
        """The method active at a step of the run, and the step relative to that method's start."""
        return self, step

    @property
    def members(self) -> tuple[Method, ...]:
        """Every method that is active at some step."""
        return (self,)

    def for_run(self, num_steps: int, max_new_tokens: int) -> Method:
        """The method with keys that depend on the run filled in."""
        return self


@dataclass(frozen=True)
class ScoreMethod(Method):
    """A method that may compare the student with a teacher or a reference.

    Where either gives a token probability 0 (a score of -inf, a masked vocabulary, a served top-p), the log-ratio to the
    student is `min_log_ratio` in place of -inf, in every advantage and reverse divergence; the metric `teacher_excluded`
    counts such tokens among the student's.
    """

    min_log_ratio: Annotated[float, Range(EXCLUDED, 0.0)] = field(default=MIN_LOG_RATIO, kw_only=True)
    """log T - log S of a token that the teacher excludes, and log R - log S of one that the reference excludes."""


@dataclass(frozen=True)
class PolicyMethod(ScoreMethod):
    """A method with a policy-gradient term, corrected for an engine whose log-probabilities differ from the trainer's.

    `advantages.importance` defines the kinds; the metric `importance` reports the weight.
    """

    correction: advantages.Correction = field(default="none", kw_only=True)
    """Kind of importance weight for the gap between engine and trainer."""
    correction_low: NonNegative = field(default=0.5, kw_only=True)
    """Lower bound of "icepop"."""
    correction_high: float = field(default=5.0, kw_only=True)
    """"tis" truncates the weight here; "icepop" drops tokens outside [low, high]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.correction_low <= self.correction_high:
            raise ValueError(f"correction_low is {self.correction_low}; it must not exceed correction_high")

    @property
    def requires(self) -> tuple[str, ...]:
        """The fields implied by the correction, the scores and the plan."""
        fields = {
            "rollout_logprob": self.correction != "none",
            "teacher_logprob": not self.needs.isdisjoint({"sampled", "full"}),
            "reference_logprob": "reference" in self.needs,
            "outcome_advantage": self.plan(0).rewards is not None,
        }
        return tuple(name for name, is_required in fields.items() if is_required)

    def weight(self, batch: TokenBatch) -> Tensor | None:
        """Importance weight of each token for the gap between engine and trainer. [T]; None without a correction."""
        low, high = self.correction_low, self.correction_high
        old = present(batch.student_logprob)
        return advantages.importance(old, batch.rollout_logprob, batch.on_policy, self.correction, low, high)

    @property
    def ratio_clip(self) -> tuple[float, float] | None:
        """Distances below and above 1 at which the ratio to S_old is clipped; None: no clip."""
        return None

    def policy_term(
        self,
        batch: TokenBatch,
        advantage: Tensor,
        mask: Tensor | None,
        *,
        baseline: bool = False,
        baseline_logp: Tensor | None = None,
        reduce: Reduce = "token",
        over: Over = "trained",
        per: Tensor | None = None,
        metrics: dict[str, Tensor] | None = None,
    ) -> Term:
        """The term "policy_gradient" for `advantage` [T], with the importance weight."""
        old, weight = present(batch.student_logprob), self.weight(batch)
        shown = {} if weight is None else {"importance": only(weight, batch.on_policy)}
        loss = PolicyGradient(advantage, old, self.ratio_clip, baseline, weight, baseline_logp, self.min_log_ratio)
        shown |= metrics or {}
        return Term("policy_gradient", loss, mask=mask, over=over, per=per, reduce=reduce, metrics=shown)


@dataclass(frozen=True)
class ClippedMethod(PolicyMethod):
    """A policy gradient with PPO's clip, which has no effect in the first update of a batch; None: no clip."""

    clip: Annotated[float | None, Range(0.0)] = field(default=None, kw_only=True)
    """PPO's clip: the ratio to S_old is clipped to [1 - clip, 1 + clip]."""

    @property
    def ratio_clip(self) -> tuple[float, float] | None:
        return None if self.clip is None else (self.clip, self.clip)


def only(value: Tensor, mask: Tensor) -> Tensor:
    """The metric on the tokens in `mask`, NaN elsewhere."""
    return torch.where(mask, value, torch.nan)


def present(value: Tensor | None) -> Tensor:
    """The field, which `requires` has already checked."""
    assert value is not None
    return value
