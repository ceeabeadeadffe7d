"""What servers are asked for the scores of given tokens, and what they reply: no network and no model.

    vllm         POST /inference/v1/generate with `prompt_logprobs` where the server opens it, else POST /v1/completions
    sglang       POST /generate with `return_logprob`
    completions  POST /v1/completions with `echo` and `logprobs`, as OpenAI had it

Each reads a reply into `Raw`; `score_check` decides what of it is a score.
"""

from __future__ import annotations

import math
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from understudy.errors import DataError, EngineError, ScoreError
from understudy.http import BadReply, Refused, Reply
from understudy.teachers.remote.score_check import Answer, Raw, no_rows, number, unscored
from understudy.types import Sample, Scores

MAX_SAMPLES = 512
"""Of one request; vLLM takes 1,024 prompts (`VLLM_MAX_COMPLETION_PROMPTS`)."""
MAX_GIVEN = 2**18
"""Numbers in a reply about given ids of one sample: some 8 MB of JSON."""
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

    def parts(self, value: Any) -> list[Any]:
        """Of the reply, one for each sample, in order."""
        ...

    def read(self, sample: Sample, part: Any) -> Raw:
        """Raises BadReply, or LookupError, TypeError, ValueError or AttributeError for another shape."""
        ...


@dataclass(frozen=True)
class VLLM:
    """vLLM's own `prompt_logprobs`. Tested with 0.32; nothing in it is younger than 0.20.

    It writes the text of every token of every row. A server that only scores may be started with `--skip-tokenizer-init`,
    which spares that; it then no longer refuses ids past its vocabulary but dies of them.
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

    def parts(self, value: Any) -> list[Any]:
        """`choices`."""
        return _choices(value)

    def read(self, sample: Sample, part: Any) -> Raw:
        """`prompt_logprobs`: None, then for each token a mapping of ids that holds its own and the likeliest."""
        ids, start = sample.token_ids.tolist(), sample.prompt_length
        if (said := part.get("prompt_token_ids")) is not None and said != ids:
            raise BadReply("the prompt that was scored is not the one that was sent")
        rows = part["prompt_logprobs"]
        if len(rows) != len(ids):
            raise BadReply(f"{len(rows)} places for {len(ids)} tokens")
        return _read_rows(ids[start:], rows[start:])


def _read_rows(ids: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> Raw:
    """Likeliest first, the sampled token, which every row holds, among them; a number that is missing is never cut off."""
    values = [{int(token): number(entry["logprob"]) for token, entry in row.items()} for row in rows]
    if lacking := [token for token, row in zip(ids, values, strict=True) if token not in row]:
        raise BadReply(f"token {lacking[0]} was sent, and other tokens were scored in its place")
    top = [sorted(row.items(), key=lambda item: -math.inf if math.isnan(item[1]) else -item[1]) for row in values]
    return Raw(ids, [row[token] for token, row in zip(ids, values, strict=True)], top)


@dataclass(frozen=True)
class VLLMTokens(VLLM):
    """vLLM's route for token ids, open with `--enable-scale-out`: one sequence a request, and no text is written.

    `prompt_logprobs` is that of the completions. Given ids are `prompt_logprob_token_ids` of 0.32's V2 model runner; earlier
    versions take no notice of them.
    """

    path: str = "/inference/v1/generate"
    given: ClassVar[str] = "prompt_logprob_token_ids"

    def body(self, samples: Sequence[Sample], num_top: int) -> dict[str, Any]:
        """Of the one sample."""
        (sample,) = samples
        return {
            "model": self.model,
            "token_ids": sample.token_ids.tolist(),
            "sampling_params": {"max_tokens": 1, "temperature": 0.0, "detokenize": False, "prompt_logprobs": num_top},
            "return_token_ids": True,
        }

    def body_at(self, samples: Sequence[Sample], ids: Sequence[Tensor]) -> dict[str, Any]:
        """With given ids [R, K]: row i of them belongs to the token behind place `prompt_logprob_start + i`."""
        (sample,), (rows,) = samples, ids
        body = self.body(samples, 0)
        body["sampling_params"] |= {self.given: rows.tolist(), "prompt_logprob_start": sample.prompt_length - 1}
        return body

    def cut(self, sample: Sample, ids: Tensor) -> list[tuple[Sample, Tensor]]:
        """Every row has ids of its own, so nothing is cut; a response without a token is not asked for."""
        return [(sample, ids)] if len(ids) else []

    def parts(self, value: Any) -> list[Any]:
        """The reply is of one sample."""
        return [dict(value)]

    def read_at(self, sample: Sample, part: Any, ids: Tensor) -> Raw:
        """`prompt_token_id_logprobs`: [R, K] in numpy's file format. Raises ScoreError for a server that knows none."""
        if _GIVEN_SCORES not in part:
            raise ScoreError(f"the server took no notice of {self.given}, which vLLM knows from 0.32 on")
        raw = self.read(sample, part)
        values = _read_array(part[_GIVEN_SCORES], tuple(ids.shape))
        return replace(raw, top=[list(zip(*row, strict=True)) for row in zip(ids.tolist(), values, strict=True)])


