"""Sequences of prompts that are made when they are looked at, and the permutations that order them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

from understudy.randomness import hash_name, mix64
from understudy.types import Prompt

_ROUNDS = 4


@dataclass(frozen=True)
class LazyPrompts(Sequence[Prompt]):
    """`make(i)` for every i of `indices`; a slice is lazy too."""

    make: Callable[[int], Prompt]
    indices: range

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> LazyPrompts: ...
    def __getitem__(self, index: int | slice) -> Prompt | LazyPrompts:
        if isinstance(index, slice):
            return LazyPrompts(self.make, self.indices[index])
        return self.make(self.indices[index])


@dataclass(frozen=True)
class Permutation:
    """A bijection of `range(size)` that needs no memory: a Feistel network over the next even power of two.

    A value that falls outside the range is sent through the network again until it falls inside ("cycle walking"), less
    than four times on average. `name` is the key: another name, another order.
    """

    size: int
    name: str

    def __call__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is outside range({self.size})")
        half_bits, key = max(1, ((self.size - 1).bit_length() + 1) // 2), hash_name(self.name)
        mask = (1 << half_bits) - 1
        while True:
            left, right = index >> half_bits, index & mask
            for number in range(_ROUNDS):
                left, right = right, left ^ (mix64(key ^ (right << 8) ^ number) & mask)
            index = left << half_bits | right
            if index < self.size:
                return index
