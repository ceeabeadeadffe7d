"""Ranks: what is summed, shared and split between the processes of one run. One process is the special case of one rank."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from understudy.engines import Engine, Probe
from understudy.teachers import Judge
from understudy.teachers.base import ScoreForm
from understudy.types import Metric, Request, Sample, Sampling, Verdict

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process among `world` others. Every rank calls the collective methods in the same order."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def from_environment(device: torch.device) -> Ranks:
        """Joins the process group that `torchrun` announces, NCCL on GPUs and gloo on CPUs; one rank without it."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Ranks()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return Ranks(dist.get_rank(), dist.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks to people."""
        return self.rank == 0

    def mine(self, items: Sequence[Item]) -> list[Item]:
        """This rank's part: every `world`-th item. What is drawn for an item does not depend on who draws it."""
        return list(items[self.rank :: self.world])

    def gather(self, value: Item) -> list[Item]:
        """The value of every rank, in their order."""
        if self.world == 1:
            return [value]
        # every entry is replaced by that of its rank
        found = [value] * self.world
        dist.all_gather_object(found, value)
        return found

    def sum_counts(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Each count over all ranks."""
        total: dict[str, float] = {}
        for part in self.gather(dict(counts)):
            for name, count in part.items():
                total[name] = total.get(name, 0.0) + count
        return total

    def sum_metrics(self, metrics: Mapping[str, Metric]) -> dict[str, Metric]:
        """Totals and counts over all ranks, so that a mean is that of one process."""
        total: dict[str, Metric] = {}
        for part in self.gather(dict(metrics)):
            for name, metric in part.items():
                total[name] = total[name] + metric if name in total else metric
        return total

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        return any(self.gather(flag))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gradients become their sum over ranks: the loss is normalised by counts of all ranks, so nothing is averaged."""
        if self.world == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def close(self) -> None:
        """Leaves the process group; without it the threads of gloo may abort the process at its end."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.world > 1:
            dist.barrier()


def _copied(sample: Sample) -> Sample:
    tensors = ("token_ids", "author", "rollout_logprob", "policy_version")
    values = {name: getattr(sample, name) for name in tensors}
    return replace(sample, **{name: value.clone() for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class SharedJudge:
    """A judge for evaluation: each rank asks about its part, and every rank gets the same verdicts."""

    asked: Judge
    ranks: Ranks

    @property
    def name(self) -> str:
        """As `Judge.name`."""
        return self.asked.name

    @property
    def fingerprint(self) -> str:
        """As `Judge.fingerprint`."""
        return self.asked.fingerprint

    def close(self) -> None:
        """As `Judge.close`."""
        self.asked.close()

    def judge(self, samples: Sequence[Sample], *, score: ScoreForm = "argmax", steps: bool = False) -> list[Verdict]:
        """As `Judge.judge`."""
        part = self.ranks.mine(samples)
        verdicts: list[Verdict | None] = [None] * len(samples)
        for rank, found in enumerate(
            self.ranks.gather(self.asked.judge(part, score=score, steps=steps) if part else [])
        ):
            verdicts[rank :: self.ranks.world] = found
        return [verdict for verdict in verdicts if verdict is not None]


@dataclass(frozen=True)
class SharedEngine:
    """An engine for evaluation: each rank writes its part, and every rank gets all samples in the order of requests."""

    engine: Engine
    ranks: Ranks

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, step: int, stream: str = "sample"
    ) -> list[Sample]:
        """As `Engine.generate`."""
        if self.ranks.world == 1:
            return self.engine.generate(requests, sampling, step=step, stream=stream)
        part = self.ranks.mine(requests)
        written = self.engine.generate(part, sampling, step=step, stream=stream) if part else []
        samples: list[Sample | None] = [None] * len(requests)
        # copies: a view would be sent with all of the tensor that it is cut from
        for rank, found in enumerate(self.ranks.gather([_copied(sample) for sample in written])):
            samples[rank :: self.ranks.world] = found
        return [sample for sample in samples if sample is not None]

    @property
    def concurrency(self) -> int:
        """Ranks wait for each other."""
        return 1

    def verify(self) -> None:
        """As `Engine.verify`."""
        self.engine.verify()

    def close(self) -> None:
        """As `Engine.close`."""
        self.engine.close()

    @property
    def num_positions(self) -> int | None:
        """As `Engine.num_positions`."""
        return self.engine.num_positions

    @property
    def remote(self) -> bool:
        """As `Engine.remote`."""
        return self.engine.remote

    def push(
        self, weights: Iterable[tuple[str, Tensor]] | None, version: int, probe: Probe | None = None
    ) -> float | None:
        """As `Engine.push`."""
        return self.engine.push(weights, version, probe)