_GIVEN_SCORES = "prompt_token_id_logprobs"


def _read_array(text: str, shape: tuple[int, ...]) -> list[list[float]]:
    """Raises BadReply for another shape before anything of its size is made, ValueError for what is no array of floats."""
    stream = BytesIO(b64decode(text, validate=True))
    if np.lib.format.read_magic(stream) != (1, 0):
        raise BadReply("the scores of given ids are in an unknown format")
    said, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if said != shape or dtype.kind != "f":
        raise BadReply(f"scores of given ids have shape {said} of {dtype}, not {shape} of floats")
    values = np.frombuffer(stream.read(), dtype).reshape(shape, order="F" if fortran else "C")
    found: list[list[float]] = values.tolist()
    return found


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

    def parts(self, value: Any) -> list[Any]:
        """A list where a list was asked for, which is always."""
        return list(value)

    def read(self, sample: Sample, part: Any) -> Raw:
        """`meta_info`: lists of [logprob, id, text]."""
        return self._read(sample, part["meta_info"], "input_top_logprobs")

    def cut(self, sample: Sample, ids: Tensor) -> list[tuple[Sample, Tensor]]:
        """So that the union of a piece stays small."""
        return cut_given(sample, ids)

    def read_at(self, sample: Sample, part: Any, ids: Tensor) -> Raw:
        """The same with the numbers of the ids that were given."""
        return self._read(sample, part["meta_info"], "input_token_ids_logprobs")

    def _read(self, sample: Sample, facts: Mapping[str, Any], beside: str) -> Raw:
        length, size = sample.token_ids.numel(), sample.num_response_tokens
        if facts.get("prompt_tokens", length) != length:
            raise BadReply(f"{facts['prompt_tokens']} tokens were read of {length}")
        places, rows = facts["input_token_logprobs"], facts.get(beside) or None
        for name, found in (("input_token_logprobs", places), (beside, rows)):
            if found is not None and len(found) != size + 1:
                raise BadReply(f"{name} has {len(found) - 1} places for {size} response tokens")
        return Raw(
            [place[1] for place in places[1:]],
            [number(place[0]) for place in places[1:]],
            None if rows is None else [[(entry[1], number(entry[0])) for entry in row or ()] for row in rows[1:]],
        )


_NO_ROOM = ("max_tokens must be at least 1", "maximum model length")
"""What vLLM says to a sequence that leaves no position for the one token that is generated."""
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

    def parts(self, value: Any) -> list[Any]:
        """`choices`."""
        return _choices(value)

    def read(self, sample: Sample, part: Any) -> Raw:
        """`logprobs`: `tokens` and `token_logprobs`, the first of which is None."""
        ids, start = sample.token_ids.tolist(), sample.prompt_length
        tokens, numbers = part["logprobs"]["tokens"], part["logprobs"]["token_logprobs"]
        if len(tokens) not in (len(ids), len(ids) + 1) or len(numbers) != len(tokens):
            raise BadReply(f"{len(tokens)} tokens and {len(numbers)} numbers came back for {len(ids)} tokens")
        for token, said in zip(ids, tokens, strict=False):
            if not self._is(token, said):
                raise BadReply(f"token {token} was sent, and {said!r} was scored in its place")
        return Raw(ids[start:], [number(value) for value in numbers[start : len(ids)]])

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


