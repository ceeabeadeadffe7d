"""The model of a served teacher: requests in, replies out. Only one thread at a time may use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from hashlib import blake2b
from threading import Lock
from typing import Any, Literal

from understudy.lazy import Tensor, nn, no_grad, torch
from understudy.linear.kept import NUM_LIKELIEST
from understudy.models import lm_head, num_positions, unwrap
from understudy.models.backbone import evaluating
from understudy.packing import by_prompt
from understudy.serve.prompts import can_continue, continued_hidden, is_worth
from understudy.teachers import LocalTeacher
from understudy.teachers.grouping import chunks
from understudy.teachers.local import MAX_BATCH_TOKENS, MAX_BATCH_TOKENS_ELSEWHERE, scores_of
from understudy.teachers.remote.protocol import (
    About,
    ScoreReply,
    ScoreRequest,
    Shapes,
    reply_fields,
    row_bytes,
    write_head,
)
from understudy.teachers.stores.recording import tokenizer_digest
from understudy.types import Author, Prompt, Sample, Scores

HiddenDType = Literal["auto", "bfloat16", "float32"]
GROUP_BYTES = 2**30
"""Hidden states of a shared prompt that are held until all are scored; 128,000 of 4,096 numbers in bfloat16."""
NUM_VIEWS = 16
"""Pairs of temperature and vocabulary that are kept ready."""


class Refusal(Exception):  # noqa: N818 (an answer with a status, raised where it is known)
    """An error status with a message for the client."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})


