"""Messages between a served teacher and its client: safetensors, with the facts in the header.

    GET  /v1/teacher   About as JSON
    GET  /v1/head      weight [V, H], bias [V]?; softcap, scale
    POST /v1/score     ScoreRequest -> ScoreReply

Every tensor of a reply has one row for each response token of all samples, in their order: R rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, PositiveInt, TypeAdapter, ValidationError
from safetensors import SafetensorError

from understudy.lazy import Tensor, safetensors, torch
from understudy.linear.head import LMHead
from understudy.types import Need

FORMAT = 3
CONTENT_TYPE = "application/octet-stream"
ABOUT, HEAD, SCORE = "/v1/teacher", "/v1/head", "/v1/score"
NEEDS: frozenset[Need] = frozenset({"sampled", "topk", "full"})
"""Needs that a request may name."""
TEMPERATURES = (1e-3, 1e3)
MAX_SAMPLES = 65_536
"""Samples in one request."""
_INTEGERS = ("int32",)
_NUMBERS = ("float32", "float64")
_STATES = ("bfloat16", "float16", "float32", "float64")
HEADER_BYTES = 64 * 1024
"""Largest header of a message; reading a longer one would take seconds in which nobody else is answered."""
_LENGTH_BYTES = 8
"""Bytes before a safetensors header, which hold its length."""
FIELDS: dict[str, tuple[tuple[str, ...], int]] = {
    "logprob": (_NUMBERS, 1),
    "entropy": (_NUMBERS, 1),
    "topk_ids": (_INTEGERS, 2),
    "topk_logprob": (_NUMBERS, 2),
    "hidden": (_STATES, 2),
    "likeliest_ids": (_INTEGERS, 2),
    "likeliest_logprob": (_NUMBERS, 2),
    "rank": (_INTEGERS, 1),
}
"""Fields of a reply: dtypes and number of dimensions."""
LIKELIEST = ("likeliest_ids", "likeliest_logprob", "rank")
"""Those for people to look at, on which no score depends."""
IDS = ("topk_ids", "likeliest_ids", "rank")
"""Those that are sent as int32."""

Size = Annotated[int, Field(ge=1, le=2**31)]
Shapes = Mapping[str, tuple[int, ...]]
"""Fields of a reply, each with the shape of its rows."""
StateDType = Literal["bfloat16", "float16", "float32", "float64"]


class ProtocolError(ValueError):
    """Bytes that are not a well-formed message; the text says what is wrong with them."""


@dataclass(frozen=True, kw_only=True)
class About:
    """Description of a served teacher."""

    model: str
    fingerprint: str
    """Hash of configuration, weights and precision of the hidden states."""
    num_rows: PositiveInt
    """Rows of the head, padding included."""
    tokenizer_digest: str
    """`recording.tokenizer_digest`."""
    tokenizer_size: int
    """The highest id, plus one."""
    eos_id: int | None
    hidden_size: PositiveInt
    dtype: StateDType
    """Precision of the weights."""
    hidden_dtype: StateDType
    """Precision in which hidden states are sent."""
    request_bytes: PositiveInt
    """Limit of one request."""
    reply_bytes: PositiveInt
    """Limit of the reply to one request."""
    positions: int | None
    """Tokens of a sequence; None: the model has no limit."""
    format: int = FORMAT

    @staticmethod
    def decode(values: Any) -> About:
        """Reads values of JSON; a later server may say more. Raises ProtocolError for anything else."""
        if not isinstance(values, Mapping) or "format" not in values:
            raise ProtocolError("it is not the description of a served teacher")
        if values["format"] != FORMAT:
            raise ProtocolError(
                f"it speaks format {values['format']!r}, this client {FORMAT}: use the same version of both"
            )
        about: About = _validate(About, values)
        return about


@dataclass(frozen=True, kw_only=True)
class _RequestFacts:
    need: str
    temperature: Annotated[FiniteFloat, Field(ge=TEMPERATURES[0], le=TEMPERATURES[1])]
    vocab_size: Size
    tail_size: Size | None = None
    k: Size | None = None
    likeliest: bool = False


@dataclass(frozen=True, kw_only=True)
class _HeadFacts:
    fingerprint: str
    scale: FiniteFloat
    softcap: FiniteFloat | None = None


def _validate(kind: type[Any], values: Mapping[str, Any]) -> Any:
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ProtocolError(f"{place} is {values.get(place)!r}: {first['msg']}") from error


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoreRequest:
    """Sequences, and what the teacher is to return about their responses."""

    tokens: Tensor
    """[N] int32, the sequences one after another."""
    lengths: Tensor
    """[B] int32; they add up to N."""
    prompt_lengths: Tensor
    """[B] int32, at least 1, at most the length."""
    need: frozenset[Need]
    temperature: float
    vocab_size: int
    absent: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    """[A] int32 ids below `vocab_size` that are no tokens of the client."""
    tail_size: int | None = None
    """Tokens of a softmax that keeps those which the client lacks; None: it is over the client's."""
    k: int | None = None
    """For "topk"."""
    likeliest: bool = False
    """Whether the reply also has the most likely tokens of every row and the rank of the scored one, for people to look at."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.tokens.numel())

    @property
    def kind(self) -> tuple[Any, ...]:
        """Requests of one kind may be answered together, whether or not they ask for the most likely tokens."""
        return (
            tuple(sorted(self.need)),
            self.k,
            self.temperature,
            self.vocab_size,
            (*self.absent.tolist(),),
            self.tail_size,
        )

    def encode(self) -> bytes:
        """Returns the body of a request."""
        tensors = {"tokens": self.tokens, "lengths": self.lengths, "prompt_lengths": self.prompt_lengths}
        if self.absent.numel():
            tensors["absent"] = self.absent
        facts = {"need": ",".join(sorted(self.need)), "temperature": repr(self.temperature)}
        sizes = {"vocab_size": self.vocab_size, "tail_size": self.tail_size, "k": self.k}
        facts |= {name: str(size) for name, size in sizes.items() if size is not None}
        facts |= {"likeliest": "true"} if self.likeliest else {}
        return _write(tensors, facts)

    @staticmethod
    def decode(data: bytes) -> ScoreRequest:
        """Raises ProtocolError for a body that is not well formed."""
        tensors, said = _read(data, needed={"tokens", "lengths", "prompt_lengths"}, allowed={"absent"})
        for name, tensor in tensors.items():
            _check(name, tensor, _INTEGERS, 1)
        facts: _RequestFacts = _validate(_RequestFacts, said)
        need = frozenset(name for name in NEEDS if name in facts.need.split(","))
        if set(facts.need.split(",")) - NEEDS:
            raise ProtocolError(
                f"need is {facts.need!r}; it must be of {', '.join(sorted(NEEDS))}, with commas between"
            )
        if "topk" in need and facts.k is None:
            raise ProtocolError("k is missing; need topk asks for a whole number of at least 1")
        lengths, prompts = tensors["lengths"].long(), tensors["prompt_lengths"].long()
        if not lengths.numel() or prompts.numel() != lengths.numel():
            raise ProtocolError(
                f"{lengths.numel()} lengths and {prompts.numel()} prompt_lengths; there must be one of each a sample"
            )
        if lengths.numel() > MAX_SAMPLES:
            raise ProtocolError(f"{lengths.numel():,} samples; one request holds at most {MAX_SAMPLES:,}")
        wrong = ((prompts < 1) | (prompts > lengths)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise ProtocolError(
                f"sample {at} has length {int(lengths[at])} and prompt length {int(prompts[at])}; a prompt has at least one "
                "token and is not longer than its sequence"
            )
        if int(lengths.sum()) != tensors["tokens"].numel():
            raise ProtocolError(
                f"the lengths add up to {int(lengths.sum())}, and there are {tensors['tokens'].numel()} tokens"
            )
        return ScoreRequest(
            **tensors,
            need=need,
            temperature=facts.temperature,
            vocab_size=facts.vocab_size,
            tail_size=facts.tail_size,
            k=facts.k if "topk" in need else None,
            likeliest=facts.likeliest,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoreReply:
    """A served teacher's scores of the response tokens of one request."""

    fingerprint: str
    token_ids: Tensor
    """[R] int32, those that were scored."""
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    """`logprob`, `entropy` [R], `topk_ids`, `topk_logprob` [R, k], `hidden` [R, H], `likeliest_ids`, `likeliest_logprob`
    [R, at most 5], `rank` [R]."""

    def encode(self) -> bytes:
        """Returns the body of a reply."""
        narrow = {name: value.int() if name in IDS else value for name, value in self.fields.items()}
        return _write({"token_ids": self.token_ids, **narrow}, {"fingerprint": self.fingerprint})

    @staticmethod
    def decode(data: bytes) -> ScoreReply:
        """Raises ProtocolError for half a reply, and for any field of another kind."""
        tensors, facts = _read(data, needed={"token_ids"}, allowed=FIELDS)
        if "fingerprint" not in facts:
            raise ProtocolError("it has no fingerprint")
        token_ids = tensors.pop("token_ids")
        _check("token_ids", token_ids, _INTEGERS, 1)
        for name, tensor in tensors.items():
            _check(name, tensor, *FIELDS[name])
            if len(tensor) != len(token_ids):
                raise ProtocolError(f"{name} has {len(tensor)} rows for {len(token_ids)} tokens")
        return ScoreReply(fingerprint=facts["fingerprint"], token_ids=token_ids, fields=tensors)