def _choices(value: Any) -> list[Any]:
    """In the order of the prompts."""
    choices = sorted(value["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(len(choices))):
        raise BadReply("choices are numbered otherwise than the samples")
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
    reply: Reply,
    samples: Sequence[Sample],
    parts: Callable[[Any], list[Any]],
    judge: Callable[[int, Sample, Any], Answer],
) -> list[Answer]:
    """`judge(index, sample, part)` of each part. Raises BadReply, with server and sample, for everything else."""
    who = reply.url
    try:
        found = parts(reply.json())
        if len(found) != len(samples):
            raise BadReply(f"{len(found)} samples came back for {len(samples)}")
        answers = []
        for index, (sample, part) in enumerate(zip(samples, found, strict=True)):
            who = f"{reply.url}, sample {sample.key}"
            answers.append(judge(index, sample, part))
        return answers
    except BadReply as error:
        raise BadReply(f"{who}: {error}") from None
    except _SHAPE_ERRORS as error:
        raise BadReply(f"{who}: a reply of another shape ({type(error).__name__} {error})") from None


def cut_given(sample: Sample, ids: Tensor) -> list[tuple[Sample, Tensor]]:
    """Its rows [R, K] in pieces, as samples whose prompts reach up to them: their union is asked for at every place, so that
    numbers grow with the square of the rows."""
    rows = max(1, math.isqrt(MAX_GIVEN // ids.shape[1]))
    starts = range(0, len(ids), rows)
    begun = sample.prompt_length
    return [
        (
            replace(sample, token_ids=sample.token_ids[: begun + start + rows], prompt_length=begun + start),
            ids[start : start + rows],
        )
        for start in starts
    ]


def join_given(sample: Sample, ids: Tensor, answers: Sequence[Answer], *, who: str) -> Scores:
    """The pieces of one sample, in order; `Unscored` where one of them is."""
    for answer in answers:
        if answer.scores is None:
            return unscored(sample, ids.shape[1], f"{who}: {answer.missing}")
    found = [answer.scores for answer in answers if answer.scores is not None] or [no_rows(sample, ids.shape[1])]
    names = ("token_ids", "logprob", "topk_ids", "topk_logprob")
    return Scores(**{name: torch.cat([getattr(piece, name) for piece in found]) for name in names})


def named(samples: Sequence[Sample]) -> str:
    """The first by its key, and how many more."""
    rest = f" and {len(samples) - 1} more" if len(samples) > 1 else ""
    return f"sample {samples[0].key}{rest}"


def is_too_long(refused: Refused) -> bool:
    """Whether a sample does not fit the model."""
    return refused.too_long or any(text in refused.message for text in _NO_ROOM)


def refusal(refused: Refused, samples: Sequence[Sample], *, who: str, api_key_env: str) -> ScoreError | EngineError:
    """What to do about a status that stays."""
    longest = max(samples, key=lambda sample: sample.token_ids.numel())
    if is_too_long(refused):
        return ScoreError(
            f"sample {longest.key} has {longest.token_ids.numel()} tokens, which {who} refuses as too long "
            f"({refused.message}): raise its --max-model-len (one more than the longest sample), or lower max_new_tokens"
        )
    locked = f"the key in {api_key_env} is not accepted" if api_key_env else "set teacher.api_key_env"
    hints = {
        401: locked,
        403: locked,
        404: "check teacher.url, teacher.api, and that the server has that model (see its /v1/models)",
    }
    hint = hints.get(refused.status, "check teacher.api, teacher.k_max, and that the ids are those of its tokenizer")
    return EngineError(f"{who} refuses {named(samples)} with {refused}; {hint}")
