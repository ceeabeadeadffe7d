"""Attention by segments: sequences in one row keep apart without a mask, so memory grows with tokens, not with their square.

transformers knows it by the name `NAME`. Its mask function passes the segments of the forward in place of a mask; its
attention function runs SDPA's causal kernel on one segment after the other. Without segments (a cache, padded rows, an image
encoder) both are those of "sdpa". It runs on a GPU too, where nobody has measured it yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

from understudy.lazy import Tensor, nn, torch
from understudy.types import Segment

NAME = "understudy_segments"
BLOCK = 512
"""Queries of one call where a window, or a prompt in other slots, needs a mask: it has this many rows."""
_UNKNOWN = ("softcap", "s_aux", "position_bias")
"""Arguments of attentions that change a score in ways that SDPA cannot: soft-caps, sinks, biases."""
_KEY = "_attn_implementation"
"""The attention of a model in its configuration."""
_segments: ContextVar[tuple[Segment, ...]] = ContextVar("segments", default=())


@dataclass(frozen=True)
class _Spans:
    """Stands in the place of a mask. Layers that are computed again in the backward pass get it again, as they do a mask."""

    segments: tuple[Segment, ...]
    window: int | None
    """Keys that a query sees, its own included; None: all before it."""


@contextmanager
def reading(segments: Sequence[Segment]) -> Iterator[None]:
    """Forwards inside read one row of these segments; none of them: rows as transformers reads them."""
    token = _segments.set(tuple(segments))
    try:
        yield
    finally:
        _segments.reset(token)


def use_segments(model: nn.Module, on: bool) -> None:
    """Switches a model that was loaded with SDPA to attention by segments, or back."""
    _register()
    # the model's own `set_attn_implementation` switches image encoders too, which have no segments
    setattr(_config(model), _KEY, NAME if on else "sdpa")


def has_segments(model: nn.Module) -> bool:
    """Whether the model is switched to attention by segments."""
    return getattr(_config(model), _KEY, None) == NAME


def attention_name(model: nn.Module) -> str | None:
    """The attention that the model was loaded with."""
    name = getattr(_config(model), _KEY, None)
    return "sdpa" if name == NAME else name


def _config(model: nn.Module) -> Any:
    get_base_model = getattr(model, "get_base_model", None)
    base: Any = get_base_model() if callable(get_base_model) else model
    return base.config.get_text_config()


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, **options: Any) -> Any:
        segments = _segments.get()
        if not segments:
            return sdpa_mask(*args, **options)
        window, config = options.get("local_size"), options["config"]
        if options.get("use_vmap") or window not in (None, getattr(config, "sliding_window", None)):
            raise NotImplementedError(
                f"{config.model_type} masks more than what follows a token and what a window ends"
            )
        return _Spans(segments, window)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> Any:
        if not isinstance(attention_mask, _Spans):
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        if unknown := [name for name in _UNKNOWN if options.get(name) is not None]:
            raise NotImplementedError(f"{type(module).__name__} has {unknown[0]}, which SDPA has not")
        return attend_segments(
            query, key, value, attention_mask, dropout=options.get("dropout", 0.0), scale=options.get("scaling")
        ), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def keep_uncompiled() -> None:
    """Compiled layers call attention by segments as it is: its loop would be compiled anew for each micro-batch's segments."""
    from transformers import AttentionInterface

    _register()
    AttentionInterface.register(NAME, torch.compiler.disable(AttentionInterface()[NAME]))


def attend_segments(
    query: Tensor, key: Tensor, value: Tensor, spans: _Spans, *, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """Causal attention within each segment and to the spans before it. The segments cover the T slots in their order.

    query [1, N, T, D]; key, value [1, N_kv, T, D] -> [1, T, N, D].
    """
    grouped, window = query.shape[1] != key.shape[1], spans.window
    # segments of one length that follow the same spans, or none, are the rows of one call
    runs = [list(run) for _, run in groupby(spans.segments, key=lambda one: (one.stop - one.start, one.before))]
    # split, because every slice of all slots would have a gradient over all slots
    sizes = [run[-1].stop - run[0].start for run in runs]
    pieces = list(zip(*(one.split(sizes, 2) for one in (query, key, value)), strict=True))
    run_at = {segment.start: number for number, run in enumerate(runs) for segment in run}
    parts = []
    for run, piece in zip(runs, pieces, strict=True):
        length = run[0].stop - run[0].start
        before = sum(stop - start for start, stop in run[0].before)
        plain = not before and (window is None or length <= window)
        queries, own_keys, own_values = piece
        if len(run) > 1:
            queries, own_keys, own_values = (
                one.squeeze(0).unflatten(1, (len(run), length)).transpose(0, 1) for one in piece
            )
        blocks = []
        for first in range(0, length, length if plain else BLOCK):
            last = length if plain else min(first + BLOCK, length)
            # the first position of a sequence that the first query still sees
            lowest = 0 if window is None else max(0, before + first + 1 - window)
            own = slice(max(0, lowest - before), last)
            keys, values = own_keys[:, :, own], own_values[:, :, own]
            if lowest < before:
                seen = []
                for start, *slots in _from_position(lowest, run[0].before):
                    number = run_at[start]
                    part = slice(*(slot - runs[number][0].start for slot in slots))
                    seen.append([one[:, :, part].expand(len(run), -1, -1, -1) for one in pieces[number][1:]])
                keys, values = (torch.cat(some, 2) for some in zip(*seen, (keys, values), strict=True))
            attended = nn.functional.scaled_dot_product_attention(
                queries[:, :, first:last],
                keys,
                values,
                attn_mask=None if plain else _band(last - first, keys.shape[2], window, query.device),
                is_causal=plain,
                dropout_p=dropout,
                scale=scale,
                enable_gqa=grouped,
            )
            blocks.append(attended.transpose(1, 2))
        parts += blocks if len(run) == 1 else [torch.cat(blocks, 1).flatten(0, 1)[None]]
    return torch.cat(parts, 1)


def _from_position(lowest: int, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Yields its first slot, its first slot from position `lowest` on, and its end for each span that reaches beyond that."""
    position = 0
    for start, stop in spans:
        if (first := start + max(0, lowest - position)) < stop:
            yield start, first, stop
        position += stop - start


def _band(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Whether a query sees a key, where the last query and the last key are one token. [Q, K] bool."""
    last = num_keys - num_queries
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(last)
    return seen if window is None else seen.triu(last + 1 - window)
