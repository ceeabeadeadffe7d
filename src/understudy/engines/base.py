"""The interface of engines: requests in, samples out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from understudy.engines.probe import Probe
from understudy.types import Request, Sample, Sampling

Weights = Iterable[tuple[str, Tensor]]
"""Names and tensors, as in a state dict."""


class Generates(Protocol):
    """Anything that turns requests into samples."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, step: int, stream: str = "sample"
    ) -> list[Sample]:
        """One sample for each request, in their order. The same (stream, step, request) draws the same numbers."""
        ...


class Engine(Generates, Protocol):
    """An engine that writes responses with the student's weights."""

    @property
    def concurrency(self) -> int:
        """Calls of `generate` that may run at the same time, each in a thread of its own."""
        ...

    @property
    def num_positions(self) -> int | None:
        """Tokens of prompt and response together, where the engine has a limit beside the student's."""
        ...

    @property
    def remote(self) -> bool:
        """Whether it is servers that all ranks share: one rank pushes for all, and compares the weights by a probe."""
        ...

    def push(self, weights: Weights | None, version: int, probe: Probe | None = None) -> float | None:
        """New weights, after `version` optimizer updates; None where the engine shares the live model, or where another
        rank has pushed them. Returns the mean gap to the probe in nats; raises EngineError where it is too large."""
        ...

    def verify(self) -> None:
        """Raises WeightsLostError where an engine no longer has the weights of the last push: one that was started again."""
        ...

    def close(self) -> None:
        """Gives up what is in flight; nothing is left of threads, processes and connections."""
        ...
