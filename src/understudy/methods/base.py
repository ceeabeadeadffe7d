"""What a method is: a frozen dataclass that turns a batch of judged tokens into terms of a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..losses import Reads, Reduce, Term
from ..types import Need, TokenBatch

Scope = Literal["token", "batch"]


@dataclass(frozen=True)
class RolloutPlan:
    """How the samples of one step come to be."""

    on_policy_share: float = 1.0
    """Share of the samples that the student writes; the rest are the data's or the teacher's own responses."""


@dataclass(frozen=True)
class Method:
    """Base of all methods. A method is its own section in a recipe: its fields are the keys.

    `terms` sees no logits and gives no gradient: it reads the batch and says which losses apply to which tokens.
    """

    requires: ClassVar[tuple[str, ...]] = ()
    """Fields of the batch that must be there and not NaN on trained tokens."""

    @property
    def needs(self) -> frozenset[Need]:
        """What the teacher must return."""
        raise NotImplementedError

    @property
    def scope(self) -> Scope:
        """Either "token", terms may be computed chunk by chunk, or "batch": they need the whole batch, after a scoring pass."""
        return "token"

    @property
    def reads(self) -> Reads:
        """What the losses read of the student's rows."""
        return Reads()

    def terms(self, batch: TokenBatch, step: int, rng: object = None) -> list[Term]:
        """The terms for the trained tokens in `batch`; `batch.student_logprob` is always there."""
        raise NotImplementedError

    def plan(self, step: int) -> RolloutPlan:
        """How to sample at `step`."""
        return RolloutPlan()

    def check_range(self, key: str, low: float, high: float = float("inf")) -> None:
        """Raises ValueError when the field `key` lies outside [low, high]."""
        value = getattr(self, key)
        if not low <= value <= high:
            raise ValueError(f"{key} is {value}; it must lie in [{low:g}, {high:g}]")


def present(value: Tensor | None) -> Tensor:
    """A field that `requires` has already asserted."""
    assert value is not None
    return value


__all__ = ["Method", "Reads", "Reduce", "RolloutPlan", "Scope", "Term", "present"]
