"""The columns of logits on a process: the whole vocabulary, or one slice per rank of a group.

With slices, every rank projects the rows of all ranks with its part of the head. Results are combined over ranks:
log-sum-exp, entropy and means from those of the slices, entries at given ids from the rank that has them, the K largest from
each slice's K largest. The losses see only the rank's own rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from understudy.lazy import Tensor, nn, torch

if TYPE_CHECKING:
    from understudy.linear.head import LMHead


@dataclass(frozen=True)
class Slice:
    """The position of a head's rows in a vocabulary sharded over the ranks of a group, in rank order.

    Every use of such a head is a collective call: all ranks make the same calls, each for its own rows.
    """

    start: int
    size: int
    """Tokens of the whole vocabulary."""
    group: Any
    """A process group of `torch.distributed`."""

    def gather(self, value: Tensor) -> Tensor:
        """The tensors of all ranks, of equal shape. [...] -> [G, ...]."""
        world = torch.distributed.get_world_size(self.group)
        found = value.new_empty(world * value.numel())
        # its name in this version of torch, and in older ones
        send = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
        send(found, value.contiguous().view(-1), group=self.group)
        return found.view(world, *value.shape)


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns and rows of one chunk of logits. Without a slice, nothing is sent."""

    size: int
    """Tokens of the whole vocabulary."""
    slice: Slice | None = None
    counts: tuple[int, ...] = ()
    """Number of rows of each rank in the chunk, in rank order."""

    def rows(self, value: Tensor) -> Tensor:
        """Gathers the chunk's rows from those of each rank. [own, ...] -> [C, ...]."""
        if self.slice is None:
            return value
        padded = value.new_zeros(max(self.counts), *value.shape[1:])
        padded[: len(value)] = value
        every = self.slice.gather(padded)
        return torch.cat([part[:count] for part, count in zip(every, self.counts, strict=True)])

    def own(self, value: Tensor) -> Tensor:
        """Selects this rank's rows of the chunk. [C, ...] -> [own, ...]."""
        if self.slice is None:
            return value
        rank = torch.distributed.get_rank(self.slice.group)
        start = sum(self.counts[:rank])
        return value[start : start + self.counts[rank]]

    def sum(self, value: Tensor) -> Tensor:
        """Sums over the columns of all ranks, from sums over the local ones, in place."""
        if self.slice is not None:
            torch.distributed.all_reduce(value, group=self.slice.group)
        return value

    def logsumexp(self, z: Tensor) -> Tensor:
        """[C, columns] -> [C]."""
        lse: Tensor = z.logsumexp(-1)
        if self.slice is not None:
            lse = self.slice.gather(lse).logsumexp(0)
        return lse

    def here(self, ids: Tensor, num_columns: int) -> tuple[Tensor, Tensor | None]:
        """The local columns of tokens, and a mask of the local ones (None: all); the others map to column 0."""
        if self.slice is None:
            return ids, None
        column = ids - self.slice.start
        inside = (column >= 0) & (column < num_columns)
        return torch.where(inside, column, 0), inside

    def at(self, z: Tensor, ids: Tensor) -> Tensor:
        """The entries at ids. [C, columns], [C, K] -> [C, K]."""
        return self.sum(self.at_here(z, ids))

    def at_here(self, z: Tensor, ids: Tensor) -> Tensor:
        """As `at`, with 0 for columns of other ranks."""
        column, inside = self.here(ids, z.shape[-1])
        found = z.gather(-1, column)
        return found if inside is None else torch.where(inside, found, 0.0)

    def add_at(self, z: Tensor, ids: Tensor, value: Tensor) -> None:
        """Adds to the entries at ids, in place."""
        column, inside = self.here(ids, z.shape[-1])
        z.scatter_add_(-1, column, value if inside is None else torch.where(inside, value, 0.0))

    def topk(self, z: Tensor, k: int) -> Tensor:
        """Ids of the K largest entries, in descending order. [C, columns] -> [C, K]."""
        if self.slice is None:
            return z.topk(min(k, z.shape[-1])).indices
        here = z.topk(min(k, z.shape[-1]))
        missing = (0, k - here.values.shape[-1])
        values = nn.functional.pad(here.values, missing, value=-torch.inf)
        ids = nn.functional.pad(here.indices + self.slice.start, missing)
        every, names = (self.slice.gather(one).transpose(0, 1).flatten(1) for one in (values, ids))
        return names.gather(-1, every.topk(min(k, self.size)).indices)


def chunks(head: LMHead, num_rows: int, size: int) -> Iterator[tuple[slice, Columns]]:
    """This rank's rows in chunks of at most `size` rows over all ranks, at least one row each. With slices all ranks get
    the same number of chunks, some without rows of their own."""
    if head.slice is None:
        for part in parts(num_rows, size):
            yield part, Columns(head.num_tokens)
        return
    numbers = head.slice.gather(torch.tensor(num_rows, device=head.weight.device)).tolist()
    for part in parts(max(numbers), max(1, size // len(numbers))):
        counts = tuple(max(0, min(part.stop, number) - part.start) for number in numbers)
        start = min(part.start, num_rows)
        yield slice(start, min(part.stop, num_rows)), Columns(head.slice.size, head.slice, counts)


def parts(size: int, step: int) -> Iterator[slice]:
    """`range(size)` in slices of at most `step`."""
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
