"""The model of a served teacher: requests in, answers out. One thread at a time may use it."""

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
from understudy.serve.prompts import by_prompt, can_continue, continued_hidden, is_worth
from understudy.teachers import LocalTeacher
from understudy.teachers.local import MAX_BATCH_TOKENS, MAX_BATCH_TOKENS_ELSEWHERE
from understudy.teachers.remote.frames import About, Answer, Ask, Limits, Tokens, fields_of, row_bytes, write_head
from understudy.teachers.rows import CHUNK_ELEMENTS, score_rows
from understudy.teachers.stores.recording import tokenizer_digest
from understudy.types import Author, Need, Prompt, Sample, Scores

HiddenDType = Literal["auto", "bfloat16", "float32"]
GROUP_BYTES = 2**30
"""Of hidden states that wait for the rest of their group; 128,000 of 4,096 numbers in bfloat16."""
NUM_VIEWS = 16
"""Temperatures and vocabularies that are kept ready."""
NEEDED: tuple[Need, ...] = ("sampled", "topk", "full")
"""What `LocalTeacher` gives; "given" is made of "full"."""


class Refusal(Exception):  # noqa: N818 (an answer with a status, raised where it is known)
    """What a client is told instead of an answer."""

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
        self._tokens = _tokens(tokenizer)
        self._head: bytes | None = None
        self._head_lock = Lock()

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt of several responses is read once."""
        return self._shares

    def about(self, *, request_bytes: int, reply_bytes: int) -> About:
        """What clients are told."""
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
        """`frames.write_head` of the model's, made once: gigabytes that all who ask share."""
        with self._head_lock:
            if self._head is None:
                self._head = write_head(lm_head(self._model), self._fingerprint)
            return self._head

    def check(self, ask: Ask) -> None:
        """Raises Refusal for tokens that the model does not have and sequences that it cannot read, naming the sample."""
        head = lm_head(self._model)
        if ask.vocab_size > head.num_tokens:
            raise Refusal(422, f"vocab_size is {ask.vocab_size}, and the head has {head.num_tokens} rows")
        limit = num_positions(self._model)
        longest = int(ask.lengths.argmax())
        # the last token of a sequence is never read
        if limit is not None and int(ask.lengths[longest]) - 1 > limit:
            raise Refusal(
                422,
                f"sample {longest} of the request has {int(ask.lengths[longest])} tokens, and the model has {limit} "
                "positions (max_position_embeddings): send shorter sequences",
            )
        for name, ids, size in (("tokens", ask.tokens, self._num_embedded), ("ids", ask.ids, ask.vocab_size)):
            if ids is not None and ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= size):
                raise Refusal(422, f"{name} holds {int(ids.min())} to {int(ids.max())}; they must lie in [0, {size})")
        if ask.num_tokens and int(ask.tokens.max()) >= ask.vocab_size:
            for index, sample in enumerate(_samples(ask)):
                highest = int(sample.response_ids.max()) if sample.num_response_tokens else 0
                if highest >= ask.vocab_size:
                    raise Refusal(
                        422, f"the response of sample {index} holds token {highest}, and vocab_size is {ask.vocab_size}"
                    )

    def reply_bytes(self, ask: Ask) -> int:
        """What the tensors of the answer will take, at the most, and the hidden states that given ids are scored from."""
        row = row_bytes(
            ask.need,
            scores=unwrap(self._model).dtype,
            hidden=self._hidden_dtype,
            hidden_size=lm_head(self._model).weight.shape[1],
            num_top=min(ask.k or 0, ask.vocab_size),
            num_given=0 if ask.ids is None else ask.ids.shape[1],
        )
        return row * ask.num_rows

    @torch.no_grad()
    def score(self, asks: Sequence[Ask]) -> list[Answer]:
        """One answer for each of some requests of one kind (`Ask.kind`), whose sequences are read together."""
        samples = [_samples(ask) for ask in asks]
        scores = iter(self._score(asks[0], [sample for some in samples for sample in some]))
        return [self._answer(ask, [next(scores) for _ in some]) for ask, some in zip(asks, samples, strict=True)]

    def _score(self, ask: Ask, samples: list[Sample]) -> list[Scores]:
        """As `LocalTeacher.score`; a prompt that several samples share is read once where that saves something."""
        need: set[Need] = {name for name in NEEDED if name in ask.need}
        if "given" in ask.need:
            need.add("full")
        found: dict[int, Scores] = {}
        for group in self._groups(samples) if self._shares else []:
            together = [samples[index] for index in group]
            lengths = [sample.num_response_tokens for sample in together]
            if len(group) > 1 and is_worth(together[0].prompt_length, lengths, self.max_batch_tokens):
                found.update(zip(group, self._continue(ask, together, need), strict=True))
        rest = [index for index in range(len(samples)) if index not in found]
        if rest:
            view = self._view(ask.temperature, ask.vocab_size)
            whole = view.score([samples[index] for index in rest], frozenset(need), k=ask.k)
            found.update(zip(rest, whole, strict=True))
        return [found[index] for index in range(len(samples))]

    def _groups(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Of one prompt; what is kept of a group until it is scored, its hidden states, is at most `GROUP_BYTES`, or one's."""
        weight = lm_head(self._model).weight
        most = max(1, GROUP_BYTES // (weight.shape[1] * weight.dtype.itemsize))
        groups: list[list[int]] = []
        for same in by_prompt(samples):
            room = 0
            for index in same:
                size = samples[index].num_response_tokens
                if size > room or index == same[0]:
                    groups.append([])
                    room = most
                groups[-1].append(index)
                room -= size
        return groups

    def _continue(self, ask: Ask, samples: list[Sample], need: set[Need]) -> list[Scores]:
        """Samples with one prompt."""
        prompt, responses = samples[0].token_ids[: samples[0].prompt_length], [one.response_ids for one in samples]
        with evaluating(self._model):
            states = continued_hidden(self._model, prompt, responses, self.max_batch_tokens, self._device)
        fields: dict[str, Sequence[Tensor]] = {"hidden": states} if "full" in need else {}
        if need & {"sampled", "topk"}:
            head = lm_head(self._model, temperature=ask.temperature, vocab_size=ask.vocab_size)
            target = torch.cat(responses).to(self._device)
            rows = score_rows(torch.cat(states), head, target, k=ask.k if "topk" in need else None)
            sizes = [len(response) for response in responses]
            fields |= {name: value.cpu().split(sizes) for name, value in rows.items()}
        return [
            Scores(response, **{name: parts[index] for name, parts in fields.items()})
            for index, response in enumerate(responses)
        ]

    def _answer(self, ask: Ask, scores: Sequence[Scores]) -> Answer:
        found: dict[str, Tensor] = {}
        for name in fields_of(ask.need) - {"given_logprob"}:
            parts = [getattr(score, name) for score in scores]
            found[name] = torch.cat(
                [part.to(self._hidden_dtype) for part in parts] if name == "hidden" else parts
            ).cpu()
        if ask.ids is not None:
            head = lm_head(self._model, temperature=ask.temperature, vocab_size=ask.vocab_size)
            hidden = torch.cat([score.hidden for score in scores if score.hidden is not None])
            found["given_logprob"] = given_logprob(hidden, head, ask.ids).cpu()
        token_ids = torch.cat([score.token_ids for score in scores]).int()
        return Answer(fingerprint=self._fingerprint, token_ids=token_ids, fields=found)

    def _view(self, temperature: float, vocab_size: int) -> LocalTeacher:
        """The weights as a teacher at a temperature and over a vocabulary."""
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


def _samples(ask: Ask) -> list[Sample]:
    """The sequences of a request, by their number in it."""
    parts = ask.tokens.long().split(ask.lengths.tolist())
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
        for index, (ids, length) in enumerate(zip(parts, ask.prompt_lengths.tolist(), strict=True))
    ]


def _tokens(tokenizer: Any) -> Tokens:
    template = tokenizer.chat_template
    hashed = None if template is None else blake2b(str(template).encode(), digest_size=16).hexdigest()
    return Tokens(
        digest=tokenizer_digest(tokenizer),
        size=max(tokenizer.get_vocab().values()) + 1,
        eos_id=tokenizer.eos_token_id,
        chat_template=hashed,
    )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
