"""What servers are asked for the scores of given tokens, and what they reply: no network and no model.

    vllm         POST /v1/completions with `prompt_logprobs`
    sglang       POST /generate with `return_logprob`
    completions  POST /v1/completions with `echo` and `logprobs`, as OpenAI had it

Each reads a reply into `Raw`; one `check` decides what of it is a score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from understudy.errors import DataError
from understudy.packing import Unscored
from understudy.types import Sample, Scores
from understudy.wire import BadReply

TOLERANCE = 1e-4
"""How far above 0 a log-probability may lie, which is then taken as 0: a float32 log-softmax rounds by less."""
AGREEMENT = 1e-3
"""How far two numbers for one token in one reply may lie apart; more, and the rows belong to other tokens."""
LEAST_LOGPROB = -9999.0
"""What vLLM writes for minus infinity, which JSON has not (`clamp_prompt_logprobs`): no score either."""
MAX_FOREIGN_MASS = 0.01
"""Of a teacher's probability on ids that the student lacks, at any one token.

Padding rows hold some e^-10, so scores are left as the server's softmax has them: what all such ids hold together is not
known from a top-K reply, and a top-K that is scaled up beside a sampled score that is not would be two distributions. A
teacher that means such an id is no teacher of that token.
"""
MAX_SAMPLES = 512
"""Of one request; vLLM takes 1,024 prompts (`VLLM_MAX_COMPLETION_PROMPTS`)."""

Spellings = Callable[[int], frozenset[str]]
"""Every text that a server may write for a token."""


@dataclass(frozen=True, eq=False)
class Raw:
    """What a server says about one sample, one row for each response token."""

    token_ids: Sequence[int]
    """[R] the ids that it scored."""
    logprob: Sequence[Any]
    """[R] numbers; None where there is none."""
    top: Sequence[Sequence[tuple[int, Any]]] | None = None
    """[R] its likeliest tokens in its order, beside their numbers; or those that were asked for by id."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What became of one sample of a reply."""

    scores: Scores | None
    missing: str = ""
    """Why there are none."""
    short: int = 0
    """Entries of a top-K row that fell to ids past the student's vocabulary and must be asked for beyond K."""


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
    values = [{int(token): _number(entry["logprob"]) for token, entry in row.items()} for row in rows]
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
                    [_number(place[0]) for place in places[1:]],
                    None if rows is None else [[(entry[1], _number(entry[0])) for entry in row] for row in rows[1:]],
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
            found.append(Raw(ids[start:], [_number(number) for number in numbers[start : len(ids)]]))
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


def check(sample: Sample, raw: Raw, *, k: int | None, num_top: int, vocab_size: int) -> Answer:
    """Scores of the ids that were sent, finite, at most 0, with `k` distinct likeliest tokens in descending order.

    `num_top`: how many were asked for, at least `k`. Ids past `vocab_size` are dropped (see `MAX_FOREIGN_MASS`).
    Raises BadReply for what no honest reply holds; a score that is missing is no number but a reason.
    """
    wanted = sample.response_ids
    said = torch.tensor(list(raw.token_ids), dtype=torch.int64)
    if not torch.equal(said, wanted):
        raise BadReply(
            f"sample {sample.key}: {len(said)} tokens came back that are not the {len(wanted)} that were sent"
        )
    logprob = _numbers(raw.logprob)
    if len(logprob) != len(wanted):
        raise BadReply(f"sample {sample.key}: {len(logprob)} scores for {len(wanted)} response tokens")
    _check_sign(sample, logprob)
    if k is None:
        return _lacking("logprob", logprob) or Answer(Scores(wanted, logprob.clamp(max=0).float()))
    ids, values = _top_rows(sample, raw, num_top)
    if lacking := _lacking("logprob", logprob) or _lacking("topk_logprob", values):
        return lacking
    _check_top(sample, wanted, logprob, ids, values)
    foreign = ids >= vocab_size
    mass = (values.exp() * foreign).sum(-1)
    if bool((mass > MAX_FOREIGN_MASS).any()):
        row = int(mass.argmax())
        return Answer(
            None,
            f"the teacher gives {float(mass[row]):.2g} of its probability at response token {row} to ids past the student's "
            f"{vocab_size} tokens, such as {int(ids[row][foreign[row]][0])}: its vocabulary is another",
        )
    short = int((k - (~foreign).sum(-1)).max()) if len(ids) else 0
    if short > 0:
        return Answer(None, f"{short} of {num_top} likeliest tokens are past the student's vocabulary", short)
    # what is kept moves to the front in its order
    order = foreign.to(torch.int8).argsort(dim=-1, stable=True)[:, :k]
    top = values.gather(-1, order).clamp(max=0).float()
    return Answer(Scores(wanted, logprob.clamp(max=0).float(), ids.gather(-1, order), top))


