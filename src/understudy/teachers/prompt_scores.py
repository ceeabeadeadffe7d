"""What servers are asked for the scores of given tokens, and what they reply: no network and no model.

    vllm         POST /v1/completions with `prompt_logprobs`
    sglang       POST /generate with `return_logprob`
    completions  POST /v1/completions with `echo` and `logprobs`, as OpenAI had it

Each reads a reply into `Raw`; `score_check` decides what of it is a score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from understudy.errors import DataError
from understudy.types import Sample
from understudy.wire import BadReply

from .score_check import Answer, Raw, number

MAX_SAMPLES = 512
"""Of one request; vLLM takes 1,024 prompts (`VLLM_MAX_COMPLETION_PROMPTS`)."""
_SHAPE_ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
"""What reading a reply of another shape runs into; torch reports a number that is too large as a RuntimeError."""

Spellings = Callable[[int], frozenset[str]]
"""Every text that a server may write for a token."""


class Format(Protocol):
    """How one kind of server is asked, and how it answers."""

    @property
    def path(self) -> str:
        """Behind the base."""
        ...

    def body(self, samples: Sequence[Sample], num_top: int) -> dict[str, Any]:
        """`num_top`: likeliest tokens of each place; 0: the sampled token alone."""
        ...

    def read(self, value: Any, samples: Sequence[Sample]) -> list[Raw]:
        """One for each sample. Raises BadReply, and LookupError, TypeError, ValueError or AttributeError for another shape."""
        ...


@dataclass(frozen=True)
class VLLM:
    """vLLM's own `prompt_logprobs`. Tested with 0.32; nothing in it is younger than 0.20.

    The route `/inference/v1/generate` could do without detokenisation, but takes one sequence a request and is not in
    every version; a server that only scores is started with `--skip-tokenizer-init`, which spares it for all.
    """

    model: str
    path: str = "/v1/completions"

    def body(self, samples: Sequence[Sample], num_top: int) -> dict[str, Any]:
        """One token is generated: vLLM has no fewer."""
        return {
            "model": self.model,
            "prompt": [sample.token_ids.tolist() for sample in samples],
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": num_top,
            "return_token_ids": True,
        }

    def read(self, value: Any, samples: Sequence[Sample]) -> list[Raw]:
        """`prompt_logprobs`: None, then for each token a mapping of ids that holds its own and the likeliest."""
        found = []
        for sample, choice in zip(samples, _choices(value, len(samples)), strict=True):
            ids, start = sample.token_ids.tolist(), sample.prompt_length
            if (said := choice.get("prompt_token_ids")) is not None and said != ids:
                raise BadReply("the prompt that was scored is not the one that was sent")
            rows = choice["prompt_logprobs"]
            if len(rows) != len(ids):
                raise BadReply(f"{len(rows)} places for {len(ids)} tokens")
            found.append(_read_rows(ids[start:], rows[start:]))
        return found


def _read_rows(ids: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> Raw:
    """Likeliest first, the sampled token, which every row holds, among them; a number that is missing is never cut off."""
    values = [{int(token): number(entry["logprob"]) for token, entry in row.items()} for row in rows]
    if lacking := [token for token, row in zip(ids, values, strict=True) if token not in row]:
        raise BadReply(f"token {lacking[0]} was sent, and other tokens were scored in its place")
    top = [sorted(row.items(), key=lambda item: -math.inf if math.isnan(item[1]) else -item[1]) for row in values]
    return Raw(ids, [row[token] for token, row in zip(ids, values, strict=True)], top)


@dataclass(frozen=True)
class SGLang:
    """SGLang's native route (`GenerateReqInput` in its io_struct.py): scores begin behind the prompt, whose keys and values
    its prefix cache shares among the samples of a group."""

    path: str = "/generate"

    def body(self, samples: Sequence[Sample], num_top: int) -> dict[str, Any]:
        """Nothing is generated. The first place that is asked for has no number, so it is the prompt's last token."""
        return {
            "input_ids": [sample.token_ids.tolist() for sample in samples],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": [sample.prompt_length - 1 for sample in samples],
            "top_logprobs_num": num_top,
            "return_text_in_logprobs": False,
            "stream": False,
        }

    def body_at(self, samples: Sequence[Sample], ids: Sequence[Tensor]) -> dict[str, Any]:
        """With the numbers of given ids [R, K]; a server takes one list for all places of a sample, so it is their union."""
        return self.body(samples, 0) | {"token_ids_logprob": [rows.unique().tolist() for rows in ids]}

    def read(self, value: Any, samples: Sequence[Sample]) -> list[Raw]:
        """`meta_info`: lists of [logprob, id, text]."""
        return self._read(value, samples, "input_top_logprobs")

    def read_at(self, value: Any, samples: Sequence[Sample]) -> list[Raw]:
        """The same with the numbers of the ids that were given."""
        return self._read(value, samples, "input_token_ids_logprobs")

    def _read(self, value: Any, samples: Sequence[Sample], beside: str) -> list[Raw]:
        replies = value if isinstance(value, list) else [value]
        if len(replies) != len(samples):
            raise BadReply(f"{len(replies)} replies to {len(samples)} samples")
        found = []
        for sample, reply in zip(samples, replies, strict=True):
            facts, size = reply["meta_info"], sample.num_response_tokens
            if facts.get("prompt_tokens", sample.token_ids.numel()) != sample.token_ids.numel():
                raise BadReply(f"{facts['prompt_tokens']} tokens were read of {sample.token_ids.numel()}")
            places = facts["input_token_logprobs"]
            if len(places) != size + 1:
                raise BadReply(f"{len(places) - 1} places for {size} response tokens")
            rows = facts.get(beside) or None
            if rows is not None and len(rows) != size + 1:
                raise BadReply(f"{beside} has {len(rows) - 1} places for {size} response tokens")
            found.append(
                Raw(
                    [place[1] for place in places[1:]],
                    [number(place[0]) for place in places[1:]],
                    None
                    if rows is None
                    else [[(entry[1], number(entry[0])) for entry in row or ()] for row in rows[1:]],
                )
            )
        return found