class Scorer:
    """Scores at any temperature and vocabulary, from one copy of the weights; the mathematics is `LocalTeacher`'s."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str,
        hidden_dtype: HiddenDType = "auto",
        max_batch_tokens: int | None = None,
        share_prompts: bool = True,
    ) -> None:
        self._model = model
        self._name = name
        head = lm_head(model)
        self._device = head.weight.device
        default = MAX_BATCH_TOKENS.get(self._device.type, MAX_BATCH_TOKENS_ELSEWHERE)
        self.max_batch_tokens = max_batch_tokens or default
        self._hidden_dtype = unwrap(model).dtype if hidden_dtype == "auto" else getattr(torch, hidden_dtype)
        view = partial(
            LocalTeacher, model, name=name, max_batch_tokens=self.max_batch_tokens, share_prompts=share_prompts
        )
        self._view = lru_cache(NUM_VIEWS)(view)
        """The weights as a teacher at a temperature and over a vocabulary."""
        self._num_embedded = int(unwrap(model).get_input_embeddings().weight.shape[0])
        whole = self._view(temperature=1.0, vocab_size=head.num_tokens)
        self.continues = share_prompts and whole.style != "shared" and can_continue(model)
        """Whether responses continue from the cache of their prompt: where attention by segments does not read it once."""
        weights = whole.fingerprint
        self._fingerprint = blake2b(f"{weights}/{self._hidden_dtype}".encode(), digest_size=16).hexdigest()
        self._tokenizer = tokenizer
        self._head: bytes | None = None
        self._head_lock = Lock()

    def about(self, *, request_bytes: int, reply_bytes: int) -> About:
        """Returns the description for clients."""
        head = lm_head(self._model)
        return About(
            model=self._name,
            fingerprint=self._fingerprint,
            num_rows=head.weight.shape[0],
            tokenizer_digest=tokenizer_digest(self._tokenizer),
            tokenizer_size=max(self._tokenizer.get_vocab().values()) + 1,
            eos_id=self._tokenizer.eos_token_id,
            hidden_size=head.weight.shape[1],
            dtype=_word(head.weight.dtype),
            hidden_dtype=_word(self._hidden_dtype),
            request_bytes=request_bytes,
            reply_bytes=reply_bytes,
            positions=num_positions(self._model),
        )

    def head(self) -> bytes:
        """Returns the head's message. It is made once: gigabytes that all clients share."""
        with self._head_lock:
            if self._head is None:
                self._head = write_head(lm_head(self._model), self._fingerprint)
            return self._head

    def check(self, request: ScoreRequest) -> None:
        """Raises Refusal, naming the sample, for unknown tokens and for sequences that the model cannot read."""
        head = lm_head(self._model)
        size, absent = request.tail_size or request.vocab_size, set(request.absent.tolist())
        if not request.vocab_size <= size <= head.num_tokens:
            raise Refusal(
                422, f"vocab_size is {request.vocab_size}, tail_size {size}, and the head has {head.num_tokens} rows"
            )
        if absent and not 0 <= min(absent) <= max(absent) < request.vocab_size:
            raise Refusal(
                422, f"absent holds {min(absent)} to {max(absent)}; they must lie in [0, {request.vocab_size})"
            )
        limit = num_positions(self._model)
        longest = int(request.lengths.argmax())
        # the last token of a sequence is never read
        if limit is not None and int(request.lengths[longest]) - 1 > limit:
            raise Refusal(
                422,
                f"sample {longest} of the request has {int(request.lengths[longest])} tokens, and the model has {limit} "
                "positions (max_position_embeddings): send shorter sequences",
            )
        lowest, highest = int(request.tokens.min()), int(request.tokens.max())
        if lowest < 0 or highest >= self._num_embedded:
            raise Refusal(422, f"tokens holds {lowest} to {highest}; they must lie in [0, {self._num_embedded})")
        if highest < request.vocab_size and not absent:
            return
        for index, sample in enumerate(_samples(request)):
            ids = sample.response_ids.tolist()
            if foreign := [token for token in ids if token >= request.vocab_size or token in absent]:
                raise Refusal(
                    422,
                    f"the response of sample {index} holds token {foreign[0]}, and vocab_size is {request.vocab_size}"
                    + (f", without {len(absent)} ids that are absent" if absent else ""),
                )

    def reply_bytes(self, request: ScoreRequest) -> int:
        """Returns the bytes of the reply's tensors."""
        row = row_bytes(self._fields(request), scores=unwrap(self._model).dtype, hidden=self._hidden_dtype)
        return row * (request.num_tokens - int(request.prompt_lengths.sum()))

    def _fields(self, request: ScoreRequest) -> Shapes:
        return reply_fields(
            request.need,
            num_top=min(request.k or 0, request.vocab_size),
            hidden_size=lm_head(self._model).weight.shape[1],
            num_likeliest=min(NUM_LIKELIEST, request.vocab_size) if request.likeliest else 0,
        )

    @no_grad
    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreReply]:
        """Returns a reply to each of some requests of one kind (`ScoreRequest.kind`), whose sequences are read together."""
        samples = [_samples(request) for request in requests]
        scores = iter(self._score(requests[0], [sample for some in samples for sample in some]))
        replies = []
        for request, some in zip(requests, samples, strict=True):
            own = [next(scores) for _ in some]
            fields: dict[str, Tensor] = {}
            for name in self._fields(request):
                dtype = self._hidden_dtype if name == "hidden" else None
                fields[name] = torch.cat([getattr(score, name).to(dtype) for score in own]).cpu()
            token_ids = torch.cat([score.token_ids for score in own]).int()
            replies.append(ScoreReply(fingerprint=self._fingerprint, token_ids=token_ids, fields=fields))
        return replies

    def _score(self, request: ScoreRequest, samples: list[Sample]) -> list[Scores]:
        """As `LocalTeacher.score`, which reads a prompt of several samples once, or from its cache where that is worth it."""
        weight = lm_head(self._model).weight
        most = max(1, GROUP_BYTES // (weight.shape[1] * weight.dtype.itemsize))
        found: dict[int, Scores] = {}
        for same in by_prompt(samples) if self.continues else []:
            for group in chunks(same, lambda index: samples[index].num_response_tokens, most):
                together = [samples[index] for index in group]
                lengths = [sample.num_response_tokens for sample in together]
                if len(group) > 1 and is_worth(together[0].prompt_length, lengths, self.max_batch_tokens):
                    found.update(zip(group, self._continue(request, together), strict=True))
        rest = [index for index in range(len(samples)) if index not in found]
        if rest:
            whole = self._view_of(request).score([samples[index] for index in rest], request.need, k=request.k)
            found.update(zip(rest, whole, strict=True))
        return [found[index] for index in range(len(samples))]

    def _view_of(self, request: ScoreRequest) -> LocalTeacher:
        """The weights as the teacher that the request asks."""
        return self._view(
            temperature=request.temperature,
            vocab_size=request.vocab_size,
            absent=tuple(request.absent.tolist()),
            tail_size=request.tail_size,
        )

    def _continue(self, request: ScoreRequest, samples: list[Sample]) -> list[Scores]:
        """Samples with one prompt."""
        prompt, responses = samples[0].token_ids[: samples[0].prompt_length], [one.response_ids for one in samples]
        with evaluating(self._model):
            states = continued_hidden(self._model, prompt, responses, self.max_batch_tokens, self._device)
        fields: dict[str, Sequence[Tensor]] = {"hidden": states} if "full" in request.need else {}
        if request.need & {"sampled", "topk"}:
            rows = self._view_of(request).score_rows(torch.cat(states), samples, request.k)
            sizes = [len(response) for response in responses]
            fields |= {name: value.cpu().split(sizes) for name, value in rows.items()}
        return scores_of(samples, fields)


def _samples(request: ScoreRequest) -> list[Sample]:
    """Returns the sequences of a request; their prompts are named by their numbers."""
    parts = request.tokens.long().split(request.lengths.tolist())
    return [
        Sample(
            prompt=Prompt(id=str(index)),
            index=0,
            token_ids=ids,
            author=torch.full((len(ids),), int(Author.STUDENT), dtype=torch.uint8),
            prompt_length=length,
            finish="data",
            text="",
            keep_tokens=request.likeliest,
        )
        for index, (ids, length) in enumerate(zip(parts, request.prompt_lengths.tolist(), strict=True))
    ]


def _word(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")
