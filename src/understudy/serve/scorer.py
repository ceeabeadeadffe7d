"""The model of a served teacher: requests in, replies out. Only one thread at a time may use it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor, nn

from understudy.linear.head import LMHead
from understudy.linear.products import project
from understudy.models import lm_head, num_positions, unwrap
from understudy.models.backbone import evaluating
from understudy.serve.prompts import can_continue, continued_hidden, is_worth
from understudy.teachers import LocalTeacher
from understudy.teachers.grouping import by_prompt, chunks
from understudy.teachers.local import MAX_BATCH_TOKENS, MAX_BATCH_TOKENS_ELSEWHERE
from understudy.teachers.remote.protocol import (
    About,
    Limits,
    ScoreReply,
    ScoreRequest,
    Tokens,
    fields_of,
    row_bytes,
    write_head,
)
from understudy.teachers.rows import CHUNK_ELEMENTS, score_rows
from understudy.teachers.stores.recording import tokenizer_digest
from understudy.types import Author, Need, Prompt, Sample, Scores

HiddenDType = Literal["auto", "bfloat16", "float32"]
GROUP_BYTES = 2**30
"""Hidden states of a shared prompt that are held until all are scored; 128,000 of 4,096 numbers in bfloat16."""
NUM_VIEWS = 16
"""Pairs of temperature and vocabulary that are kept ready."""
NEEDED: tuple[Need, ...] = ("sampled", "topk", "full")
"""Needs that `LocalTeacher` meets; "given" is computed from "full"."""


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
        self._shares = share_prompts and can_continue(model)
        self._views: OrderedDict[tuple[float, int], LocalTeacher] = OrderedDict()
        self._num_embedded = int(unwrap(model).get_input_embeddings().weight.shape[0])
        weights = self._view(1.0, head.num_tokens).fingerprint
        self._fingerprint = blake2b(f"{weights}/{self._hidden_dtype}".encode(), digest_size=16).hexdigest()
        template = tokenizer.chat_template
        self._tokens = Tokens(
            digest=tokenizer_digest(tokenizer),
            size=max(tokenizer.get_vocab().values()) + 1,
            eos_id=tokenizer.eos_token_id,
            chat_template=None if template is None else blake2b(str(template).encode(), digest_size=16).hexdigest(),
        )
        self._head: bytes | None = None
        self._head_lock = Lock()

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt of several responses is read once."""
        return self._shares

    def about(self, *, request_bytes: int, reply_bytes: int) -> About:
        """Returns the description for clients."""
        head = lm_head(self._model)
        return About(
            model=self._name,
            fingerprint=self._fingerprint,
            num_rows=head.weight.shape[0],
            tokenizer=self._tokens,
            hidden_size=head.weight.shape[1],
            dtype=_word(head.weight.dtype),
            hidden_dtype=_word(self._hidden_dtype),
            limits=Limits(
                request_bytes=request_bytes,
                reply_bytes=reply_bytes,
                batch_tokens=self.max_batch_tokens,
                positions=num_positions(self._model),
            ),
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
        if request.vocab_size > head.num_tokens:
            raise Refusal(422, f"vocab_size is {request.vocab_size}, and the head has {head.num_tokens} rows")
        limit = num_positions(self._model)
        longest = int(request.lengths.argmax())
        # the last token of a sequence is never read
        if limit is not None and int(request.lengths[longest]) - 1 > limit:
            raise Refusal(
                422,
                f"sample {longest} of the request has {int(request.lengths[longest])} tokens, and the model has {limit} "
                "positions (max_position_embeddings): send shorter sequences",
            )
        for name, ids, size in (
            ("tokens", request.tokens, self._num_embedded),
            ("ids", request.ids, request.vocab_size),
        ):
            if ids is not None and ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= size):
                raise Refusal(422, f"{name} holds {int(ids.min())} to {int(ids.max())}; they must lie in [0, {size})")
        if request.num_tokens and int(request.tokens.max()) >= request.vocab_size:
            for index, sample in enumerate(_samples(request)):
                highest = int(sample.response_ids.max()) if sample.num_response_tokens else 0
                if highest >= request.vocab_size:
                    raise Refusal(
                        422,
                        f"the response of sample {index} holds token {highest}, and vocab_size is {request.vocab_size}",
                    )

    def reply_bytes(self, request: ScoreRequest) -> int:
        """Returns an upper limit of the reply's tensors, and of the hidden states that given ids are scored from."""
        row = row_bytes(
            request.need,
            scores=unwrap(self._model).dtype,
            hidden=self._hidden_dtype,
            hidden_size=lm_head(self._model).weight.shape[1],
            num_top=min(request.k or 0, request.vocab_size),
            num_given=0 if request.ids is None else request.ids.shape[1],
        )
        return row * request.num_rows

    @torch.no_grad()
    def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreReply]:
        """Returns a reply to each of some requests of one kind (`ScoreRequest.kind`), whose sequences are read together."""
        samples = [_samples(request) for request in requests]
        scores = iter(self._score(requests[0], [sample for some in samples for sample in some]))
        return [
            self._answer(request, [next(scores) for _ in some]) for request, some in zip(requests, samples, strict=True)
        ]

    def _score(self, request: ScoreRequest, samples: list[Sample]) -> list[Scores]:
        """As `LocalTeacher.score`, but a prompt that several samples share is read once if that is worth it."""
        need: set[Need] = {name for name in NEEDED if name in request.need}
        if "given" in request.need:
            need.add("full")
        found: dict[int, Scores] = {}
        for group in self._groups(samples) if self._shares else []:
            together = [samples[index] for index in group]
            lengths = [sample.num_response_tokens for sample in together]
            if len(group) > 1 and is_worth(together[0].prompt_length, lengths, self.max_batch_tokens):
                found.update(zip(group, self._continue(request, together, need), strict=True))
        rest = [index for index in range(len(samples)) if index not in found]
        if rest:
            view = self._view(request.temperature, request.vocab_size)
            whole = view.score([samples[index] for index in rest], frozenset(need), k=request.k)
            found.update(zip(rest, whole, strict=True))
        return [found[index] for index in range(len(samples))]

    def _groups(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Returns indices of samples with one prompt, whose hidden states take at most `GROUP_BYTES`, or of one sample."""
        weight = lm_head(self._model).weight
        most = max(1, GROUP_BYTES // (weight.shape[1] * weight.dtype.itemsize))
        return [
            group
            for same in by_prompt(samples)
            for group in chunks(same, lambda index: samples[index].num_response_tokens, most)
        ]

    def _continue(self, request: ScoreRequest, samples: list[Sample], need: set[Need]) -> list[Scores]:
        """Samples with one prompt."""
        prompt, responses = samples[0].token_ids[: samples[0].prompt_length], [one.response_ids for one in samples]
        with evaluating(self._model):
            states = continued_hidden(self._model, prompt, responses, self.max_batch_tokens, self._device)
        fields: dict[str, Sequence[Tensor]] = {"hidden": states} if "full" in need else {}
        if need & {"sampled", "topk"}:
            head = lm_head(self._model, temperature=request.temperature, vocab_size=request.vocab_size)
            target = torch.cat(responses).to(self._device)
            rows = score_rows(torch.cat(states), head, target, k=request.k if "topk" in need else None)
            sizes = [len(response) for response in responses]
            fields |= {name: value.cpu().split(sizes) for name, value in rows.items()}
        return [
            Scores(response, **{name: parts[index] for name, parts in fields.items()})
            for index, response in enumerate(responses)
        ]

    def _answer(self, request: ScoreRequest, scores: Sequence[Scores]) -> ScoreReply:
        found: dict[str, Tensor] = {}
        for name in fields_of(request.need) - {"given_logprob"}:
            parts = [getattr(score, name) for score in scores]
            found[name] = torch.cat(
                [part.to(self._hidden_dtype) for part in parts] if name == "hidden" else parts
            ).cpu()
        if request.ids is not None:
            head = lm_head(self._model, temperature=request.temperature, vocab_size=request.vocab_size)
            hidden = torch.cat([score.hidden for score in scores if score.hidden is not None])
            found["given_logprob"] = given_logprob(hidden, head, request.ids).cpu()
        token_ids = torch.cat([score.token_ids for score in scores]).int()
        return ScoreReply(fingerprint=self._fingerprint, token_ids=token_ids, fields=found)

    def _view(self, temperature: float, vocab_size: int) -> LocalTeacher:
        """Returns the weights as a teacher at a temperature and over a vocabulary."""
        key = temperature, vocab_size
        if key not in self._views:
            self._views[key] = LocalTeacher(
                self._model,
                name=self._name,
                vocab_size=vocab_size,
                temperature=temperature,
                max_batch_tokens=self.max_batch_tokens,
            )
        self._views.move_to_end(key)
        while len(self._views) > NUM_VIEWS:
            self._views.popitem(last=False)
        return self._views[key]


@torch.no_grad()
def given_logprob(hidden: Tensor, head: LMHead, ids: Tensor) -> Tensor:
    """`log_softmax(head.logits(hidden)).gather(ids)`, a chunk of rows at a time. [T, H], [T, K] -> [T, K]."""
    dtype, device = torch.promote_types(hidden.dtype, torch.float32), head.weight.device
    rows = max(1, CHUNK_ELEMENTS // head.num_tokens)
    found = torch.empty(ids.shape, dtype=dtype, device=device)
    for start in range(0, len(ids), rows):
        part = slice(start, start + rows)
        logits = project(hidden[part].to(device, dtype), head)
        found[part] = logits.gather(-1, ids[part].to(device).long()) - logits.logsumexp(-1, keepdim=True)
    return found


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
        )
        for index, (ids, length) in enumerate(zip(parts, request.prompt_lengths.tolist(), strict=True))
    ]


def _word(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")
