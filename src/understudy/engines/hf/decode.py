"""The decode loop: contexts in, sampled tokens out, with a key-value cache.

B rows (b of them still writing), C context tokens, left-padded, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from understudy.engines.hf.draw import draw
from understudy.linear.head import LMHead
from understudy.linear.products import project
from understudy.models import unwrap
from understudy.types import Sampling

KEEP_SHARE = 0.75
"""Finished rows leave the cache when at most this share is still writing: the copy costs about one step."""
CHECK_EVERY = {"cpu": 1}
"""Steps between looks at which rows have finished; a look makes the host wait for an accelerator."""
CHECK_EVERY_ELSEWHERE = 8
LOGIT_ELEMENTS = 2**24
"""Logits that are drawn from at a time, 110 rows of the largest common vocabulary: 320 MiB with what a draw needs."""


@dataclass(frozen=True, eq=False)
class Decoded:
    """Sampled tokens; what follows a row's end is arbitrary."""

    ids: Tensor
    """[B, N] int64."""
    logprob: Tensor
    """[B, N]."""
    length: Tensor
    """[B] int64, tokens up to and including the one that ends the response."""
    stopped: Tensor
    """[B] bool, whether one does."""


class Decoder:
    """A model, its head and the tokens that end a response. Runs in whatever mode the model is in."""

    def __init__(
        self, model: nn.Module, head: LMHead, stop_ids: Sequence[int], autocast: torch.dtype | None = None
    ) -> None:
        self._backbone = unwrap(model).get_decoder()
        self._head = head
        self._device = head.weight.device
        self._stop = torch.tensor(sorted(stop_ids), device=self._device)
        self._autocast = autocast
        self._check_every = CHECK_EVERY.get(self._device.type, CHECK_EVERY_ELSEWHERE)

    @torch.no_grad()
    def run(self, contexts: Sequence[Tensor], uniform: Tensor, room: Tensor, sampling: Sampling) -> Decoded:
        """contexts: B of [c] int64; uniform [B, N] float64, one draw for each new token; room [B] int64, from 1 to N, how
        many tokens each row may write."""
        num_rows, num_new = uniform.shape
        uniform, room = uniform.to(self._device), room.to(self._device)
        rows = torch.arange(num_rows, device=self._device)
        written = _Written(num_rows, num_new, self._device)
        longest = max(context.numel() + n for context, n in zip(contexts, room.tolist(), strict=True))
        state, hidden = self._prefill(contexts, num_new, longest)
        done = torch.zeros_like(rows, dtype=torch.bool)
        draws = uniform.T.contiguous()
        for t in range(num_new):
            token, logprob = self._draw(hidden, draws[t], sampling)
            written.add(token, logprob)
            done |= torch.isin(token, self._stop) | (room[rows] <= t + 1)
            if t + 1 == num_new:
                break
            if (t + 1) % self._check_every == 0:
                num_left = rows.numel() - int(done.sum())
                if num_left == 0:
                    break
                if num_left <= KEEP_SHARE * rows.numel():
                    written.flush(rows)
                    left = (~done).nonzero().squeeze(-1)
                    state.select(left)
                    rows, token, done = rows[left], token[left], done[left]
                    draws = uniform[rows].T.contiguous()
            hidden = self._forward(state, token[:, None])
        written.flush(rows)
        return written.up_to_stop(self._stop, room)

    def _draw(self, hidden: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """Logits in float32 (float64 for float64), whatever the model computes in. [b, H], [b] -> [b], [b]."""
        states = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        rows = max(1, LOGIT_ELEMENTS // self._head.num_tokens)
        parts = [
            draw(project(part, self._head), numbers, sampling)
            for part, numbers in zip(states.split(rows), uniform.split(rows), strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([token for token, _ in parts]), torch.cat([logprob for _, logprob in parts])

    def _prefill(self, contexts: Sequence[Tensor], num_new: int, longest: int) -> tuple[_State, Tensor]:
        """Reads every distinct context once. The state of B rows, and the hidden states [B, H] at their last tokens.

        No position reaches `longest`: a row that has used up its room runs on for a while, and the model may have no more.
        """
        from understudy.engines.hf.kv_cache import new_cache

        names = [context.numpy().tobytes() for context in contexts]
        distinct = dict(zip(names, contexts, strict=True))
        where = {name: index for index, name in enumerate(distinct)}
        lengths = torch.tensor([context.numel() for context in distinct.values()])
        width = int(lengths.max())
        column = torch.arange(width + num_new)
        real = column >= (width - lengths)[:, None]
        ids = torch.zeros(len(distinct), width, dtype=torch.int64)
        ids[real[:, :width]] = torch.cat(list(distinct.values()))
        positions = (column - (width - lengths)[:, None]).clamp(0, longest - 1)
        padded = not bool(real.all())
        state = _State(
            cache=new_cache(self._backbone.config, width + num_new),
            mask=real.to(self._device) if padded else None,
            positions=(positions if padded else positions[:1]).to(self._device),
            length=0,
        )
        hidden = self._forward(state, ids.to(self._device))
        select = torch.tensor([where[name] for name in names], device=self._device)
        if len(distinct) < len(contexts):
            state.select(select)
        return state, hidden[select]

    def _forward(self, state: _State, ids: Tensor) -> Tensor:
        """Hidden states at the last of `ids` [b, n], which the state then holds. [b, H]."""
        end = state.length + ids.shape[1]
        with self._precision():
            output = self._backbone(
                input_ids=ids,
                position_ids=state.positions[:, state.length : end],
                attention_mask=None if state.mask is None else state.mask[:, :end],
                past_key_values=state.cache,
                use_cache=True,
            )
        state.length = end
        hidden: Tensor = output.last_hidden_state
        return hidden[:, -1]

    def _precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._autocast is None else torch.autocast(self._device.type, self._autocast)


@dataclass(eq=False)
class _State:
    """What the model has read so far of b rows."""

    cache: Any
    mask: Tensor | None
    """[b, C + N] bool, False on padding; None where no row is padded."""
    positions: Tensor
    """[b, C + N] int64, 0 on padding; [1, C + N] where no row is padded."""
    length: int

    def select(self, rows: Tensor) -> None:
        """Keeps these rows, in this order; a row may occur several times."""
        self.cache.reorder_cache(rows)
        if self.mask is not None:
            self.mask, self.positions = self.mask[rows], self.positions[rows]


class _Written:
    """Tokens and log-probabilities, gathered step by step for the rows that still write."""

    def __init__(self, num_rows: int, num_new: int, device: torch.device) -> None:
        self._ids = torch.zeros(num_rows, num_new, dtype=torch.int64, device=device)
        self._logprob = torch.full((num_rows, num_new), float("nan"), dtype=torch.float64, device=device)
        self._start = 0
        self._steps: list[tuple[Tensor, Tensor]] = []

    def add(self, token: Tensor, logprob: Tensor) -> None:
        """One step. [b], [b]."""
        self._steps.append((token, logprob))

    def flush(self, rows: Tensor) -> None:
        """Stores the steps since the last flush, during which `rows` [b] wrote."""
        part = slice(self._start, self._start + len(self._steps))
        self._ids[rows, part] = torch.stack([token for token, _ in self._steps], 1)
        self._logprob[rows, part] = torch.stack([value for _, value in self._steps], 1).double()
        self._start, self._steps = part.stop, []

    def up_to_stop(self, stop: Tensor, room: Tensor) -> Decoded:
        """A row that wrote no stop token in its room [B] filled it."""
        column = torch.arange(self._ids.shape[1], device=self._ids.device)
        ends = torch.isin(self._ids, stop) & (column < room[:, None])
        stopped = ends.any(-1)
        length = torch.where(stopped, ends.to(torch.uint8).argmax(-1) + 1, room)
        return Decoded(self._ids, self._logprob, length, stopped)
