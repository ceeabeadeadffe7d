"""What a served teacher and its client send each other: safetensors, with the facts in the header.

    GET  /v1/teacher   About as JSON
    GET  /v1/head      weight [V, H], bias [V]?; softcap, scale
    POST /v1/score     Ask -> Answer

Every tensor has one row for each response token of all samples, in their order: R rows.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from understudy.linear.head import LMHead

FORMAT = 1
CONTENT_TYPE = "application/octet-stream"
ABOUT, HEAD, SCORE = "/v1/teacher", "/v1/head", "/v1/score"
NEEDS = frozenset({"sampled", "topk", "full", "given"})
"""What can be asked; "given" are log-probabilities at the client's own ids."""
TEMPERATURES = (1e-3, 1e3)
MAX_SAMPLES = 65_536
"""In one request."""
_INTEGERS = (torch.int32,)
_NUMBERS = (torch.float32, torch.float64)
_STATES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_HEADER_BYTES = 64 * 1024
"""Of what is said beside the tensors; to read more would take seconds in which nobody else is answered."""
_LENGTH_BYTES = 8
"""Of the header's own length, before it."""


class FrameError(ValueError):
    """Bytes that are no such message; says what is wrong with them."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    request_bytes: int
    reply_bytes: int
    batch_tokens: int
    """Of one forward; larger requests are cut."""
    positions: int | None
    """Tokens of a sequence; None: the model has no limit."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The teacher's tokenizer."""

    digest: str
    """`recording.tokenizer_digest`."""
    size: int
    """The highest id, and one."""
    eos_id: int | None
    chat_template: str | None
    """Hash of its text."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a served teacher is."""

    model: str
    fingerprint: str
    """Of configuration, weights and precision of the hidden states."""
    num_rows: int
    """Of the head, padding included."""
    tokenizer: Tokens
    hidden_size: int
    dtype: str
    """Of the weights."""
    hidden_dtype: str
    """In which hidden states are sent."""
    limits: Limits
    format: int = FORMAT

    def encode(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def decode(values: Any) -> About:
        """Raises FrameError for anything but what `encode` gives, or another format."""
        if not isinstance(values, Mapping) or "fingerprint" not in values or "format" not in values:
            raise FrameError("it is no description of a served teacher")
        if values["format"] != FORMAT:
            raise FrameError(
                f"it speaks format {values['format']!r}, this client {FORMAT}: use the same version of both"
            )
        try:
            inner = {"tokenizer": _known(Tokens, values["tokenizer"]), "limits": _known(Limits, values["limits"])}
            about: About = _known(About, {**values, **inner})
        except (TypeError, KeyError, AttributeError) as error:
            raise FrameError(f"its description lacks something ({error})") from error
        sizes = about.num_rows, about.hidden_size, about.limits.request_bytes, about.limits.reply_bytes
        if not isinstance(about.fingerprint, str) or not all(type(size) is int and size > 0 for size in sizes):
            raise FrameError("its description has a fingerprint, a size or a limit that is none")
        if not {about.dtype, about.hidden_dtype} <= {str(dtype).removeprefix("torch.") for dtype in _STATES}:
            raise FrameError(f"it has weights in {about.dtype!r} and sends {about.hidden_dtype!r}, which are not known")
        return about


def _known(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """A later server may say more."""
    names = {item.name for item in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})


@dataclass(frozen=True, eq=False, kw_only=True)
class Ask:
    """Sequences, and what is to be said about their responses."""

    tokens: Tensor
    """[N] int32, the sequences one after another."""
    lengths: Tensor
    """[B] int32; they add up to N."""
    prompt_lengths: Tensor
    """[B] int32, at least 1, at most the length."""
    need: frozenset[str]
    temperature: float
    vocab_size: int
    k: int | None = None
    """Of "topk"."""
    ids: Tensor | None = None
    """[R, K] int32, of "given"."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.tokens.numel())

    @property
    def num_rows(self) -> int:
        """R."""
        return self.num_tokens - int(self.prompt_lengths.long().sum())

    @property
    def kind(self) -> tuple[Any, ...]:
        """Requests of one kind may be answered together."""
        return tuple(sorted(self.need)), self.k, self.temperature, self.vocab_size

    def encode(self) -> bytes:
        """The body of a request."""
        tensors = {"tokens": self.tokens, "lengths": self.lengths, "prompt_lengths": self.prompt_lengths}
        if self.ids is not None:
            tensors["ids"] = self.ids
        said = {
            "need": ",".join(sorted(self.need)),
            "temperature": repr(self.temperature),
            "vocab_size": str(self.vocab_size),
        }
        if self.k is not None:
            said["k"] = str(self.k)
        return _write(tensors, said)

    @staticmethod
    def decode(data: bytes) -> Ask:
        """Raises FrameError, saying what is wrong, for a body that is not well formed."""
        tensors, said = _read(data)
        _check_names(tensors, {"tokens", "lengths", "prompt_lengths"}, {"ids"})
        for name, tensor in tensors.items():
            _check(name, tensor, _INTEGERS, 2 if name == "ids" else 1)
        need = frozenset(said.get("need", "").split(","))
        if need - NEEDS:
            raise FrameError(
                f"need is {said.get('need')!r}; it must be of {', '.join(sorted(NEEDS))}, with commas between"
            )
        temperature = _number(said, "temperature")
        if not TEMPERATURES[0] <= temperature <= TEMPERATURES[1]:
            raise FrameError(
                f"temperature is {temperature:g}; it must lie in [{TEMPERATURES[0]:g}, {TEMPERATURES[1]:g}]"
            )
        ask = Ask(
            tokens=tensors["tokens"],
            lengths=tensors["lengths"],
            prompt_lengths=tensors["prompt_lengths"],
            need=need,
            temperature=temperature,
            vocab_size=_whole(said, "vocab_size"),
            k=_whole(said, "k") if "topk" in need else None,
            ids=tensors.get("ids"),
        )
        _check_lengths(ask)
        return ask


def _check_lengths(ask: Ask) -> None:
    lengths, prompts = ask.lengths.long(), ask.prompt_lengths.long()
    if not lengths.numel() or prompts.numel() != lengths.numel():
        raise FrameError(
            f"{lengths.numel()} lengths and {prompts.numel()} prompt_lengths; there must be one of each a sample"
        )
    if lengths.numel() > MAX_SAMPLES:
        raise FrameError(f"{lengths.numel():,} samples; one request holds at most {MAX_SAMPLES:,}")
    wrong = ((prompts < 1) | (prompts > lengths)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise FrameError(
            f"sample {at} has length {int(lengths[at])} and prompt length {int(prompts[at])}; a prompt has at least one "
            "token and is not longer than its sequence"
        )
    if int(lengths.sum()) != ask.num_tokens:
        raise FrameError(f"the lengths add up to {int(lengths.sum())}, and there are {ask.num_tokens} tokens")
    if (ask.ids is None) == ("given" in ask.need):
        raise FrameError("ids come with need given, and with no other")
    if ask.ids is not None and (len(ask.ids) != ask.num_rows or ask.ids.shape[1] < 1):
        raise FrameError(f"ids is {list(ask.ids.shape)}; it needs a row for each of {ask.num_rows} response tokens")


@dataclass(frozen=True, eq=False, kw_only=True)
class Answer:
    """What a served teacher says about the response tokens of one request."""

    fingerprint: str
    token_ids: Tensor
    """[R] int32, those that were scored."""
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    """`logprob`, `entropy` [R], `topk_ids`, `topk_logprob` [R, k], `hidden` [R, H], `given_logprob` [R, K]."""

    def encode(self) -> bytes:
        """The body of a reply."""
        narrow = {name: value.int() if name == "topk_ids" else value for name, value in self.fields.items()}
        return _write({"token_ids": self.token_ids, **narrow}, {"fingerprint": self.fingerprint})

    @staticmethod
    def decode(data: bytes) -> Answer:
        """Raises FrameError for half a reply, and for any field of another kind."""
        tensors, said = _read(data)
        _check_names(tensors, {"token_ids"}, _KINDS)
        if "fingerprint" not in said:
            raise FrameError("it has no fingerprint")
        token_ids = tensors.pop("token_ids")
        _check("token_ids", token_ids, _INTEGERS, 1)
        for name, tensor in tensors.items():
            _check(name, tensor, *_KINDS[name])
            if len(tensor) != len(token_ids):
                raise FrameError(f"{name} has {len(tensor)} rows for {len(token_ids)} tokens")
        return Answer(fingerprint=said["fingerprint"], token_ids=token_ids, fields=tensors)


_KINDS: dict[str, tuple[tuple[torch.dtype, ...], int]] = {
    "logprob": (_NUMBERS, 1),
    "entropy": (_NUMBERS, 1),
    "topk_ids": (_INTEGERS, 2),
    "topk_logprob": (_NUMBERS, 2),
    "given_logprob": (_NUMBERS, 2),
    "hidden": (_STATES, 2),
}


def fields_of(need: Collection[str]) -> frozenset[str]:
    """The fields of an answer to such a request, no more and no fewer."""
    found = {"logprob", "entropy"} if {"sampled", "topk"} & set(need) else set()
    if "topk" in need:
        found |= {"topk_ids", "topk_logprob"}
    if "full" in need:
        found.add("hidden")
    if "given" in need:
        found.add("given_logprob")
    return frozenset(found)


def row_bytes(
    need: Collection[str], *, scores: torch.dtype, hidden: torch.dtype, hidden_size: int, num_top: int, num_given: int
) -> int:
    """Of an answer's tensors, for each response token, and of the hidden state that given ids are scored from."""
    names, size = fields_of(need), torch.promote_types(scores, torch.float32).itemsize
    row = torch.int32.itemsize
    if "logprob" in names:
        row += 2 * size
    if "topk_ids" in names:
        row += num_top * (size + torch.int32.itemsize)
    if "hidden" in names:
        row += hidden_size * hidden.itemsize
    if "given" in need:
        row += hidden_size * scores.itemsize
    return row + num_given * size


def write_head(head: LMHead, fingerprint: str) -> bytes:
    """Weight and bias as they are, every row; temperature and vocabulary are the client's."""
    tensors = {"weight": head.weight.detach()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach()
    said = {"fingerprint": fingerprint, "scale": repr(head.scale)}
    if head.softcap is not None:
        said["softcap"] = repr(head.softcap)
    return _write(tensors, said)


def read_head(data: bytes) -> tuple[LMHead, str]:
    """The head and whose it is. Raises FrameError."""
    tensors, said = _read(data)
    _check_names(tensors, {"weight"}, {"bias"})
    for name, tensor in tensors.items():
        _check(name, tensor, _STATES, 2 if name == "weight" else 1)
    try:
        softcap = _number(said, "softcap") if "softcap" in said else None
        head = LMHead(tensors["weight"], tensors.get("bias"), softcap, _number(said, "scale"))
    except FrameError:
        raise
    except ValueError as error:
        raise FrameError(f"it is no head: {error}") from error
    if "fingerprint" not in said:
        raise FrameError("it has no fingerprint")
    return head, said["fingerprint"]


def _write(tensors: Mapping[str, Tensor], said: Mapping[str, str]) -> bytes:
    data: bytes = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, dict(said))
    return data


def _read(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and the header's facts. Raises FrameError for what is no safetensors."""
    size = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if size > min(_HEADER_BYTES, len(data)):
        raise FrameError(f"it is no safetensors message with a header of at most {_HEADER_BYTES:,} bytes")
    try:
        tensors: dict[str, Tensor] = load(data)
        header = json.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + size])
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise FrameError(f"it is no safetensors message of tensors that are known ({type(error).__name__})") from error
    return tensors, header.get("__metadata__") or {}