_TOKEN_ID = "token_id:"  # noqa: S105 (a prefix of vLLM's)
_UNPRINTABLE = "bytes:"


@dataclass(frozen=True)
class Completions:
    """Any server with `echo` and `logprobs` of the first completions of OpenAI, which writes tokens as text."""

    model: str
    spellings: Spellings | None = None
    """Of the student's tokenizer; None: only a server that writes token ids is understood."""
    as_ids: bool = True
    """Whether it is asked to write ids, which vLLM does and a strict server refuses as unknown."""
    path: str = "/v1/completions"

    def body(self, samples: Sequence[Sample], num_top: int) -> dict[str, Any]:
        """One token is generated, because some servers have no fewer; it is cut off."""
        return {
            "model": self.model,
            "prompt": [sample.token_ids.tolist() for sample in samples],
            "max_tokens": 1,
            "temperature": 0.0,
            "echo": True,
            "logprobs": 1,
        } | ({"return_tokens_as_token_ids": True} if self.as_ids else {})

    def read(self, value: Any, samples: Sequence[Sample]) -> list[Raw]:
        """`logprobs`: `tokens` and `token_logprobs`, the first of which is None."""
        found = []
        for sample, choice in zip(samples, _choices(value, len(samples)), strict=True):
            ids, start = sample.token_ids.tolist(), sample.prompt_length
            tokens, numbers = choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]
            if len(tokens) not in (len(ids), len(ids) + 1) or len(numbers) != len(tokens):
                raise BadReply(f"{len(tokens)} tokens and {len(numbers)} numbers came back for {len(ids)} tokens")
            for token, said in zip(ids, tokens, strict=False):
                if not self._is(token, said):
                    raise BadReply(f"token {token} was sent, and {said!r} was scored in its place")
            found.append(Raw(ids[start:], [number(value) for value in numbers[start : len(ids)]]))
        return found

    def _is(self, token: int, said: str) -> bool:
        """Whether a server may write the token so. A part of a character has no text of its own, and any will do."""
        if said.startswith(_TOKEN_ID):
            return said == f"{_TOKEN_ID}{token}"
        if self.spellings is None:
            raise BadReply("tokens came back as text, and no tokenizer is there to compare it with")
        known = self.spellings(token)
        partial = any("\ufffd" in text for text in known)
        return said in known or (partial and (said.startswith(_UNPRINTABLE) or "\ufffd" in said))


def spellings_of(tokenizer: Any) -> Spellings:
    """The token decoded, its piece in the vocabulary, and that with the space that SentencePiece marks and decoding drops."""
    known: dict[int, frozenset[str]] = {}

    def spell(token: int) -> frozenset[str]:
        if token not in known:
            piece = str(tokenizer.convert_ids_to_tokens(token))
            known[token] = frozenset({tokenizer.decode([token]), piece, piece.replace("\u2581", " ")})
        return known[token]

    return spell


def _choices(value: Any, count: int) -> list[Any]:
    """`choices` in the order of the prompts."""
    choices = sorted(value["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(count)):
        raise BadReply(f"{len(choices)} choices came back for {count} samples")
    return choices


def group_by_prompt(samples: Sequence[Sample], chosen: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Indices of one request each, samples of one prompt side by side; at most `max_tokens` tokens or one sample.

    A response without a token is in none. Raises DataError for a sample without a prompt token.
    """
    by_prompt: dict[bytes, list[int]] = {}
    for index in chosen:
        sample = samples[index]
        if sample.prompt_length < 1:
            raise DataError(f"sample {sample.key} has no prompt token, so nothing predicts its first response token")
        if sample.num_response_tokens:
            by_prompt.setdefault(sample.token_ids[: sample.prompt_length].numpy().tobytes(), []).append(index)
    groups: list[list[int]] = []
    room = 0
    for index in (index for group in by_prompt.values() for index in group):
        size = samples[index].token_ids.numel()
        if not groups or size > room or len(groups[-1]) == MAX_SAMPLES:
            groups.append([])
            room = max_tokens
        groups[-1].append(index)
        room -= size
    return groups


def read_reply(
    value: Any,
    samples: Sequence[Sample],
    read: Callable[[Any, Sequence[Sample]], list[Raw]],
    judge: Callable[[int, Sample, Raw], Answer],
) -> list[Answer]:
    """`judge(index, sample, raw)` of what `read` finds. Raises BadReply for everything that is no such reply."""
    try:
        raws = read(value, samples)
        return [judge(index, *pair) for index, pair in enumerate(zip(samples, raws, strict=True))]
    except _SHAPE_ERRORS as error:
        raise BadReply(f"a reply of another shape ({type(error).__name__} {error})") from None


def named(samples: Sequence[Sample]) -> str:
    """The first by its key, and how many more."""
    rest = f" and {len(samples) - 1} more" if len(samples) > 1 else ""
    return f"sample {samples[0].key}{rest}"
