"""The student's weights on their way to the engine, and whether they arrived."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from understudy.engines import Engine, Probe
from understudy.errors import WeightsLostError
from understudy.linear import score
from understudy.models import lm_head
from understudy.models.backbone import evaluating
from understudy.trainer.distributed import Ranks
from understudy.trainer.update import StudentModel
from understudy.types import Sample

NUM_PROBED = 4
"""Sequences that engine and trainer are compared on after every push."""
PROBE_TOKENS = 256
"""Of each, from its start."""


@dataclass(frozen=True)
class Publisher:
    """Pushes the live weights; to servers that ranks share the first rank does."""

    engine: Engine
    student: StudentModel
    weights: Callable[[], Iterable[tuple[str, Tensor]]] | None
    """By the names that the engine reads; None where it shares the live model."""
    ranks: Ranks
    first: Sequence[Sample]
    """To be compared on before there are samples."""

    def __call__(self, version: int, samples: Sequence[Sample]) -> dict[str, float]:
        """`push_gap`: mean |log S_engine - log S_trainer|, nats, of servers. Raises EngineError where that is more than the
        precision explains, and WeightsLostError, on every rank, as `Engine.verify`."""
        if not self.engine.remote:
            self.engine.push(None if self.weights is None else self.weights(), version)
            return {}
        gap, lost = None, None
        if self.ranks.is_main:
            assert self.weights is not None
            try:
                gap = self.engine.push(self.weights(), version, probe_of(self.student, samples or self.first))
            except WeightsLostError as error:
                lost = error
        # every rank hears of it, so that all do what follows
        if self.ranks.any(lost is not None):
            raise lost or WeightsLostError("the rollout engine lost its weights, the first rank says")
        if not self.ranks.is_main:
            self.engine.push(None, version)
        return {} if gap is None else {"push_gap": gap}


@torch.no_grad()
def probe_of(student: StudentModel, samples: Sequence[Sample]) -> Probe:
    """What the live model says of some sequences, at temperature 1 and over all rows of its head."""
    # the shortest are cheap, and as telling as others
    chosen = sorted(samples, key=lambda sample: sample.token_ids.numel())[:NUM_PROBED]
    # one token as the prompt: every other one is scored
    cut = [replace(sample, token_ids=sample.token_ids[:PROBE_TOKENS], prompt_length=1) for sample in chosen]
    cut = [sample for sample in cut if sample.token_ids.numel() > 1]
    if not cut:
        return Probe((), ())
    target = torch.cat([sample.response_ids for sample in cut]).to(student.device)
    with evaluating(student.model):
        logprob, _ = score(student.hidden(student.lay_out(cut)), lm_head(student.model), target)
    sizes = [sample.num_response_tokens for sample in cut]
    return Probe(tuple(sample.token_ids for sample in cut), logprob.cpu().split(sizes))
