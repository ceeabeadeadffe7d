"""The decode loop: contexts in, sampled tokens out, with a key-value cache.

B rows (b of them still being written), C context tokens, left-padded, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any, Literal

from understudy.lazy import Tensor, nn, no_grad, torch
from understudy.linear.head import LMHead, project
from understudy.models.attention import has_segments, reading
from understudy.models.backbone import (
    TOLERANCE,
    backbone_hidden,
    decoder_of,
    num_positions,
    rope_switch,
    run_backbone,
    unwrap,
    vision_of,
)
from understudy.models.vision import in_dimensions
from understudy.packing import beginning, in_common
from understudy.types import Image, ImageSpan, Sampling, Segment

KEEP_SHARE = 0.75
"""Finished rows leave the cache when at most this share is still being written: the copy costs about one step."""
CHECK_EVERY = 8
"""Steps between checks for finished rows on an accelerator, which the host then waits for; 1 on a CPU."""
STOP_WINDOW = 64
"""Number of last tokens of a row that are searched for stop strings during generation."""
PROBED_TOKENS, PROBED_STEPS = 24, 8
"""Tokens of the context and of the response on which `cache_style` tries a model."""
LOGIT_ELEMENTS = 2**24
"""Logits that are drawn from at a time, 110 rows of the largest common vocabulary: 320 MiB with what a draw needs."""


CacheStyle = Literal["segments", "padded", "equal", "none"]
"""How contexts share a batch: side by side in one row, by segments, and the cache padded on the left; padded on the left from
the start; only with contexts of equal length, because padding would enter a state (recurrent layers) or the frequencies of
positions (LongRoPE); or read again for every token, by a model without a cache of the common kind."""


class Decoder:
    """A model, its head and the tokens that end a response, for one batch. Runs in whatever mode the model is in.

    `multiply`: the product of rows with the head's weight, in place of the plain one.
    """

    def __init__(
        self,
        model: nn.Module,
        head: LMHead,
        stop_ids: Sequence[int],
        autocast: torch.dtype | None = None,
        style: CacheStyle = "padded",
        multiply: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._model = model
        self._backbone = decoder_of(model)
        self._style = style
        self._switch = rope_switch(model)
        named = signature(self._backbone.forward).parameters
        self._cache_key = "cache_params" if "cache_params" in named else "past_key_values"
        self._head = head
        self._multiply = multiply
        self._device = head.weight.device
        self._stop = torch.tensor(sorted(stop_ids), device=self._device)
        self._autocast = autocast
        self._check_every = 1 if self._device.type == "cpu" else CHECK_EVERY
        self._cache: Any = None
        self._room = 0
        """Tokens of a row that the cache may come to hold."""
        self._mask: Tensor | None = None
        """[b, C + N] bool, False on padding; None if no row is padded."""
        self._positions = torch.empty(0)
        """[b, C + N] int64, 0 on padding; [1, C + N] if no row is padded."""
        """With images of a model with positions in three dimensions: [4, b, C + N]."""
        self._ids = torch.empty(0)
        """[b, n] int64, all tokens that the model has read, where they may be read again; else empty."""
        self._images: list[tuple[Image, ...]] = []
        """One entry a row; empty where no row has any."""
        self._padding: list[int] = []
        """Slots before each row's context."""
        self._length = 0
        """Tokens of a row that the model has read."""

    @no_grad
    def run(
        self,
        contexts: Sequence[Tensor],
        uniform: Tensor,
        room: Tensor,
        sampling: Sampling,
        ended: Callable[[int, list[int]], bool] | None = None,
        images: Sequence[tuple[Image, ...]] = (),
    ) -> list[tuple[list[int], list[float], bool]]:
        """Ids and log-probabilities of each row, and whether the last token ends the response; else the row is full.

        `ended`: whether the text of a row, given by its number, has ended with these tokens of it. Such a row stops early, and
        has tokens of no meaning behind its end: the caller cuts them.

        contexts: B of [c] int64; uniform [B, N] float64, one draw for each new token; room [B] int64, from 1 to N, the tokens
        that each row may have; images: those in each context, or none at all.
        """
        num_rows, num_new = uniform.shape
        uniform, room = uniform.to(self._device), room.to(self._device)
        rows = torch.arange(num_rows, device=self._device)
        ids = torch.zeros(num_rows, num_new, dtype=torch.int64, device=self._device)
        logprobs = torch.full((num_rows, num_new), float("nan"), dtype=torch.float64, device=self._device)
        # the last position that any row may use: a row that is full runs on for a while, and the model may have no more
        last = max(context.numel() + n for context, n in zip(contexts, room.tolist(), strict=True)) - 1
        hidden = self._prefill(contexts, num_new, last, images)
        done = torch.zeros_like(rows, dtype=torch.bool)
        draws = uniform.T.contiguous()
        for t in range(num_new):
            token, logprob = self._draw(hidden, draws[t], sampling)
            ids[rows, t], logprobs[rows, t] = token, logprob.double()
            done |= torch.isin(token, self._stop) | (room[rows] <= t + 1)
            if t + 1 == num_new:
                break
            if (t + 1) % self._check_every == 0:
                if ended is not None:
                    recent = ids[rows, max(0, t + 1 - STOP_WINDOW) : t + 1].tolist()
                    over = [
                        # the final cut searches the whole text
                        ended(row, part) and ended(row, ids[row, : t + 1].tolist())
                        for row, part in zip(rows.tolist(), recent, strict=True)
                    ]
                    done |= torch.tensor(over, device=self._device)
                num_left = rows.numel() - int(done.sum())
                if num_left == 0:
                    break
                if num_left <= KEEP_SHARE * rows.numel():
                    left = (~done).nonzero().squeeze(-1)
                    self._select(left)
                    rows, token, done = rows[left], token[left], done[left]
                    draws = uniform[rows].T.contiguous()
            hidden = self._forward(token[:, None])
        ends = torch.isin(ids, self._stop) & (torch.arange(num_new, device=self._device) < room[:, None])
        stopped = ends.any(-1)
        lengths = torch.where(stopped, ends.to(torch.uint8).argmax(-1) + 1, room).tolist()
        columns = zip(ids.tolist(), logprobs.tolist(), lengths, stopped.tolist(), strict=True)
        return [(tokens[:n], values[:n], end) for tokens, values, n, end in columns]

    def _draw(self, hidden: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """Logits in float32 (float64 for float64), whatever the model computes in. [b, H], [b] -> [b], [b]."""
        states = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        rows = max(1, LOGIT_ELEMENTS // self._head.num_tokens)
        parts = [
            draw(project(part, self._head, multiply=self._multiply), numbers, sampling)
            for part, numbers in zip(states.split(rows), uniform.split(rows), strict=True)
        ]
        return torch.cat([token for token, _ in parts]), torch.cat([logprob for _, logprob in parts])

    def _prefill(
        self, contexts: Sequence[Tensor], num_new: int, last: int, images: Sequence[tuple[Image, ...]] = ()
    ) -> Tensor:
        """Reads every distinct context once. The hidden states at the last tokens of all B rows. [B, H]."""
        images = images or [()] * len(contexts)
        names = [(context.numpy().tobytes(), shown) for context, shown in zip(contexts, images, strict=True)]
        distinct = dict(zip(names, contexts, strict=True))
        where = {name: index for index, name in enumerate(distinct)}
        lengths = torch.tensor([context.numel() for context in distinct.values()])
        width = int(lengths.max())
        column = torch.arange(width + num_new)
        real = column >= (width - lengths)[:, None]
        ids = torch.zeros(len(distinct), width, dtype=torch.int64)
        ids[real[:, :width]] = torch.cat(list(distinct.values()))
        positions = (column - (width - lengths)[:, None]).clamp(0, last)
        padded = not bool(real.all())
        self._room = width + num_new
        self._mask = real.to(self._device) if padded else None
        self._positions = (positions if padded else positions[:1]).to(self._device)
        self._length = 0
        self._ids = ids[:, :0].to(self._device)
        self._images, self._padding = [], []
        if any(images):
            self._images, self._padding = [shown for _, shown in distinct], (width - lengths).tolist()
            self._positions = self._positions_with_images(ids.to(self._device), positions.to(self._device))
        order = in_common(list(distinct.values())) if self._style == "segments" and not any(images) else []
        # contexts of one length that share no prefix are rows already, and need no copy into the cache's rows
        if order and (padded or any(common for _, common in order)):
            hidden = self._read_side_by_side(list(distinct.values()), order)
        else:
            hidden = self._forward(ids.to(self._device))
        select = torch.tensor([where[name] for name in names], device=self._device)
        if len(distinct) < len(contexts):
            self._select(select)
        return hidden[select]

    def _read_side_by_side(self, contexts: Sequence[Tensor], order: Sequence[tuple[int, int]]) -> Tensor:
        """Reads contexts in one row, without padding, and each shared prefix once (`order`: that of `in_common`). Returns the
        hidden states at their last tokens. [D, H]."""
        from understudy.engines.hf.kv_cache import new_cache

        segments = list[Segment]()
        spans: list[tuple[tuple[int, int], ...]] = [()] * len(contexts)
        ids, places, end, last = list[Tensor](), list[Tensor](), 0, 0
        for index, common in order:
            context = contexts[index]
            stop = end + len(context) - common
            segments.append(Segment(end, stop, beginning(spans[last], common)))
            spans[index] = (*segments[-1].before, (end, stop))
            ids.append(context[common:])
            places.append(torch.arange(common, len(context)))
            end, last = stop, index
        self._cache = new_cache(self._backbone.config, self._room, spans)
        with self._precision(), reading(segments):
            options = {"attention_mask": None, "use_cache": True, self._cache_key: self._cache}
            row, positions = (torch.cat(parts)[None].to(self._device) for parts in (ids, places))
            output = run_backbone(self._model, row, positions, **options)
        self._length = max(len(context) for context in contexts)
        hidden: Tensor = output.last_hidden_state
        return hidden[0, torch.tensor([context[-1][1] for context in spans], device=self._device) - 1]

    def _precision(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._autocast is None else torch.autocast(self._device.type, self._autocast)

    def _select(self, rows: Tensor) -> None:
        """Keeps these rows, in this order; a row may occur several times."""
        if self._cache is not None:
            self._cache.reorder_cache(rows)
        self._ids = self._ids[rows]
        if self._mask is not None:
            self._mask = self._mask[rows]
        # of one row they are those of all
        if self._positions.shape[-2] > 1:
            self._positions = self._positions[..., rows, :]
        if self._images:
            kept = rows.tolist()
            self._images, self._padding = [self._images[row] for row in kept], [self._padding[row] for row in kept]

    def _spans(self, width: int) -> list[ImageSpan]:
        """The rows with images, in rows of `width` slots that all end with a token."""
        return [
            ImageSpan(row * width + padding, width - padding, shown)
            for row, (shown, padding) in enumerate(zip(self._images, self._padding, strict=True))
            if shown
        ]

    def _positions_with_images(self, ids: Tensor, positions: Tensor) -> Tensor:
        """`positions` [D, C + N] of text, or [4, D, C + N] where the model counts images otherwise. ids: [D, C]."""
        base, width = unwrap(self._model), ids.shape[1]
        whole = in_dimensions(base.base_model, positions)
        if whole.dim() == 2:
            return whole
        vision = vision_of(self._model)
        assert vision is not None
        read = vision.inputs(base.base_model, ids, positions[:, :width], self._spans(width))["position_ids"]
        # new tokens are text: they go on after the highest position of their context
        behind = read[1:].amax((0, 2))[:, None] + 1 + torch.arange(positions.shape[1] - width, device=ids.device)
        whole[1:, :, :width], whole[1:, :, width:] = read[1:], behind
        return whole

    def _forward(self, ids: Tensor) -> Tensor:
        """Hidden states at the last of `ids` [b, n], which the cache then holds. [b, H]."""
        # late, because it imports transformers
        from understudy.engines.hf.kv_cache import new_cache

        end = self._length + ids.shape[1]
        if self._style in ("equal", "none"):
            ids = self._ids = torch.cat([self._ids, ids], 1)
        with self._precision():
            if self._style == "none":
                self._length = end
                places = torch.arange(end, device=self._device).expand_as(ids)
                return backbone_hidden(self._model, ids, places, self._spans(end))[:, -1]
            if self._length == 0 or (self._switch is not None and self._length <= self._switch < end):
                # also past the switch, where what the cache holds was read with other frequencies
                self._cache, self._length = new_cache(self._backbone.config, self._room), 0
            new, options = ids[:, -(end - self._length) :], {"use_cache": True, self._cache_key: self._cache}
            mask, positions = (
                None if self._mask is None else self._mask[:, :end],
                self._positions[..., self._length : end],
            )
            if self._length == 0 and self._images:
                # with its own positions, of which those of text are the first row
                text = positions[0] if positions.dim() == 3 else positions
                text = text.expand_as(new)
                output = run_backbone(self._model, new, text, self._spans(end), attention_mask=mask, **options)
            else:
                output = self._backbone(input_ids=new, position_ids=positions, attention_mask=mask, **options)
        self._length = end
        hidden: Tensor = output.last_hidden_state
        return hidden[:, -1]


@no_grad
def cache_style(model: nn.Module, head: LMHead) -> tuple[CacheStyle, str]:
    """Finds how contexts may share a batch of this model, and why not otherwise, by writing a few tokens behind two contexts
    and comparing them with each alone and without a cache. The contexts of a model that reads images begin with one."""
    device, switch, vision = head.weight.device, rope_switch(model), vision_of(model)
    shown: tuple[Image, ...] = ()
    before = torch.zeros(0, dtype=torch.int64)
    if vision is not None:
        shown = (vision.example(),)
        before = vision.read(shown[0]).ids
    limits = [one for one in (num_positions(model), switch) if one is not None]
    limits = [*(limit - len(before) for limit in limits), PROBED_TOKENS + PROBED_STEPS]
    # much padding, and several steps behind each other: what goes wrong in a state adds up
    num_steps = min(PROBED_STEPS, min(limits) // 2)
    num_read = min(limits) - num_steps
    ids = (7 * torch.arange(1, num_read + 2 * num_steps + 1)).remainder(head.num_tokens)
    if vision is not None:
        # no other token stands for an image
        taken = torch.tensor(vision.image_ids)
        ids = ids.where(~torch.isin(ids, taken), next(n for n in range(len(taken) + 1) if n not in vision.image_ids))
    steps = ids[: 2 * num_steps].view(2, -1)
    tries: tuple[tuple[CacheStyle, list[Tensor]], ...] = (
        ("segments", [ids[-num_read:], ids[:2]]),
        ("padded", [ids[-num_read:], ids[:2]]),
        ("equal", [ids[:num_read], ids[-num_read:]]),
    )
    reasons = []
    for style, contexts in tries:
        if style == "segments" and (vision is not None or not has_segments(model)):
            continue
        if style == "padded" and switch is not None:
            reasons.append("padding would change the frequencies of its positions")
            continue
        decoder = Decoder(model, head, (), style=style)
        contexts = [torch.cat([before, context]) for context in contexts]
        try:
            decoder._prefill(contexts, num_steps, len(before) + num_read + num_steps - 1, [shown] * len(contexts))
            decoder._select(torch.tensor([1, 0], device=device))
            found = torch.stack([decoder._forward(one[:, None]) for one in steps.to(device).T], 1)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # a model with a custom cache may raise anything
            if style != "segments":
                reasons.append(f"it does not run with a cache of the common kind ({type(error).__name__})")
            continue
        worst = 0.0
        for row, context, written in zip(found, contexts[::-1], steps, strict=True):
            whole = torch.cat([context, written])[None].to(device)
            spans = [ImageSpan(0, whole.shape[1], shown)] * bool(shown)
            places = torch.arange(whole.shape[1], device=device)[None]
            alone = backbone_hidden(model, whole, places, spans)[0, -num_steps:]
            worst = max(worst, float((row - alone).norm() / alone.norm().clamp_min(1e-30)))
        if worst <= TOLERANCE[str(found.dtype)]:
            return style, "; ".join(reasons)
        if style == "segments":
            continue
        kind = "padding changes what it computes" if style == "padded" else "with a cache it computes something else"
        reasons.append(f"{kind} (relative error {worst:.0e})")
    return "none", reasons[-1]


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling. logits [B, V] at the sampling temperature (at 1 for a greedy draw), uniform [B] float64.

    The token is the first one whose cumulative probability exceeds the uniform number; greedy: the most likely one.
    Its log-probability refers to the softmax of `logits`, unfiltered. -> ids [B], logprob [B] in the logits' type.
    A row with NaN or +inf gives some token, with log-probability NaN.
    """
    top = logits.amax(-1, keepdim=True)
    # in place: a second array of this size costs as much as the pass over it
    weight = (logits - top).exp_()
    if sampling.temperature == 0:
        ids, total = logits.argmax(-1, keepdim=True), weight.sum(-1, keepdim=True)
    elif sampling.filtered:
        total = weight.sum(-1, keepdim=True)
        kept, order = _filter(weight, sampling)
        ids = order.gather(-1, _invert(kept.cumsum(-1, dtype=torch.float64), uniform))
    else:
        # float64: a float32 sum over 150,000 tokens rounds the tail away
        cumulative = weight.cumsum(-1, dtype=torch.float64)
        ids, total = _invert(cumulative, uniform), cumulative[:, -1:]
    logprob = logits.gather(-1, ids) - top - total.log()
    return ids.squeeze(-1), logprob.squeeze(-1).to(logits.dtype)


def _invert(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds `uniform` times the total, so never one of weight 0. [B, 1].

    A uniform number below 1 times the total stays below the total in float64; only a row of NaN needs the clamp.
    """
    index = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return index.clamp_max_(cumulative.shape[-1] - 1)


def _filter(weight: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Weights in descending order with 0 for what is filtered out, and the ids in that order. [B, K] each.

    In the order of transformers: top-k, then top-p of what is left, then min-p; the most likely token always stays.
    """
    size = weight.shape[-1]
    kept, order = (
        weight.topk(min(sampling.top_k, size), dim=-1)
        if sampling.top_k > 0
        else weight.sort(dim=-1, descending=True, stable=True)
    )
    allowed = kept >= sampling.min_p * kept[:, :1]
    if sampling.top_p < 1.0:
        cumulative = kept.cumsum(-1, dtype=torch.float64)
        before = cumulative - kept
        allowed &= before < sampling.top_p * cumulative[:, -1:]
        allowed[:, 0] = True
    return kept.where(allowed, 0.0), order
