"""Pushes the student's weights to the engine, and checks that they arrived."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from understudy.engines import Engine, Probe
from understudy.errors import WeightsLostError
from understudy.lazy import Tensor, no_grad, torch
from understudy.linear import score
from understudy.models import lm_head
from understudy.models.backbone import evaluating
from understudy.trainer.distributed import Ranks
from understudy.trainer.observe import Clock
from understudy.trainer.update import StudentModel
from understudy.types import Sample

NUM_PROBED = 4
"""Sequences on which engine and trainer are compared after every push."""
PROBE_TOKENS = 256
"""Longest part of each, from its start."""


@dataclass(frozen=True)
class Publisher:
    """Pushes the live weights. Where ranks share servers, the first rank pushes for all."""

    engine: Engine
    student: StudentModel
    weights: Callable[[], Iterable[tuple[str, Tensor]]] | None
    """The weights by the names that the engine reads; None where it shares the live model."""
    ranks: Ranks
    first: Sequence[Sample]
    """Sequences to compare on before there are samples."""

    def __call__(self, version: int, samples: Sequence[Sample]) -> dict[str, float]:
        """Pushes; returns the seconds `push_s` where weights move, and for servers `push_gap`, the mean
        |log S_engine - log S_trainer| in nats.

        Raises EngineError where that is more than the precision explains, and WeightsLostError, on every rank, as
        `Engine.verify`.
        """
        if self.weights is None:
            self.engine.push(None, version)
            return {}
        clock = Clock(self.student.device)
        gap, lost = None, None
        with clock("push_s"):
            if not self.engine.remote:
                self.engine.push(self.weights(), version)
            elif self.ranks.is_main or self.student.is_sharded:
                # of shards all ranks read the weights and take part in the probe
                weights, probe = self.weights(), probe_of(self.student, samples or self.first)
                try:
                    gap = self.engine.push(weights, version, probe) if self.ranks.is_main else None
                except WeightsLostError as error:
                    lost = error
                # of shards all ranks gather each tensor, and the first may have stopped before the last
                for _ in weights:
                    pass
            # every rank raises, so that all of them heal together: the calls that follow are collective
            if self.engine.remote and self.ranks.any(lost is not None):
                raise lost or WeightsLostError("the rollout engine lost its weights, as the first rank reports")
            if self.engine.remote and not self.ranks.is_main:
                self.engine.push(None, version)
        return clock.seconds | ({} if gap is None else {"push_gap": gap})


@no_grad
def probe_of(student: StudentModel, samples: Sequence[Sample]) -> Probe:
    """Returns log-probabilities of the live model for some sequences, at temperature 1 and over all rows of its head."""
    # the shortest are cheap, and show a difference as well as others
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
