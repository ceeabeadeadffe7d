"""The interface of an engine, and the probe that compares its weights with the trainer's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from understudy.lazy import Tensor
from understudy.types import Request, Sample, Sampling

Weights = Iterable[tuple[str, Tensor]]
"""Names and tensors, as in a state dict."""


@dataclass(frozen=True, eq=False)
class Probe:
    """Sequences with the trainer's own log-probabilities, which an engine with the same weights has to reproduce.

    They are taken at temperature 1 over every row of the head, padding included.
    """

    token_ids: tuple[Tensor, ...]
    """[L] int64 each, L at least 2."""
    logprob: tuple[Tensor, ...]
    """[L - 1] each: of every token but the first, given those before it. NaN: not compared."""


class Generates(Protocol):
    """Turns requests into samples."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, step: int, stream: str = "sample"
    ) -> list[Sample]:
        """Returns one sample for each request, in order. The same (stream, step, request) draws the same numbers."""
        ...


class Engine(Generates, Protocol):
    """Writes responses with the student's weights."""

    @property
    def concurrency(self) -> int:
        """Calls of `generate` that may run at the same time, each in a thread of its own."""
        ...

    @property
    def num_positions(self) -> int | None:
        """The most tokens of prompt and response together; None where only the student's own limit applies."""
        ...

    @property
    def remote(self) -> bool:
        """Whether all ranks share its servers: one rank then pushes for all and compares the weights by a probe."""
        ...

    def push(self, weights: Weights | None, version: int, probe: Probe | None = None) -> float | None:
        """Gives it the weights after `version` optimizer updates; None where it shares the live model, or where another rank
        has pushed them. Returns the mean gap to the probe in nats; raises EngineError where that is too large."""
        ...

    def verify(self) -> None:
        """Raises WeightsLostError where an engine that was started again no longer has the weights of the last push."""
        ...

    def sleep(self, *, asks: bool) -> bool:
        """Returns whether it has no weights and no cache until the next push, and leaves their memory to the update. Every rank
        calls it when none is waiting for a sample; one alone `asks` the servers."""
        ...

    def close(self) -> None:
        """Cancels what is in flight, and leaves no thread, process or connection behind."""
        ...
