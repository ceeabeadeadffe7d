"""Stateless random numbers: every draw is a function of (seed, stream, step, sample, position).

A resumed run, another batch order or another number of ranks draws the same numbers, because no generator has a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from understudy.lazy import Tensor, torch

_U64 = NDArray[np.uint64]
_MASK = (1 << 64) - 1


@overload
def mix64(x: int) -> int: ...
@overload
def mix64(x: _U64) -> _U64: ...
def mix64(x: Any) -> Any:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), a bijection of 64 bits that passes BigCrush on counters.

    Of an integer, or of each element of an array: arrays wrap around by themselves, Python's integers by the mask.
    """
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def hash_name(name: str) -> int:
    """64 bits of a string, the same in every process."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def keyed_uniform(seed: int, stream: str, step: int, names: Sequence[str], num_positions: int) -> Tensor:
    """Uniform draws in [0, 1), float64 with 53 random bits. Shape [len(names), num_positions].

    `stream` separates the uses ("sample", "trust", ...), so that two uses never share a number.
    """
    with np.errstate(over="ignore"):
        root = mix64(np.array([hash_name(f"{seed}/{stream}/{step}")], dtype=np.uint64))
        keys = mix64(root ^ np.array([hash_name(name) for name in names], dtype=np.uint64))
        positions = mix64(np.arange(num_positions, dtype=np.uint64))
        bits = mix64(keys[:, None] ^ positions[None, :])
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)
