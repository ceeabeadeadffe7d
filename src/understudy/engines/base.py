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
    """Sequences with the trainer's log-probabilities, which an engine with the same weights must reproduce.

    They are at temperature 1, over every row of the head, padding included.
    """

    token_ids: tuple[Tensor, ...]
    """[L] int64 each, L at least 2."""
    logprob: tuple[Tensor, ...]
    """[L - 1] each, of every token but the first. NaN: not compared."""


class Generates(Protocol):
    """Turns requests into samples."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, step: int, stream: str = "sample"
    ) -> list[Sample]:
        """Returns one sample per request, in order. (stream, step, request) seeds the draws."""
        ...


class Engine(Generates, Protocol):
    """Generates responses with the student's weights."""

    @property
    def concurrency(self) -> int:
        """Maximum concurrent calls of `generate`, each in its own thread."""
        ...

    @property
    def num_positions(self) -> int | None:
        """Maximum length of prompt plus response; None: only the student's own limit applies."""
        ...

    @property
    def remote(self) -> bool:
        """Whether all ranks share its servers: one rank then pushes for all and checks the weights with a probe."""
        ...

    def push(self, weights: Weights | None, version: int, probe: Probe | None = None) -> float | None:
        """Loads the weights after `version` optimizer updates; None if it shares the live model, or if another rank
        has pushed them. Returns the mean gap to the probe in nats; raises EngineError if it is too large."""
        ...

    def verify(self) -> None:
        """Raises WeightsLostError if a restarted engine no longer has the weights of the last push."""
        ...

    def sleep(self, *, asks: bool) -> bool:
        """Frees weights and cache until the next push; returns whether it did. Every rank calls it while no rank waits for
        a sample; only one `asks` the servers."""
        ...

    def close(self) -> None:
        """Cancels requests in flight and closes threads, processes and connections."""
        ...
