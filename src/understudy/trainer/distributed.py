"""Ranks: sums, shares and splits between the processes of one run. One process is the special case of one rank."""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from understudy.errors import TrainingError
from understudy.lazy import nn, torch
from understudy.randomness import hash_name
from understudy.types import Metric, Sample, add_metrics, map_tensors

Item = TypeVar("Item")
Result = TypeVar("Result")
Size = tuple[int, int, int]
"""A sample's prompt, hashed, and the tokens of prompt and response."""


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
            # imported later, as torch._dynamo does, its default arguments would keep the group, and the threads of gloo
            # with it, beyond `close`
            importlib.import_module("torch.distributed.nn.functional")
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

    def exchange(self, parts: Sequence[Sequence[Item]]) -> list[Item]:
        """Sends `parts[rank]` to every rank; returns what the ranks have sent to this one, in their order."""
        sent = [pickle.dumps(list(part)) if part and rank != self.rank else b"" for rank, part in enumerate(parts)]
        sizes = self.gather([len(one) for one in sent])
        if any(map(any, sizes)):
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            payload = torch.frombuffer(bytearray(b"".join(sent)) or bytearray(1), dtype=torch.uint8).to(device)
            own = [size[self.rank] for size in sizes]
            received = torch.empty(sum(own), dtype=torch.uint8, device=device)
            outgoing = payload[: sum(sizes[self.rank])]
            torch.distributed.all_to_all_single(received, outgoing, own, sizes[self.rank])
            sent = [one.cpu().numpy().tobytes() for one in received.split(own)]
        found: list[Item] = []
        for rank, text in enumerate(sent):
            found += parts[rank] if rank == self.rank else pickle.loads(text) if text else []  # noqa: S301
        return found

    def divide(self, samples: Sequence[Sample], num_parts: int) -> list[list[Sample]]:
        """Returns this rank's samples of each of `num_parts` updates, which have as many each over all ranks, the samples of a
        prompt together. It makes no difference which ranks hold them."""
        if num_parts == 1:
            return [list(samples)]
        placed = self._in_parts(samples, num_parts)
        return [[samples[at] for rank, at, _ in part if rank == self.rank] for part in placed]

    def balance(self, samples: Sequence[Sample], num_parts: int = 1) -> list[Sample]:
        """Shares out the samples of all ranks anew, so that all have about as many tokens in each of `num_parts` updates.

        The samples of a prompt, which is computed once for them, stay together unless they have more than a rank's share.
        """
        if self.world == 1:
            return list(samples)
        owner: dict[int, int] = {}
        for part in self._in_parts(samples, num_parts):
            for to, units in enumerate(balanced([(sample, (rank, at)) for rank, at, sample in part], self.world)):
                owner |= {at: to for rank, at in units if rank == self.rank}
        parts: list[list[Sample]] = [[] for _ in range(self.world)]
        for at, sample in enumerate(samples):
            parts[owner[at]].append(sample if owner[at] == self.rank else _apart(sample))
        return self.exchange(parts)

    def _in_parts(self, samples: Sequence[Sample], num_parts: int) -> list[list[tuple[int, int, Size]]]:
        """The samples of all ranks in `num_parts` parts: rank, place on that rank, and size of each."""
        # a prompt may come twice under one name: rank and place tell the two apart
        own = [
            (hash_name(sample.prompt.id), sample.index, self.rank, at, sample.prompt_length, sample.num_response_tokens)
            for at, sample in enumerate(samples)
        ]
        everywhere = sorted(one for part in self.gather(own) for one in part)
        parts: list[list[tuple[int, int, Size]]] = [[] for _ in range(num_parts)]
        for place, (name, _, rank, at, prompt, response) in enumerate(everywhere):
            parts[place * num_parts // len(everywhere)].append((rank, at, (name, prompt, response)))
        return parts

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


def balanced(items: Sequence[tuple[Size, Item]], num_shares: int) -> list[list[Item]]:
    """Returns the items in shares of about as many tokens: the largest piece first, each to the share that has the least.

    A piece is all samples of a prompt, which counts once, or each of them alone where together they are more than a share. No
    share has more than the mean and one piece.
    """
    prompts: dict[int, list[tuple[Size, Item]]] = {}
    for size, item in items:
        prompts.setdefault(size[0], []).append((size, item))
    total = sum(group[0][0][1] + sum(size[2] for size, _ in group) for group in prompts.values())
    pieces: list[tuple[int, list[Item]]] = []
    for group in prompts.values():
        whole = group[0][0][1] + sum(size[2] for size, _ in group)
        if whole * num_shares <= total:
            pieces.append((whole, [item for _, item in group]))
        else:
            pieces += [(prompt + response, [item]) for (_, prompt, response), item in group]
    shares: list[list[Item]] = [[] for _ in range(num_shares)]
    loads = [0] * num_shares
    for tokens, members in sorted(pieces, key=lambda piece: -piece[0]):
        least = loads.index(min(loads))
        shares[least] += members
        loads[least] += tokens
    return shares


def _apart(sample: Sample) -> Sample:
    """The sample with memory of its own: a part of a tensor is sent with all of it."""
    scores: dict[str, Any] = {"scores": sample.scores, "reference_scores": sample.reference_scores}
    copies = {name: map_tensors(value, torch.clone) for name, value in scores.items() if value is not None}
    return replace(map_tensors(sample, torch.clone), **copies)
