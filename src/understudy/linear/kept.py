"""Numbers of single tokens for inspection, recorded by an evaluation without a further pass."""

from __future__ import annotations

from typing import Literal

from understudy.lazy import Tensor, torch

NUM_LIKELIEST = 5
"""Number of most likely tokens kept per row."""


class Kept:
    """The numbers of a batch's trained tokens; of those in `closely` [T] bool also the most likely tokens and ranks of
    both sides and the gradient of the logits.

    An evaluation fills it chunk by chunk; the loss and its gradient are bit-equal with and without it.
    """

    def __init__(self, closely: Tensor, foreign: Tensor | None = None) -> None:
        """`foreign`: ids left out of the most likely tokens, because they are not the student's tokens."""
        self._closely, self._foreign = closely, foreign
        self._parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._index = closely.new_zeros(0, dtype=torch.int64)

    def begin(self, index: Tensor) -> None:
        """The next chunk holds the rows at `index` [C] of the batch."""
        self._index = index

    def add(self, name: str, value: Tensor | None, mask: Tensor | None = None) -> None:
        """Records a number per row of the chunk [C], NaN outside `mask`; ignores None."""
        if value is not None:
            value = value.detach().float()
            shown = value if mask is None else torch.where(mask, value, torch.nan)
            self._parts.setdefault(name, []).append((self._index, shown))

    def read_row(
        self, whose: Literal["student", "teacher"], block: slice, z: Tensor, lse: Tensor, target: Tensor
    ) -> None:
        """The most likely tokens with their log-probabilities, and the rank of the target (1: the most likely).

        z [B, V] logits, lse [B], target [B] of the rows `block` of the chunk.
        """
        near = self._closely[self._index[block]].nonzero().squeeze(-1)
        index, z = self._index[block][near], z[near]
        named = z if self._foreign is None else z.index_fill(-1, self._foreign, -torch.inf)
        top = named.topk(min(NUM_LIKELIEST, z.shape[-1]))
        found = {
            "top": top.indices,
            "top_logprob": top.values - lse[near, None],
            "rank": (z > z.gather(-1, target[near, None])).sum(-1) + 1,
        }
        for name, value in found.items():
            self._parts.setdefault(f"{whose}_{name}", []).append((index, value))

    def read_gradient(self, dz: Tensor, target: Tensor) -> None:
        """Records `gradient`, the 2-norm of a row of d loss / d logits, and `push`, minus its entry at the target: above 0 the
        update makes the token more likely. [C, V], [C]."""
        near = self._closely[self._index].nonzero().squeeze(-1)
        index, dz = self._index[near], dz[near]
        push = -dz.gather(-1, target[near, None]).squeeze(-1)
        for name, value in (("gradient", dz.norm(dim=-1)), ("push", push)):
            self._parts.setdefault(name, []).append((index, value.float()))

    def columns(self) -> dict[str, Tensor]:
        """`{name: [T] or [T, K]}` on the CPU, NaN (-1 for ids and ranks) where nothing was recorded."""
        found = {}
        for name, parts in self._parts.items():
            index, value = (torch.cat(side).cpu() for side in zip(*parts, strict=True))
            absent = torch.nan if value.is_floating_point() else -1
            column = torch.full((len(self._closely), *value.shape[1:]), absent, dtype=value.dtype)
            column[index] = value
            found[name] = column
        return found
