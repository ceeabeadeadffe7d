"""Samples cut into requests to a served teacher, and its answers checked against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from understudy.http import BadReply
from understudy.packing import LOGPROB_TOLERANCE, Unscored
from understudy.teachers.remote.frames import MAX_SAMPLES, About, Answer, Ask, fields_of, row_bytes
from understudy.types import Sample, Scores

_HEADER_BYTES = 64 * 1024
"""Room in a request beside its ids."""
_ID_BYTES = torch.int32.itemsize
_NOT_FINITE = "is NaN or infinite; serve the teacher with another --dtype (bfloat16 or float32 for float16)"


@dataclass(frozen=True, eq=False, kw_only=True)
class Questions:
    """What is asked about some samples."""

    about: About
    samples: Sequence[Sample]
    need: frozenset[str]
    temperature: float
    vocab_size: int
    k: int | None = None
    ids: Sequence[Tensor] | None = None
    """[R, K] of each sample, of need "given"."""

    @property
    def num_given(self) -> int:
        """K of the given ids."""
        return 0 if not self.ids else int(self.ids[0].shape[1])

    @property
    def num_top(self) -> int:
        """Tokens of each top-K row."""
        return min(self.k or 0, self.vocab_size)

    def batches(self, max_tokens: int) -> list[list[int]]:
        """Indices asked for together, samples of one prompt side by side; a request and its reply are within the server's
        limits unless it is one sample alone."""
        limits = self.about.limits
        row = row_bytes(
            self.need,
            scores=getattr(torch, self.about.dtype),
            hidden=getattr(torch, self.about.hidden_dtype),
            hidden_size=self.about.hidden_size,
            num_top=self.num_top,
            num_given=self.num_given,
        )
        batches: list[list[int]] = []
        tokens = sent = received = 0
        for index in self._by_prompt():
            length, rows = self.samples[index].token_ids.numel(), self.samples[index].num_response_tokens
            tokens += length
            sent += (length + 2 + rows * self.num_given) * _ID_BYTES
            received += rows * row
            over = tokens > max_tokens or sent > limits.request_bytes - _HEADER_BYTES or received > limits.reply_bytes
            if not batches or over or len(batches[-1]) == MAX_SAMPLES:
                batches.append([])
                tokens, received = length, rows * row
                sent = (length + 2 + rows * self.num_given) * _ID_BYTES
            batches[-1].append(index)
        return batches

    def _by_prompt(self) -> list[int]:
        groups: dict[bytes, list[int]] = {}
        for index, sample in enumerate(self.samples):
            key = sample.token_ids[: sample.prompt_length].numpy().tobytes()
            groups.setdefault(key, []).append(index)
        return [index for group in groups.values() for index in group]

    def ask(self, batch: Sequence[int]) -> Ask:
        """The request for some of the samples."""
        samples = [self.samples[index] for index in batch]
        return Ask(
            tokens=torch.cat([sample.token_ids for sample in samples]).int(),
            lengths=torch.tensor([sample.token_ids.numel() for sample in samples], dtype=torch.int32),
            prompt_lengths=torch.tensor([sample.prompt_length for sample in samples], dtype=torch.int32),
            need=self.need,
            temperature=self.temperature,
            vocab_size=self.vocab_size,
            k=self.k,
            ids=None if self.ids is None else torch.cat([self.ids[index] for index in batch]).int(),
        )

    def read(self, answer: Answer, batch: Sequence[int]) -> list[Scores]:
        """Scores of the batch's samples; `Unscored` where any number of a sample is not finite.

        Raises BadReply, naming the sample, for scores of other ids, other fields or shapes, probabilities above 1, and a
        token twice in a row of the likeliest.
        """
        samples = [self.samples[index] for index in batch]
        self._check_shape(answer, samples)
        sizes = [sample.num_response_tokens for sample in samples]
        parts = {name: value.split(sizes) for name, value in answer.fields.items()}
        return [
            self._scores(sample, index, {name: part[place] for name, part in parts.items()})
            for place, (index, sample) in enumerate(zip(batch, samples, strict=True))
        ]

    def _check_shape(self, answer: Answer, samples: Sequence[Sample]) -> None:
        fields = fields_of(self.need)
        if answer.fields.keys() != fields:
            raise BadReply(f"a reply with {sorted(answer.fields)}, where {sorted(fields)} were asked for")
        expected = torch.cat([sample.response_ids for sample in samples])
        if len(answer.token_ids) != len(expected):
            raise BadReply(f"a reply of {len(answer.token_ids)} tokens, where {len(expected)} were asked for")
        start = 0
        for sample in samples:
            end = start + sample.num_response_tokens
            if not torch.equal(answer.token_ids[start:end].long(), sample.response_ids):
                raise BadReply(f"sample {sample.key}: scores of other tokens than were sent")
            start = end
        columns = {
            "topk_ids": self.num_top,
            "topk_logprob": self.num_top,
            "given_logprob": self.num_given,
            "hidden": self.about.hidden_size,
        }
        for name, value in answer.fields.items():
            if value.shape[1:] != ((columns[name],) if name in columns else ()):
                raise BadReply(f"a reply whose {name} has shape {tuple(value.shape)}")

    def _scores(self, sample: Sample, index: int, found: dict[str, Tensor]) -> Scores:
        for name in ("logprob", "topk_logprob", "given_logprob"):
            if name in found and bool((found[name] > LOGPROB_TOLERANCE).any()):
                raise BadReply(f"sample {sample.key}: {name} is above 0, so no log-probability")
        if "topk_ids" in found:
            found["topk_ids"] = found["topk_ids"].long()
            ranked = found["topk_ids"].sort(-1).values
            if bool((ranked[:, 1:] == ranked[:, :-1]).any()):
                raise BadReply(f"sample {sample.key}: topk_ids names a token twice")
            if ranked.numel() and not 0 <= int(ranked.min()) <= int(ranked.max()) < self.vocab_size:
                raise BadReply(f"sample {sample.key}: topk_ids names a token that does not exist")
        if "given_logprob" in found:
            assert self.ids is not None
            found = {"topk_ids": self.ids[index].long(), "topk_logprob": found["given_logprob"]}
        broken = sorted(name for name, value in found.items() if not bool(value.isfinite().all()))
        if not broken:
            return Scores(sample.response_ids, **found)
        empty = {name: torch.full_like(value, -1 if name == "topk_ids" else torch.nan) for name, value in found.items()}
        return Unscored(sample.response_ids, **empty, reason=f"sample {sample.key}: {broken[0]} {_NOT_FINITE}")