def reply_fields(need: Collection[str], *, num_top: int, hidden_size: int, num_likeliest: int = 0) -> Shapes:
    """Returns the fields of a reply to such a request, no more and no fewer, each with the shape of its rows."""
    shapes: dict[str, tuple[int, ...]] = {}
    if {"sampled", "topk"} & set(need):
        shapes |= {"logprob": (), "entropy": ()}
    if "topk" in need:
        shapes |= {"topk_ids": (num_top,), "topk_logprob": (num_top,)}
    if "full" in need:
        shapes["hidden"] = (hidden_size,)
    if num_likeliest and {"sampled", "topk"} & set(need):
        shapes |= {"likeliest_ids": (num_likeliest,), "likeliest_logprob": (num_likeliest,), "rank": ()}
    return shapes


def row_bytes(shapes: Shapes, *, scores: torch.dtype, hidden: torch.dtype) -> int:
    """Returns the bytes of one row of a reply with these fields."""
    types = dict.fromkeys(IDS, torch.int32) | {"hidden": hidden}
    number = torch.promote_types(scores, torch.float32)
    return torch.int32.itemsize + sum(
        math.prod(shape) * types.get(name, number).itemsize for name, shape in shapes.items()
    )


def write_head(head: LMHead, fingerprint: str) -> bytes:
    """Returns weight and bias as they are, every row; temperature and vocabulary are the client's."""
    tensors = {"weight": head.weight.detach()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach()
    facts = {"fingerprint": fingerprint, "scale": repr(head.scale)}
    return _write(tensors, facts | ({} if head.softcap is None else {"softcap": repr(head.softcap)}))


def read_head(data: bytes) -> tuple[LMHead, str]:
    """Returns the head and the teacher's fingerprint. Raises ProtocolError."""
    tensors, said = _read(data, needed={"weight"}, allowed={"bias"})
    for name, tensor in tensors.items():
        _check(name, tensor, _STATES, 2 if name == "weight" else 1)
    facts: _HeadFacts = _validate(_HeadFacts, said)
    try:
        return LMHead(tensors["weight"], tensors.get("bias"), facts.softcap, facts.scale), facts.fingerprint
    except ValueError as error:
        raise ProtocolError(f"it is not a head: {error}") from error


def _write(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> bytes:
    data: bytes = safetensors.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, dict(facts))
    return data


def _read(
    data: bytes, *, needed: Collection[str], allowed: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns tensors and the header's facts. Raises ProtocolError for other bytes and other tensors."""
    size = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if size > min(HEADER_BYTES, len(data)):
        raise ProtocolError(f"it is not a safetensors message with a header of at most {HEADER_BYTES:,} bytes")
    try:
        tensors: dict[str, Tensor] = safetensors.load(data)
        header = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + size])
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise ProtocolError(f"it is not a safetensors message of known tensors ({type(error).__name__})") from error
    missing, unknown = sorted(set(needed) - tensors.keys()), sorted(tensors.keys() - set(needed) - set(allowed))
    if missing or unknown:
        raise ProtocolError(f"it lacks {missing or 'nothing'} and has {unknown or 'nothing'} that was not asked for")
    return tensors, header.get("__metadata__") or {}


def _check(name: str, tensor: Tensor, dtypes: Collection[str], dims: int) -> None:
    found = str(tensor.dtype).removeprefix("torch.")
    if found not in dtypes or tensor.dim() != dims:
        wanted = " or ".join(dtypes)
        raise ProtocolError(f"{name} is {found} with {tensor.dim()} dimensions; it must be {wanted} with {dims}")
