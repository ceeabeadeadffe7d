"""Phases: methods in sequence, each for a share of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from understudy import config
from understudy.errors import RecipeError
from understudy.losses.terms import Reads, Term
from understudy.methods.base import Method, RolloutPlan, Scope
from understudy.types import Need, TokenBatch


@dataclass(frozen=True)
class Phases(Method):
    """`parts: [{until: 0.6, type: tropd, ...}, {type: opd}]` is TrOPD for the first 60 % of the steps, then OPD.

    Each part has its own keys and counts steps from its own start, so its schedules fit its share.
    """

    parts: Sequence[Mapping[str, Any]]
    """Methods in order, each with `until`, the share of the run at which it ends."""
    num_steps: int | None = field(default=None, kw_only=True)
    """Number of steps that the shares refer to; None: the run's."""
    max_new_tokens: int | None = field(default=None, kw_only=True)
    """Length budget for parts that divide by it; None: the run's."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts is empty; give at least one method")
        ends = self._ends
        if ends[-1] != 1.0 or any(not one < other for one, other in pairwise([0.0, *ends])):
            raise ValueError(
                f"the parts end at {ends} of the run; `until` must grow from above 0 to 1 (the last part needs none)"
            )
        self.members  # noqa: B018 (raises for a part that is not a method or has no step)

    @property
    def _ends(self) -> list[float]:
        last = len(self.parts) - 1
        found = [part.get("until", 1.0 if index == last else None) for index, part in enumerate(self.parts)]
        if any(isinstance(end, bool) or not isinstance(end, int | float) for end in found):
            raise ValueError(f"the parts end at {found} of the run; every part but the last needs `until`, a share")
        return [float(end) for end in found if end is not None]

    @cached_property
    def starts(self) -> list[int] | None:
        """First step of each part, and the end; None without a run length. Raises ValueError for a part without a step."""
        if self.num_steps is None:
            return None
        starts = [0, *(round(end * self.num_steps) for end in self._ends)]
        sizes = [end - start for start, end in pairwise(starts)]
        if min(sizes) < 1:
            raise ValueError(f"of {self.num_steps} steps the parts get {sizes}; every part needs at least one")
        return starts

    @cached_property
    def members(self) -> tuple[Method, ...]:
        """The method of each part. Raises ValueError that names the part."""
        from understudy.methods import METHODS, REFUSED

        methods = config.Choice(METHODS, REFUSED | {"phases": "write all parts in one list"}, optional=False)
        made: list[Method] = []
        for index, part in enumerate(self.parts):
            keys = {key: value for key, value in part.items() if key != "until"}
            try:
                made.append(config.parse_choice(methods, keys, f"parts[{index}]"))
            except RecipeError as error:
                raise ValueError(str(error)) from error
        if self.starts is None or self.max_new_tokens is None:
            return tuple(made)
        sizes = (end - start for start, end in pairwise(self.starts))
        return tuple(part.for_run(size, self.max_new_tokens) for part, size in zip(made, sizes, strict=True))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset[Need]().union(*(part.needs for part in self.members))

    @property
    def scope(self) -> Scope:
        return self.at(0)[0].scope

    @property
    def requires(self) -> tuple[str, ...]:
        return self.at(0)[0].requires

    @property
    def min_log_ratio(self) -> float | None:
        return self.at(0)[0].min_log_ratio

    @property
    def reads(self) -> Reads:
        return self.at(0)[0].reads

    def plan(self, step: int) -> RolloutPlan:
        method, own_step = self.at(step)
        return method.plan(own_step)

    def at(self, step: int) -> tuple[Method, int]:
        if step == 0:
            return self.members[0].at(0)
        if self.starts is None:
            raise ValueError("the parts are shares of a run, but no run is known here; set num_steps")
        last = len(self.members) - 1
        index = next((i for i in range(last) if step < self.starts[i + 1]), last)
        return self.members[index].at(step - self.starts[index])

    def for_run(self, num_steps: int, max_new_tokens: int) -> Method:
        return replace(
            self,
            num_steps=num_steps if self.num_steps is None else self.num_steps,
            max_new_tokens=max_new_tokens if self.max_new_tokens is None else self.max_new_tokens,
        )

    def terms(self, batch: TokenBatch, step: int) -> list[Term]:
        method, own_step = self.at(step)
        return method.terms(batch, own_step)