def _check_names(tensors: Mapping[str, Tensor], needed: Collection[str], allowed: Collection[str]) -> None:
    missing, unknown = sorted(set(needed) - tensors.keys()), sorted(tensors.keys() - set(needed) - set(allowed))
    if missing or unknown:
        raise FrameError(f"it lacks {missing or 'nothing'} and has {unknown or 'nothing'} that nobody asked for")


def _check(name: str, tensor: Tensor, dtypes: Collection[torch.dtype], dims: int) -> None:
    if tensor.dtype not in dtypes or tensor.dim() != dims:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = str(tensor.dtype).removeprefix("torch.")
        raise FrameError(f"{name} is {found} with {tensor.dim()} dimensions; it must be {wanted} with {dims}")


def _number(said: Mapping[str, str], name: str) -> float:
    try:
        value = float(said[name])
    except (KeyError, ValueError) as error:
        raise FrameError(f"{name} is {said.get(name)!r}; it must be a number") from error
    if not isfinite(value):
        raise FrameError(f"{name} is {said[name]!r}; it must be finite")
    return value


def _whole(said: Mapping[str, str], name: str) -> int:
    text = said.get(name, "")
    if not (text.isascii() and text.isdigit() and 0 < len(text) <= len(str(2**31))) or int(text) < 1:
        raise FrameError(f"{name} is {said.get(name)!r}; it must be a whole number of at least 1")
    return int(text)
