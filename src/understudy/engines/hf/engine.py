"""Sampling with a Hugging Face model in this process: the trainer's own, or a copy of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field
from threading import Lock
from typing import Any, ClassVar

from understudy.engines.base import Probe, Weights
from understudy.engines.hf.decode import CacheStyle, Decoder, cache_style
from understudy.engines.hf.packed import PACK_FROM, fast_products
from understudy.engines.requests import find_stop, open_responses, to_samples
from understudy.errors import EngineError, TrainingError
from understudy.lazy import nn, no_grad, torch
from understudy.models import lm_head
from understudy.models.backbone import decoder_of, evaluating, num_positions, unwrap
from understudy.randomness import keyed_uniform
from understudy.types import Request, Sample, Sampling

MAX_BATCH_TOKENS = 65_536
"""Slots of the key-value cache at a time: 64 responses of 1,024 tokens; 9 GiB for a 4B model in bfloat16."""


@dataclass(eq=False, repr=False)
class HFEngine:
    """Generates batches with a model. The live model needs no push; a copy is pushed to and can generate during an update.

    A draw depends on (seed, stream, step, request, position), not on which requests share a batch; the logits do, by
    rounding errors. Token ids from `vocab_size` on and those in `absent` are never sampled. The model is in evaluation
    mode meanwhile.
    """

    concurrency: ClassVar[int] = 1
    num_positions: ClassVar[int | None] = None
    remote: ClassVar[bool] = False

    model: nn.Module
    tokenizer: Any
    _: KW_ONLY
    seed: int
    stop_ids: tuple[int, ...]
    vocab_size: int
    absent: tuple[int, ...] = ()
    max_batch_tokens: int = MAX_BATCH_TOKENS
    autocast: torch.dtype | None = None
    dtype: torch.dtype | None = None
    """On a CPU the precision that linear layers multiply in; None: that of autocast, or of their weights."""
    style: tuple[CacheStyle, str] | None = field(default=None, init=False)
    """How contexts share a batch, and why not otherwise; None until the first one is written."""
    _version: int = field(default=0, init=False)
    _closed: bool = field(default=False, init=False)
    _lock: Lock = field(default_factory=Lock, init=False)
    """A push waits for the batch in progress, so that every batch has a single version."""

    @no_grad
    def push(self, weights: Weights | None, version: int, probe: Probe | None = None) -> None:
        """Copies the weights, by the names of `state_dict`; None where the model is the live one."""
        with self._lock:
            if weights is not None:
                own = self.model.state_dict()
                for name, value in weights:
                    own[name].copy_(value)
            self._version = version

    def verify(self) -> None:
        """Does nothing: weights in this process stay."""

    def sleep(self, *, asks: bool) -> bool:
        """Returns False: it uses the live model, or a copy that stays loaded."""
        return False

    def close(self) -> None:
        """Drops batches that are still waiting."""
        self._closed = True

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, step: int, stream: str = "sample"
    ) -> list[Sample]:
        """One sample for each request, in order.

        `sampling.max_new_tokens` is the length of a response, its prefix included. A greedy draw's log-probability is
        that at temperature 1. Raises DataError for an empty prompt and for a prefix that leaves no token to write,
        RecipeError for a response that would leave the model's positions, all before anything is sampled, and
        TrainingError for logits that are not finite.
        """
        limit, num_new = num_positions(self.model), sampling.max_new_tokens
        owner = f"the student has {limit} positions (max_position_embeddings)"
        responses = open_responses(requests, num_new, limit, owner)
        head = lm_head(
            self.model, temperature=sampling.temperature or 1.0, vocab_size=self.vocab_size, absent=self.absent
        )
        lengths = [len(response.context) for response in responses]
        with self._lock, evaluating(self.model), ExitStack() as around:
            if self._closed:
                raise EngineError("the engine is closed")
            self.style = self.style or cache_style(self.model, head)
            style, _ = self.style
            equal = style in ("equal", "none")
            multiply = None
            if num_new >= PACK_FROM:
                multiply = around.enter_context(fast_products(self.model, head, self.dtype, self.autocast))
            decoder = Decoder(self.model, head, self.stop_ids, self.autocast, style, multiply)
            groups = plan_batches(
                lengths, num_new, self.max_batch_tokens, max_padding=padding_worth_a_read(self.model), equal=equal
            )
            for group in groups:
                chosen = [responses[index] for index in group]
                contexts = [torch.tensor(response.context) for response in chosen]
                room = torch.tensor([response.room for response in chosen])
                names = [response.request.key for response in chosen]
                # a draw's position is that in the response: a prefix takes the first ones, and rows with less room never
                # use what stands past their end
                before = torch.tensor([len(one.context) - one.request.token_ids.numel() for one in chosen])
                position = (before[:, None] + torch.arange(int(room.max()))).clamp_max(num_new - 1)
                uniform = keyed_uniform(self.seed, stream, step, names, num_new).gather(-1, position)
                stops = [response.request.stop for response in chosen]

                def ended(row: int, ids: list[int], stops: list[tuple[str, ...]] = stops) -> bool:
                    return find_stop(ids, stops[row], self.tokenizer) is not None

                images = [response.request.prompt.images for response in chosen]
                written = decoder.run(contexts, uniform, room, sampling, ended if any(stops) else None, images)
                for response, row in zip(chosen, written, strict=True):
                    response.ids, response.logprob, stopped = row
                    response.version = [self._version] * len(response.ids)
                    if not response.cut(self.tokenizer):
                        response.finish = "stop" if stopped else "length"
                broken = [name for name, one in zip(names, chosen, strict=True) if any(map(math.isnan, one.logprob))]
                if broken:
                    raise TrainingError(
                        f"request {broken[0]} (and {len(broken) - 1} more): the student's logits are not finite, so its "
                        "weights have diverged: go back to an earlier checkpoint and lower the learning rate"
                    )
        return to_samples(responses, self.tokenizer)


def padding_worth_a_read(model: nn.Module) -> float:
    """Slots of keys and values that hold as many numbers as the decoder has weights. More padding costs more at every token
    than a group of its own, for which the weights are read again. Infinite for a model without attention heads."""
    config = unwrap(model).config.get_text_config()
    all_heads = getattr(config, "num_attention_heads", None)
    if not all_heads:
        return math.inf
    heads = getattr(config, "num_key_value_heads", None) or all_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // all_heads
    weights = sum(weight.numel() for weight in decoder_of(model).parameters())
    return float(weights / (2 * config.num_hidden_layers * heads * size))


def plan_batches(
    lengths: Sequence[int], num_new: int, max_tokens: int, *, max_padding: float = math.inf, equal: bool = False
) -> list[list[int]]:
    """Groups of indices, long contexts first, such that group size * (longest context + num_new) <= `max_tokens`.

    Neighbours in length go together, and a group is padded by at most `max_padding` slots, so one long context does not
    stretch many short ones; `equal`: only contexts of one length. A context beyond the budget gets a group of its own.
    """
    groups: list[list[int]] = []
    width = padding = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        short = width - lengths[index] - num_new
        full = not groups or (len(groups[-1]) + 1) * width > max_tokens or padding + short > max_padding
        if full or (equal and short):
            groups.append([])
            width, padding, short = lengths[index] + num_new, 0, 0
        padding += short
        groups[-1].append(index)
    return groups
