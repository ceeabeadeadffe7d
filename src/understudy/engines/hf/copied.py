"""Sampling with weights of its own: a copy of the student that writes while the student learns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from threading import Lock

import torch
from torch import Tensor, nn

from understudy.engines.hf.engine import HFEngine
from understudy.engines.probe import Probe
from understudy.errors import EngineError
from understudy.types import Request, Sample, Sampling


class CopyEngine:
    """An `HFEngine` over a copy. A push waits for the batch that is being written: one batch has one version."""

    def __init__(self, model: nn.Module, open_engine: Callable[[nn.Module], HFEngine]) -> None:
        self._weights = dict(model.state_dict())
        self.engine = open_engine(model)
        self._lock = Lock()
        self._closed = False

    @property
    def concurrency(self) -> int:
        """One batch at a time."""
        return 1

    @property
    def num_positions(self) -> int | None:
        """The student's own."""
        return None

    @property
    def remote(self) -> bool:
        """A copy in memory arrives."""
        return False

    @torch.no_grad()
    def push(self, weights: Iterable[tuple[str, Tensor]] | None, version: int, probe: Probe | None = None) -> None:
        """Copies the weights, by the names of `state_dict`."""
        with self._lock:
            for name, value in weights or ():
                self._weights[name].copy_(value)
            self.engine.push(None, version)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, step: int, stream: str = "sample"
    ) -> list[Sample]:
        """As `HFEngine.generate`."""
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed")
            return self.engine.generate(requests, sampling, step=step, stream=stream)

    def verify(self) -> None:
        """A copy in memory stays."""

    def close(self) -> None:
        """Batches that wait for their turn are not written any more."""
        self._closed = True


__all__ = ["CopyEngine"]
