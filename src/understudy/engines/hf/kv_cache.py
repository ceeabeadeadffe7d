"""The key-value cache that models of transformers write to, with room for the whole response from the start.

Apart from `decode`, because it imports transformers, which takes seconds.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, heads, n, D], n at most `room`, in one allocation: the base class copies everything at each token.

    `keys` and `values` are views of the filled part, which is all that readers of a layer expect.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._stores: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends [B, heads, m, D] each, and returns the filled part."""
        if self._stores is None:
            self.lazy_initialization(key_states, value_states)
            self._stores = self._empty_like(key_states), self._empty_like(value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self._stores[0][:, :, start:end] = key_states
        self._stores[1][:, :, start:end] = value_states
        self._fill(end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps the rows `beam_idx`, in this order; they may be fewer or more than before."""
        if self._stores is None:
            return
        end = self.get_seq_length()
        chosen = self.keys.index_select(0, beam_idx), self.values.index_select(0, beam_idx)
        self._stores = self._empty_like(chosen[0]), self._empty_like(chosen[1])
        for store, filled in zip(self._stores, chosen, strict=True):
            store[:, :, :end] = filled
        self._fill(end)

    def _empty_like(self, states: Tensor) -> Tensor:
        batch, heads, _, size = states.shape
        return states.new_empty(batch, heads, self._room, size)

    def _fill(self, end: int) -> None:
        assert self._stores is not None
        self.keys, self.values = self._stores[0][:, :, :end], self._stores[1][:, :, :end]


def new_cache(config: Any, room: int) -> DynamicCache:
    """A cache for `room` tokens. Plain attention layers get room for them; other kinds stay as transformers has them."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
