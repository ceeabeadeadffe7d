"""Sampling with a Hugging Face model in this process: the trainer's own, or a copy of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from understudy.engines.base import Probe, Weights
from understudy.engines.hf.decode import Decoder
from understudy.engines.requests import check_positions, open_responses, to_samples
from understudy.errors import EngineError, TrainingError
from understudy.models import lm_head
from understudy.models.backbone import evaluating, num_positions
from understudy.randomness import keyed_uniform
from understudy.types import Request, Sample, Sampling

MAX_BATCH_TOKENS = 65_536
"""Slots of the key-value cache at a time: 64 responses of 1,024 tokens; 9 GiB for a 4B model in bfloat16."""


class HFEngine:
    """Writes batches with a model: the live one needs no push, a copy gets its weights by one and can write beside an update.

    A draw depends on (seed, stream, step, request, position), not on which requests share a batch; the logits do, by
    rounding errors. Token ids from `vocab_size` on are never sampled. The model is in evaluation mode meanwhile.
    """

    concurrency: int = 1
    num_positions: int | None = None
    remote: bool = False

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        seed: int,
        stop_ids: tuple[int, ...],
        vocab_size: int,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        autocast: torch.dtype | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._seed = seed
        self._stop_ids = stop_ids
        self._vocab_size = vocab_size
        self._max_batch_tokens = max_batch_tokens
        self._autocast = autocast
        self._version = 0
        self._closed = False
        # a push waits for the batch that is being written, so that one batch has one version
        self._lock = Lock()

    @torch.no_grad()
    def push(self, weights: Weights | None, version: int, probe: Probe | None = None) -> None:
        """Copies the weights, by the names of `state_dict`; None where the model is the live one."""
        with self._lock:
            if weights is not None:
                own = self._model.state_dict()
                for name, value in weights:
                    own[name].copy_(value)
            self._version = version

    def verify(self) -> None:
        """Does nothing: weights in this process stay."""

    def close(self) -> None:
        """Batches that wait for their turn are not written any more."""
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
        responses = open_responses(requests, sampling.max_new_tokens)
        limit = num_positions(self._model)
        owner = f"the student has {limit} positions (max_position_embeddings)"
        check_positions(requests, sampling.max_new_tokens, limit, owner)
        head = lm_head(self._model, temperature=sampling.temperature or 1.0, vocab_size=self._vocab_size)
        decoder = Decoder(self._model, head, self._stop_ids, self._autocast)
        lengths = [len(response.context) for response in responses]
        with self._lock, evaluating(self._model):
            if self._closed:
                raise EngineError("the engine is closed")
            for group in plan_batches(lengths, sampling.max_new_tokens, self._max_batch_tokens):
                chosen = [responses[index] for index in group]
                contexts = [torch.tensor(response.context) for response in chosen]
                room = torch.tensor([response.room for response in chosen])
                uniform = self._uniform([response.request for response in chosen], room, sampling, step, stream)
                for response, row in zip(chosen, decoder.run(contexts, uniform, room, sampling), strict=True):
                    response.ids, response.logprob = row.ids.tolist(), row.logprob.tolist()
                    response.version = [self._version] * len(response.ids)
                    response.finish = "stop" if row.stopped else "length"
                broken = [response.request.key for response in chosen if any(map(math.isnan, response.logprob))]
                if broken:
                    raise TrainingError(
                        f"request {broken[0]} (and {len(broken) - 1} more): the student's logits are not finite, so its "
                        "weights have diverged: go back to an earlier checkpoint and lower the learning rate"
                    )
        return to_samples(responses, self._tokenizer)

    def _uniform(self, requests: Sequence[Request], room: Tensor, sampling: Sampling, step: int, stream: str) -> Tensor:
        """[B, N] float64, N the largest room. A position is that in the response: a prefix takes the first ones."""
        num_positions = sampling.max_new_tokens
        draws = keyed_uniform(self._seed, stream, step, [request.key for request in requests], num_positions)
        position = num_positions - room[:, None] + torch.arange(int(room.max()))
        # rows with less room never use what stands past their end
        return draws.gather(-1, position.clamp_max(num_positions - 1))


def plan_batches(lengths: Sequence[int], num_new: int, max_tokens: int) -> list[list[int]]:
    """Groups of indices, long contexts first, such that group size * (longest context + num_new) <= `max_tokens`.

    Neighbours in length go together, so little is padded. A context beyond the budget gets a group of its own.
    """
    groups: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if not groups or (len(groups[-1]) + 1) * width > max_tokens:
            groups.append([])
            width = lengths[index] + num_new
        groups[-1].append(index)
    return groups