def check_at(sample: Sample, raw: Raw, ids: Tensor) -> Answer:
    """The same with the numbers of given ids [R, K] in their order."""
    answer = check(sample, Raw(raw.token_ids, raw.logprob), k=None, num_top=0, vocab_size=0)
    if answer.scores is None:
        return answer
    rows = [dict(row) for row in raw.top or ()]
    if len(rows) != len(ids) or any(
        int(token) not in row for row, asked in zip(rows, ids, strict=True) for token in asked
    ):
        raise BadReply(f"sample {sample.key}: not all of the ids that were asked for came back")
    values = _numbers([row[int(token)] for row, asked in zip(rows, ids, strict=True) for token in asked])
    values = values.reshape(ids.shape)
    _check_sign(sample, values)
    scores = Scores(answer.scores.token_ids, answer.scores.logprob, ids, values.clamp(max=0).float())
    return _lacking("topk_logprob", values) or Answer(scores)


def _lacking(name: str, values: Tensor) -> Answer | None:
    """What is wrong with numbers [R] or [R, K] that are not all finite; None where they are."""
    missing = ~values.isfinite() | (values <= LEAST_LOGPROB)
    rows = missing.reshape(len(values), -1).any(-1).nonzero()
    if not len(rows):
        return None
    return Answer(None, f"{name} of response token {int(rows[0])} (and {len(rows) - 1} more) is not finite")


def _check_sign(sample: Sample, values: Tensor) -> None:
    if bool((values > TOLERANCE).any()):
        raise BadReply(f"sample {sample.key}: {float(values[values > TOLERANCE][0])} is above 0, so no log-probability")


def _top_rows(sample: Sample, raw: Raw, num_top: int) -> tuple[Tensor, Tensor]:
    """[R, num_top] ids and numbers, cut to what was asked for: vLLM adds the sampled token to its likeliest."""
    rows = raw.top
    if rows is None or len(rows) != len(raw.token_ids):
        raise BadReply(f"sample {sample.key}: {0 if rows is None else len(rows)} rows for {len(raw.token_ids)} tokens")
    if few := [row for row in rows if len(row) < num_top]:
        raise BadReply(f"sample {sample.key}: {len(few[0])} likeliest tokens came back where {num_top} were asked for")
    ids = torch.tensor([[token for token, _ in row[:num_top]] for row in rows], dtype=torch.int64)
    values = _numbers([number for row in rows for _, number in row[:num_top]])
    ids, values = ids.reshape(len(rows), num_top), values.reshape(len(rows), num_top)
    if bool((ids < 0).any()) or (num_top > 1 and bool((ids.sort(-1).values.diff(dim=-1) == 0).any())):
        raise BadReply(f"sample {sample.key}: a row of likeliest tokens names a token twice, or none")
    _check_sign(sample, values)
    return ids, values


def _check_top(sample: Sample, wanted: Tensor, logprob: Tensor, ids: Tensor, values: Tensor) -> None:
    """Rows are descending, and the sampled token agrees with them: it is among them, or below them all."""
    if bool((values.diff(dim=-1) > 0).any()):
        raise BadReply(f"sample {sample.key}: the likeliest tokens are not in descending order")
    same = ids == wanted[:, None]
    other = torch.where(same, values, 0.0).sum(-1)
    wrong = torch.where(same.any(-1), (other - logprob).abs() > AGREEMENT, logprob > values[:, -1] + AGREEMENT)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise BadReply(
            f"sample {sample.key}, response token {row}: its log-probability {float(logprob[row]):.4f} contradicts the row of "
            "likeliest tokens beside it"
        )


def _numbers(values: Sequence[Any]) -> Tensor:
    """float64: rounding is left to the end."""
    return torch.tensor([_number(value) for value in values], dtype=torch.float64)


def _number(value: Any) -> float:
    """NaN for what is not there. Raises TypeError for what is no number."""
    if value is None:
        return math.nan
    if type(value) not in (float, int):
        raise TypeError(f"{value!r} stands where a number should")
    return float(value)


def _choices(value: Any, count: int) -> list[Any]:
    """`choices` in the order of the prompts."""
    choices = sorted(value["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(count)):
        raise BadReply(f"{len(choices)} choices came back for {count} samples")
    return choices


def unscored(sample: Sample, k: int | None, reason: str) -> Unscored:
    """NaN, and id -1, in every row; `k`: of a top-K row, None for none. Entropies, which no server gives, stay absent."""
    size, nan = sample.num_response_tokens, math.nan
    if k is None:
        return Unscored(sample.response_ids, torch.full((size,), nan), reason=reason)
    ids, values = torch.full((size, k), -1), torch.full((size, k), nan)
    return Unscored(sample.response_ids, torch.full((size,), nan), ids, values, reason=reason)


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
