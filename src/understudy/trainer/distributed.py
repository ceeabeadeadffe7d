"""Ranks: sums, shares and splits between the processes of one run. One process is the special case of one rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from understudy.errors import TrainingError
from understudy.lazy import nn, torch
from understudy.types import Metric, add_metrics

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among `world` others. Every rank calls the collective methods in the same order."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def from_environment(choose_device: Callable[[], torch.device]) -> Ranks:
        """Joins the process group that `torchrun` announces, NCCL on GPUs and gloo on CPUs; one rank without it."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return Ranks()
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if choose_device().type == "cuda" else "gloo")
        return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())

    @staticmethod
    def announced() -> int:
        """This process's rank as `torchrun` announces it, known before the group is joined."""
        return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0

    @property
    def is_main(self) -> bool:
        """Whether this rank logs and writes files."""
        return self.rank == 0

    def mine(self, items: Sequence[Item]) -> list[Item]:
        """Returns this rank's part: every `world`-th item. Randomness is keyed by item, so the split changes no draw."""
        return list(items[self.rank :: self.world])

    def share(self, items: Sequence[Item], work: Callable[[list[Item]], Sequence[Result]]) -> list[Result]:
        """Does `work`, one result for each item, on this rank's part; returns the results of all ranks, in order of items."""
        part = self.mine(items)
        results: dict[int, Result] = {}
        for rank, done in enumerate(self.gather(list(work(part)) if part else [])):
            results |= zip(range(rank, len(items), self.world), done, strict=True)
        return [results[index] for index in range(len(items))]

    def gather(self, value: Item) -> list[Item]:
        """Returns the value of every rank, in their order."""
        if self.world == 1:
            return [value]
        # placeholders: every entry is replaced by that of its rank
        found = [value] * self.world
        torch.distributed.all_gather_object(found, value)
        return found

    def sum_counts(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Returns each count summed over all ranks."""
        total = self.sum_metrics({name: Metric(float(count), 1) for name, count in counts.items()})
        return {name: metric.total for name, metric in total.items()}

    def sum_metrics(self, metrics: Mapping[str, Metric]) -> dict[str, Metric]:
        """Sums totals and counts over all ranks, so that a mean is that of one process."""
        total: dict[str, Metric] = {}
        for part in self.gather(dict(metrics)):
            total = add_metrics(total, part)
        return total

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        return any(self.gather(flag))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sums gradients over ranks. The loss is normalised by counts of all ranks, so nothing is averaged."""
        if self.world == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                # a rank whose samples do not reach a parameter still takes part in the collective call
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raises TrainingError in place of what a backend says where another rank has ended or does not answer."""
        try:
            yield
        except RuntimeError as error:
            # gloo has no class of its own
            if self.world == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
                raise
            raise TrainingError(
                f"rank {self.rank} has lost another of the {self.world} processes of the run: it was killed, failed (see what "
                "it printed), or its machine does not answer. Continue with --resume"
            ) from error

    def close(self) -> None:
        """Leaves the process group; without it the threads of gloo may abort the process at its end."""
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.world > 1:
            torch.distributed.barrier()
