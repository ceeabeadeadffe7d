"""Sampling with the live Hugging Face model: no second copy of the weights, nothing to push."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from understudy.engines.hf.assemble import prefix_length, to_samples
from understudy.engines.hf.decode import Decoded, Decoder
from understudy.engines.probe import Probe
from understudy.errors import DataError, RecipeError, TrainingError
from understudy.models import lm_head, unwrap
from understudy.models.backbone import evaluating
from understudy.randomness import keyed_uniform
from understudy.types import Request, Sample, Sampling

MAX_BATCH_TOKENS = 65_536
"""Slots of the key-value cache at a time: 64 responses of 1,024 tokens; 9 GiB for a 4B model in bfloat16."""


class HFEngine:
    """Batched sampling that shares the model with the trainer.

    A draw depends on (seed, stream, step, request, position), not on which requests share a batch; the logits do, by
    rounding errors. Token ids from `vocab_size` on are never sampled. The model is in evaluation mode meanwhile.
    """

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

    @property
    def concurrency(self) -> int:
        """One batch at a time."""
        return 1

    def verify(self) -> None:
        """The weights are the trainer's."""

    def close(self) -> None:
        """Nothing is open."""

    @property
    def num_positions(self) -> int | None:
        """The student's own."""
        return None

    @property
    def remote(self) -> bool:
        """The weights are the trainer's."""
        return False

    def push(self, weights: Iterable[tuple[str, Tensor]] | None, version: int, probe: Probe | None = None) -> None:
        """Notes the version; the weights are the live ones."""
        self._version = version

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, step: int, stream: str = "sample"
    ) -> list[Sample]:
        """One sample for each request, in their order.

        `sampling.max_new_tokens` is the length of a response, its prefix included. A greedy draw's log-probability is
        that at temperature 1. Raises DataError for an empty prompt and for a prefix that leaves no token to write,
        RecipeError for a response that would leave the model's positions, all before anything is sampled, and
        TrainingError for logits that are not finite.
        """
        contexts = [context_of(request) for request in requests]
        rooms = [room_of(request, sampling.max_new_tokens) for request in requests]
        self._check_positions(requests, sampling.max_new_tokens)
        head = lm_head(self._model, temperature=sampling.temperature or 1.0, vocab_size=self._vocab_size)
        decoder = Decoder(self._model, head, self._stop_ids, self._autocast)
        samples: dict[int, Sample] = {}
        lengths = [context.numel() for context in contexts]
        with evaluating(self._model):
            for group in plan_batches(lengths, sampling.max_new_tokens, self._max_batch_tokens):
                chosen = [requests[index] for index in group]
                room = torch.tensor([rooms[index] for index in group])
                uniform = self._uniform(chosen, room, sampling, step, stream)
                read = [contexts[index] for index in group]
                decoded = decoder.run(read, uniform, room, sampling)
                _refuse_nan(chosen, decoded)
                made = to_samples(chosen, read, decoded, self._tokenizer, self._version)
                samples.update(zip(group, made, strict=True))
        return [samples[index] for index in range(len(requests))]

    def _uniform(self, requests: Sequence[Request], room: Tensor, sampling: Sampling, step: int, stream: str) -> Tensor:
        """[B, N] float64, N the largest room. A position is that in the response: a prefix takes the first ones."""
        num_positions = sampling.max_new_tokens
        draws = keyed_uniform(self._seed, stream, step, [request.key for request in requests], num_positions)
        position = num_positions - room[:, None] + torch.arange(int(room.max()))
        # rows with less room never use what stands past their end
        return draws.gather(-1, position.clamp_max(num_positions - 1))

    def _check_positions(self, requests: Sequence[Request], max_new_tokens: int) -> None:
        limit = getattr(unwrap(self._model).config.get_text_config(), "max_position_embeddings", None)
        for request in requests:
            length = request.token_ids.numel()
            if limit is not None and length + max_new_tokens > limit:
                raise RecipeError(
                    f"request {request.key}: {length} prompt tokens and max_new_tokens {max_new_tokens} make "
                    f"{length + max_new_tokens}, but the student has {limit} positions (max_position_embeddings): "
                    "lower max_new_tokens or drop longer prompts"
                )


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


def _refuse_nan(requests: Sequence[Request], decoded: Decoded) -> None:
    written = torch.arange(decoded.ids.shape[1], device=decoded.ids.device) < decoded.length[:, None]
    broken = (decoded.logprob.isnan() & written).any(-1)
    if bool(broken.any()):
        raise TrainingError(
            f"request {requests[int(broken.nonzero()[0])].key} (and {int(broken.sum()) - 1} more): the student's logits are "
            "not finite, so its weights have diverged: go back to an earlier checkpoint and lower the learning rate"
        )


def context_of(request: Request) -> Tensor:
    """[P + F] int64 on the CPU."""
    if request.token_ids.numel() == 0:
        raise DataError(f"request {request.key} has no prompt token; a prompt needs at least one (a BOS will do)")
    if request.prefix_ids is None:
        return request.token_ids
    return torch.cat([request.token_ids, request.prefix_ids])


def room_of(request: Request, max_new_tokens: int) -> int:
    """Tokens that are left to the student."""
    room = max_new_tokens - prefix_length(request)
    if room < 1:
        raise DataError(
            f"request {request.key}: a prefix of {prefix_length(request)} tokens leaves nothing of max_new_tokens "
            f"{max_new_tokens} to the student; cut it (`rollout.prefix.cut_prefix`)"
        )
    return room
