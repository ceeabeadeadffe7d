"""Stateless random numbers: every draw is a function of (seed, stream, step, sample, position).

A resumed run, another batch order or another number of ranks draws the same numbers, because no generator has a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_U64 = NDArray[np.uint64]


def _mix(x: _U64) -> _U64:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64 bits that passes BigCrush on counters."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_name(name: str) -> int:
    """64 bits of a string, the same in every process."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def keyed_uniform(seed: int, stream: str, step: int, names: Sequence[str], num_positions: int) -> Tensor:
    """Uniform draws in [0, 1), float64 with 53 random bits. Shape [len(names), num_positions].

    `stream` separates the uses ("sample", "trust", ...), so that two uses never share a number.
    """
    with np.errstate(over="ignore"):
        root = _mix(np.array([hash_name(f"{seed}/{stream}/{step}")], dtype=np.uint64))
        keys = _mix(root ^ np.array([hash_name(name) for name in names], dtype=np.uint64))
        positions = _mix(np.arange(num_positions, dtype=np.uint64))
        bits = _mix(keys[:, None] ^ positions[None, :])
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def keyed_permutation(seed: int, stream: str, epoch: int, size: int) -> NDArray[np.int64]:
    """An order of `range(size)` that depends on nothing but its arguments. Shape [size]."""
    generator = np.random.Generator(np.random.Philox(key=hash_name(f"{seed}/{stream}/{epoch}")))
    return generator.permutation(size).astype(np.int64)
