"""Samples cut into requests to a served teacher, and its replies checked against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from understudy.http import BadReply
from understudy.packing import LOGPROB_TOLERANCE, Unscored
from understudy.teachers.grouping import by_prompt
from understudy.teachers.remote.protocol import (
    MAX_SAMPLES,
    About,
    ScoreReply,
    ScoreRequest,
    fields_of,
    row_bytes,
)
from understudy.types import Sample, Scores

HEADER_BYTES = 64 * 1024
"""Room in a message beside its tensors."""


@dataclass(frozen=True, eq=False)
class ScoreBatches:
    """Samples that are scored together: cut into requests, and the replies checked against them."""

    about: About
    samples: Sequence[Sample]
    need: frozenset[str]
    temperature: float
    vocab_size: int
    k: int | None = None
    ids: Sequence[Tensor] | None = None
    """[R, K] of each sample, for need "given"."""

    @property
    def _columns(self) -> dict[str, int]:
        """Entries in a row of the fields that have two dimensions."""
        top, given = min(self.k or 0, self.vocab_size), 0 if not self.ids else int(self.ids[0].shape[1])
        hidden = self.about.hidden_size
        return {"topk_ids": top, "topk_logprob": top, "given_logprob": given, "hidden": hidden}

    def batches(self, max_tokens: int) -> list[list[int]]:
        """Returns indices for each request, samples of one prompt side by side. A request and its reply keep within the
        server's limits unless it is one sample alone."""
        limits, columns = self.about.limits, self._columns
        row = row_bytes(
            self.need,
            scores=getattr(torch, self.about.dtype),
            hidden=getattr(torch, self.about.hidden_dtype),
            hidden_size=self.about.hidden_size,
            num_top=columns["topk_ids"],
            num_given=columns["given_logprob"],
        )
        most = max_tokens, limits.request_bytes - HEADER_BYTES, limits.reply_bytes
        batches: list[list[int]] = []
        used = [0, 0, 0]
        for index in (index for same in by_prompt(self.samples) for index in same):
            length, rows = self.samples[index].token_ids.numel(), self.samples[index].num_response_tokens
            # tokens, bytes sent (ids, the two lengths, given ids), bytes received
            size = length, (length + 2 + rows * columns["given_logprob"]) * torch.int32.itemsize, rows * row
            used = [sum(pair) for pair in zip(used, size, strict=True)]
            if not batches or any(a > b for a, b in zip(used, most, strict=True)) or len(batches[-1]) == MAX_SAMPLES:
                batches.append([])
                used = list(size)
            batches[-1].append(index)
        return batches

    def request(self, batch: Sequence[int]) -> ScoreRequest:
        """Returns the request for some of the samples."""
        samples = [self.samples[index] for index in batch]
        return ScoreRequest(
            tokens=torch.cat([sample.token_ids for sample in samples]).int(),
            lengths=torch.tensor([sample.token_ids.numel() for sample in samples], dtype=torch.int32),
            prompt_lengths=torch.tensor([sample.prompt_length for sample in samples], dtype=torch.int32),
            need=self.need,
            temperature=self.temperature,
            vocab_size=self.vocab_size,
            k=self.k,
            ids=None if self.ids is None else torch.cat([self.ids[index] for index in batch]).int(),
        )

    def read(self, reply: ScoreReply, batch: Sequence[int]) -> list[Scores]:
        """Returns scores of the batch's samples; `Unscored` if any number of a sample is not finite.

        Raises BadReply, naming the sample, for scores of other ids, other fields or shapes, probabilities above 1, and a
        token twice in a row of the likeliest.
        """
        samples = [self.samples[index] for index in batch]
        if reply.fields.keys() != fields_of(self.need):
            raise BadReply(f"a reply with {sorted(reply.fields)}, where {sorted(fields_of(self.need))} were asked for")
        sizes = [sample.num_response_tokens for sample in samples]
        if len(reply.token_ids) != sum(sizes):
            raise BadReply(f"a reply of {len(reply.token_ids)} tokens, where {sum(sizes)} were asked for")
        columns = self._columns
        for name, value in reply.fields.items():
            if value.shape[1:] != ((columns[name],) if name in columns else ()):
                raise BadReply(f"a reply whose {name} has shape {tuple(value.shape)}")
        scored = reply.token_ids.split(sizes)
        parts = {name: value.split(sizes) for name, value in reply.fields.items()}
        return [
            self._scores(index, scored[place], {name: part[place] for name, part in parts.items()})
            for place, index in enumerate(batch)
        ]

    def _scores(self, index: int, scored: Tensor, found: dict[str, Tensor]) -> Scores:
        sample = self.samples[index]
        if not torch.equal(scored.long(), sample.response_ids):
            raise BadReply(f"sample {sample.key}: scores of other tokens than were sent")
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
        if self.ids is not None:
            found = {"topk_ids": self.ids[index].long(), "topk_logprob": found["given_logprob"]}
        broken = sorted(name for name, value in found.items() if not bool(value.isfinite().all()))
        if not broken:
            return Scores(sample.response_ids, **found)
        empty = {name: torch.full_like(value, -1 if name == "topk_ids" else torch.nan) for name, value in found.items()}
        reason = (
            f"sample {sample.key}: {broken[0]} is NaN or infinite; serve the teacher with another --dtype (bfloat16 or "
            "float32 for float16)"
        )
        return Unscored(sample.response_ids, **empty, reason=reason)
