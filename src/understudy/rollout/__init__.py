"""Where samples come from: requests in, samples out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from understudy.types import Request, Sample, Sampling

from .hf import HFSampler

Weights = Iterable[tuple[str, Tensor]]
"""Names and tensors, as in a state dict."""


class Sampler(Protocol):
    """An engine that writes responses with the student's weights."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, step: int, stream: str = "sample"
    ) -> list[Sample]:
        """One sample for each request, in their order. The same (stream, step, request) draws the same numbers."""
        ...

    def push(self, weights: Weights | None, version: int) -> None:
        """New weights, after `version` optimizer updates; None where the sampler shares the live model."""
        ...


__all__ = ["HFSampler", "Sampler", "Weights"]
