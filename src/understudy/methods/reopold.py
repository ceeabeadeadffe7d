"""REOPOLD: distillation as policy optimisation, with a reward floor and token selection.

Source: "Scaling Reasoning Efficiently via Relaxed On-Policy Distillation", arXiv 2603.11137.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from understudy.losses import advantages
from understudy.losses.terms import Reduce, Term
from understudy.methods.base import ClippedMethod, Method, Scope, Share, only, present
from understudy.types import Need, TokenBatch


@dataclass(frozen=True)
class REOPOLD(ClippedMethod):
    """`sum_t r_t max(R_t, f) M_t / sum_t M_t`, `R_t = sg[d_t]`: the mean is over the kept tokens.

    Exploration (before `switch_step`) keeps the tokens with `R_t >= f`; refinement keeps the `top_share` of the step's
    tokens whose student entropy is highest. `phases=False` keeps every token and only clips.
    """

    mix: float = 0.3
    """The paper's lambda, which sets the floor: 0.3 gives -1.72."""
    floor: Literal["mixture", "odds"] | float = "mixture"
    """"mixture": `log(mix)/(1-mix)`; "odds": `log(mix/(1-mix))`; or the floor f itself."""
    phases: bool = True
    """False: keep every token in every step."""
    switch_step: int | None = None
    """First step of refinement; None: half of the run."""
    top_share: Share = 0.2
    """Share of a step's tokens that refinement keeps."""
    reduce: Reduce = "token"
    """Mean over all kept tokens; or mean per sample, then over the samples that keep any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.mix < 1.0:
            raise ValueError(f"mix is {self.mix}; it must lie between 0 and 1; floor: -1.0e+9 is as good as no floor")
        if self.floor != self.floor:
            raise ValueError("floor is NaN; give a number, mixture or odds")

    needs = frozenset[Need]({"sampled"})

    @property
    def scope(self) -> Scope:
        return "batch" if self.phases else "token"

    @property
    def least_reward(self) -> float:
        """The floor f."""
        return advantages.mixture_floor(self.mix, self.floor) if isinstance(self.floor, str) else self.floor

    def for_run(self, num_steps: int, max_new_tokens: int) -> Method:
        return self if self.switch_step is not None else replace(self, switch_step=num_steps // 2)

    def explores(self, step: int) -> bool:
        """Whether the step is in the first phase. Raises ValueError if that depends on a run length that is not set."""
        if self.switch_step is None and step > 0:
            raise ValueError("switch_step is None (half of the run), but no run is known here; set switch_step")
        return self.switch_step is None or step < self.switch_step

    def terms(self, batch: TokenBatch, step: int) -> list[Term]:
        ratio = advantages.log_ratio(present(batch.teacher_logprob), present(batch.student_logprob))
        floor = self.least_reward
        floored = {"floored": only((ratio < floor).to(ratio.dtype), batch.on_policy)}
        reward = ratio.clamp_min(floor)
        if not self.phases:
            return [self.policy_term(batch, reward, batch.on_policy, reduce=self.reduce, metrics=floored)]
        trained = batch.mask & batch.on_policy
        if self.explores(step):
            kept = trained & (ratio >= floor)
        else:
            kept = advantages.top_share(present(batch.student_entropy), trained, self.top_share)
        shown = floored | {"kept": only(kept.to(ratio.dtype), batch.on_policy)}
        return [self.policy_term(batch, reward, kept, per=kept, reduce=self.reduce, metrics=shown)]
