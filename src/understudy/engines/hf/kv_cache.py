"""The key-value cache that models of transformers write to, with room for the whole response from the start.

Apart from `decode`, because it imports transformers, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, heads, n, D], n at most `room`, in one allocation: the base class copies everything at each token.

    `keys` and `values` are views of the filled part, which is all that readers of a layer expect. `spans`: the first states are
    one row that holds B contexts, each in these pieces (first slot, end), which contexts may share. Each is copied to the
    end of a row as long as the longest, behind zeros.
    """

    def __init__(self, room: int, spans: Sequence[Sequence[tuple[int, int]]] = ()) -> None:
        super().__init__()
        self._room = room
        self._spans = spans
        self._stores: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends [B, heads, m, D] each, and returns the filled part; of contexts in one row, that row."""
        if not self._stores and self._spans:
            self.lazy_initialization(key_states, value_states)
            width = max(sum(stop - start for start, stop in context) for context in self._spans)
            for states in (key_states, value_states):
                _, heads, _, size = states.shape
                # zeros, because a masked NaN is a NaN still
                store = states.new_zeros(len(self._spans), heads, self._room, size)
                for row, context in zip(store, self._spans, strict=True):
                    end = width
                    for start, stop in reversed(context):
                        row[:, end - stop + start : end] = states[0, :, start:stop]
                        end -= stop - start
                self._stores.append(store)
            self.keys, self.values = (store[:, :, :width] for store in self._stores)
            return key_states, value_states
        if not self._stores:
            self.lazy_initialization(key_states, value_states)
            for states in (key_states, value_states):
                batch, heads, _, size = states.shape
                self._stores.append(states.new_empty(batch, heads, self._room, size))
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for store, states in zip(self._stores, (key_states, value_states), strict=True):
            store[:, :, start:end] = states
        self.keys, self.values = (store[:, :, :end] for store in self._stores)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps the rows `beam_idx`, in this order; they may be fewer or more than before."""
        if self._stores:
            end = self.get_seq_length()
            self._stores = [store.index_select(0, beam_idx) for store in self._stores]
            self.keys, self.values = (store[:, :, :end] for store in self._stores)


def new_cache(config: Any, room: int, spans: Sequence[Sequence[tuple[int, int]]] = ()) -> DynamicCache:
    """A cache for `room` tokens. Plain attention layers get room for them; other kinds stay as transformers has them.

    `spans` as for `RoomyLayer`. Raises NotImplementedError for them where some layers are of another kind.
    """
    cache = DynamicCache(config=config)
    if spans and any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise NotImplementedError("contexts in one row are for plain attention layers only")
    cache.layers = [RoomyLayer(room, spans) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
