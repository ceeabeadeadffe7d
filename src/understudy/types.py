"""Frozen records passed between components; they hold no model or engine.

Shape legend: L tokens of one sample, R = L - prompt_length response tokens, T packed response tokens of a batch,
K top tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from hashlib import blake2b
from operator import itemgetter
from typing import Any, Literal, TypeVar

from understudy.errors import check_range
from understudy.lazy import Tensor, torch

EXCLUDED = -9999.0
"""A log-probability at or below this is of a token with probability 0, which its model excludes: -inf, or what stands for it
where a format lacks it (vLLM clamps to this number)."""

IMAGE = "\ufffc"
"""Stands in a message for an image of the prompt: Unicode's object replacement character."""

Need = Literal["none", "sampled", "topk", "full", "verbal", "reference"]
"""Scores that a method asks for: none, log T of sampled tokens, the teacher's top K, whole rows, a judge's digit, log R."""
Finish = Literal["stop", "length", "data", "environment", "rewritten"]
Rejected = Literal["resample", "revise", "continue"]
"""Fate of an answer that a judge rejects at test time: drawn again, or its accepted steps kept and the rest written anew, by
the student or by the teacher."""


class Author(IntEnum):
    """Author of a token."""

    PROMPT = 0
    STUDENT = 1
    TEACHER = 2
    ENVIRONMENT = 3


@dataclass(frozen=True)
class Image:
    """An image of a prompt as it is stored: a file, or its bytes. Whoever reads it decodes it."""

    path: str | None = None
    data: bytes | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The file, or a hash of the bytes."""
        return self.path or blake2b(self.data or b"", digest_size=16).hexdigest()


@dataclass(frozen=True)
class ImageSpan:
    """A sequence with images among others in rows of slots."""

    start: int
    """Its first slot, as an index into B * L."""
    length: int
    images: tuple[Image, ...]


@dataclass(frozen=True)
class Segment:
    """Slots of a row that hold one sequence, or the rest of one that begins in slots of other segments."""

    start: int
    stop: int
    before: tuple[tuple[int, int], ...] = ()
    """First slot and end of each piece before it, in order; pieces begin where segments do. Empty: nothing is before it."""


@dataclass(frozen=True)
class Prompt:
    """One problem as a task states it, before any tokenizer.

    `id` is stable over runs; randomness and overlap checks are keyed by it. Exactly one of `text` (fed to the
    tokenizer as it is) and `messages` (fed through the chat template) is given.
    """

    id: str
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    """Each with `role` and `content`, both strings, and perhaps `tool_calls` (OpenAI's, with a mapping as arguments),
    `tool_call_id`, `name`, `reasoning_content`; nothing in it is null."""
    tools: tuple[Mapping[str, Any], ...] | None = None
    """Schemas of the tools that the student may call, for the chat template."""
    images: tuple[Image, ...] = ()
    """In the order in which `IMAGE` stands for them in the messages, once for each; none in a prompt of plain text."""
    quoted: tuple[str, ...] = ()
    """The parts of `text` that come from data: special tokens that they spell are text. Empty: all of it does."""
    reference: tuple[str, ...] | None = None
    """The accepted final answers, the first the one to show; a response is right if a verifier finds it equal to any. A
    lone string becomes the only one."""
    solution: str | None = None
    """A whole response to imitate, for SFT and off-policy shares."""
    teacher: str | None = None
    """Name of the teacher that scores samples of this prompt; None: the only one."""
    max_new_tokens: int | None = None
    """Tokens after which its responses are cut off, where the sampling allows more; None: as the sampling has it."""
    stop: tuple[str, ...] = ()
    """Its responses also end with the token that completes one of these strings."""

    def room(self, max_new_tokens: int) -> int:
        """Tokens of a response, of `max_new_tokens` that the sampling allows."""
        return max_new_tokens if self.max_new_tokens is None else min(max_new_tokens, self.max_new_tokens)

    def __post_init__(self) -> None:
        given: object = self.reference
        if isinstance(given, str):
            object.__setattr__(self, "reference", (given,))

    @property
    def conversation(self) -> str:
        """The prompt to read: its text, its only message, or all messages with their roles and tool calls; images by name."""
        if self.messages is None:
            return self.text or ""
        if len(self.messages) == 1:
            shown = str(self.messages[0]["content"])
        else:
            said = []
            for message in self.messages:
                calls = [json.dumps(call.get("function", call)) for call in message.get("tool_calls", ())]
                said.append(f"{message['role']}: " + "\n".join([str(message["content"]), *calls]).strip())
            shown = "\n\n".join(said)
        for image in self.images:
            shown = shown.replace(IMAGE, f"[image {image.name}]", 1)
        return shown


@dataclass(frozen=True)
class ToolCall:
    """A tool call as a model wrote it."""

    text: str
    """The text between the tags."""
    name: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    """Why the call cannot be made; empty where it can."""


@dataclass(frozen=True)
class Message:
    """One message of the student, read from its tokens."""

    text: str
    """All of it, without special tokens except those that mark a tool call."""
    content: str
    """`text` without reasoning and tool calls."""
    reasoning: str | None = None
    """The thoughts before the content; None if the template has no thinking mode, or nothing was thought."""
    tool_calls: tuple[ToolCall, ...] = ()
    tagged: ToolCall | None = None
    """The first `<search>...</search>` or `<answer>...</answer>` of `text`, as search agents write them: the name of the tag
    and what stands in it."""
    ended: bool = True
    """Whether a token that ends a response is its last."""


@dataclass(frozen=True)
class Grade:
    """A verifier's verdict: `score` in [0, 1], the answer that it read (None: none found) and, if it failed, why."""

    score: float
    answer: str | None = None
    note: str = ""
    also: Mapping[str, float | tuple[int, int]] = field(default_factory=dict)
    """Other scores of the same response in [0, 1], by name; an evaluation reports their means beside the score. A pair, so many
    of so many, counts over all problems together."""

    @property
    def right(self) -> bool:
        """Whether the score is the full one."""
        return self.score >= 1.0


@dataclass(frozen=True)
class Verdict:
    """A verbal teacher's score of a sample: a number from 0 to 9, and nothing else."""

    score: float | None
    """In [0, 9]; the lowest of `steps` where each step was judged. None: the reply had no digit, so there is no score."""
    steps: tuple[float, ...] = ()
    """One number for each step of the response; empty where the response was judged as a whole."""
    step_starts: tuple[int, ...] = ()
    """First character of each of `steps` in the student's message that it is part of; of a single turn, in `Sample.text`."""
    signal_bytes: int = 0
    """Bytes of teacher signal that were read: one for a digit, 40 for the ten float32 probabilities of an expectation."""
    attempts: int = 1
    """Number of judge queries."""
    note: str = ""
    """Why there is no score."""


@dataclass(frozen=True, eq=False)
class Scores:
    """A teacher's scores of one sample. Row j concerns response token j, given everything before it.

    A teacher fills the fields that it was asked for and leaves the rest None. A value that it could not give is NaN, never
    0.0. A log-probability of -inf is a score: the teacher excludes the token.
    """

    token_ids: Tensor
    """[R] the ids that were scored; `packing.attach_scores` compares them with the sample's."""
    logprob: Tensor | None = None
    """[R] log T(y_t)."""
    topk_ids: Tensor | None = None
    """[R, K] int64."""
    topk_logprob: Tensor | None = None
    """[R, K] from the full softmax."""
    entropy: Tensor | None = None
    """[R] nats."""
    hidden: Tensor | None = None
    """[R, H_t] the teacher's final hidden states that predict the tokens; whole rows of logits are computed from them with
    its head."""
    likeliest_ids: Tensor | None = None
    """[R, at most 5] int64, the most likely tokens of a sample with `keep_tokens`, for people to look at; no method reads
    them. Rows without any are -1."""
    likeliest_logprob: Tensor | None = None
    """[R, at most 5] log T at `likeliest_ids`."""
    rank: Tensor | None = None
    """[R] int64, the place of the scored token among all, 1 the most likely; -1 where it is not known."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One response to one prompt, with its own facts. Per-token tensors are on the CPU and have length L.

    This is the one record of a rollout: what is learnt about it later (reward, advantage, verdict, scores) is set by
    `replace`.
    """

    prompt: Prompt
    index: int
    """Its number among the samples of this prompt, from 0."""
    token_ids: Tensor
    """[L] int64, prompt and response."""
    author: Tensor
    """[L] uint8, values of `Author`."""
    prompt_length: int
    finish: Finish
    """"stop": ended by itself (the terminating EOS is among the tokens), or at a string of `Request.stop`; "length":
    truncated, or out of turns; "data": from a file; "environment": the environment failed; "rewritten": the chat template
    would rewrite earlier turns, so the episode ended there."""
    text: str
    """The response decoded, without special tokens; of several turns the student's last message, which is what is graded."""
    rollout_logprob: Tensor | None = None
    """[L] float32, log-probability under the unfiltered distribution that sampled the token; NaN where none did."""
    policy_version: Tensor | None = None
    """[L] int64, the number of optimizer updates in the weights that sampled the token; -1 where none did."""
    teacher: str | None = None
    """Name of the teacher that scores it; None: the only one."""
    reward: float | None = None
    """The quantity that a policy gradient maximises; None: none was given."""
    grade: Grade | None = None
    """From the environment or the verifier; None: it was not graded."""
    advantage: float | None = None
    """The reward compared with those of the same prompt's other samples."""
    verdict: Verdict | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    """Said after the prompt, by the student and its environment in turn; empty where nobody answers the student."""
    scores: Scores | None = None
    """From the teacher; None: it was not asked. `packing.attach_scores` checks and sets them."""
    reference_scores: Scores | None = None
    """From the reference model."""
    keep_tokens: bool = False
    """Whether a teacher that has its rows at hand also says what it finds most likely (`Scores.likeliest_ids`)."""

    @property
    def key(self) -> str:
        """A name for errors, and for the sample's random draws."""
        return f"{self.prompt.id}#{self.index}"

    @property
    def num_response_tokens(self) -> int:
        return int(self.token_ids.numel()) - self.prompt_length

    @property
    def num_written_tokens(self) -> int:
        """Response tokens that the student or a teacher wrote."""
        return int((self.author[self.prompt_length :] != Author.ENVIRONMENT).sum())

    @property
    def conversation(self) -> str:
        """The whole response to read: its text, or all messages with their roles where an environment answered."""
        if len(self.messages) <= 1:
            return self.text
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.messages)

    @property
    def truncated(self) -> bool:
        return self.finish == "length"

    @property
    def response_ids(self) -> Tensor:
        """[R] int64."""
        return self.token_ids[self.prompt_length :]


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """T packed response tokens. Row t of every field concerns token `target[t]`, so nothing after packing shifts positions.

    Optional fields are None when nobody asked for them. A NaN in a trained row of a score is an error; a teacher's or a
    reference's -inf (any number up to `EXCLUDED`) says that it excludes the token. Raises ValueError for a field with another
    number of rows than `target`.
    """

    target: Tensor
    """[T] int64, the sampled tokens y_t."""
    mask: Tensor
    """[T] bool, tokens that are trained."""
    on_policy: Tensor
    """[T] bool, tokens that the student wrote."""
    sequence: Tensor
    """[T] int64, which sample a token belongs to."""
    student_logprob: Tensor | None = None
    """[T] log S_old(y_t)."""
    rollout_logprob: Tensor | None = None
    """[T] log mu(y_t)."""
    teacher_logprob: Tensor | None = None
    """[T] log T(y_t)."""
    reference_logprob: Tensor | None = None
    """[T] log R(y_t)."""
    topk_ids: Tensor | None = None
    """[T, K] int64."""
    topk_logprob: Tensor | None = None
    """[T, K] log T at `topk_ids`, from the full softmax."""
    teacher_entropy: Tensor | None = None
    """[T] nats."""
    student_entropy: Tensor | None = None
    """[T] nats, under S_old."""
    outcome_advantage: Tensor | None = None
    """[T], the same for all tokens of a sample."""
    correct: Tensor | None = None
    """[T] bool, whether the sample's final answer is right."""
    uniform: Tensor | None = None
    """[T] in [0, 1): one draw per token, keyed by (seed, step, sample, position)."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value.shape[:1] != self.target.shape[:1]:
                raise ValueError(
                    f"TokenBatch.{name} has shape {tuple(value.shape)}; its first size must be {len(self)}, the number of "
                    "targets"
                )

    def __len__(self) -> int:
        return int(self.target.shape[0])

    def rows(self, index: Tensor | slice) -> TokenBatch:
        """Returns the tokens at `index`, with every field cut alike."""
        return map_tensors(self, itemgetter(index))

    def to(self, device: torch.device) -> TokenBatch:
        """Returns the batch with every field on a device."""
        return map_tensors(self, lambda value: value.to(device))


_Record = TypeVar("_Record")


def map_tensors(record: _Record, change: Callable[[Tensor], Tensor]) -> _Record:
    """Returns a dataclass with every tensor field changed; other fields stay."""
    changed = {name: change(value) for name, value in vars(record).items() if isinstance(value, torch.Tensor)}
    return replace(record, **changed)  # type: ignore[type-var]


def fill(batch: TokenBatch, **values: Tensor | None) -> TokenBatch:
    """Returns the batch with absent fields set to the given values; a field that is there stays."""
    absent = {name: value for name, value in values.items() if value is not None and getattr(batch, name) is None}
    return replace(batch, **absent)


@dataclass(frozen=True)
class Metric:
    """A mean that can be added up over chunks, micro-batches and ranks: `total / count`."""

    total: float
    count: float

    @property
    def value(self) -> float:
        """The mean; NaN where nothing was counted."""
        return self.total / self.count if self.count else float("nan")

    def __add__(self, other: Metric) -> Metric:
        return Metric(self.total + other.total, self.count + other.count)


def add_metrics(one: Mapping[str, Metric], other: Mapping[str, Metric]) -> dict[str, Metric]:
    """Returns the metrics of both, those of the same name added up."""
    return {**one, **other, **{name: one[name] + metric for name, metric in other.items() if name in one}}


@dataclass(frozen=True, eq=False)
class Request:
    """One response to be sampled."""

    prompt: Prompt
    index: int
    token_ids: Tensor
    """[P] int64, the rendered prompt, at least one token."""
    prefix_ids: Tensor | None = None
    """[F] int64, response tokens that are there before the student writes: a teacher's, or earlier turns."""
    stop: tuple[str, ...] = ()
    """The response also ends with the token that completes one of these strings in what the student writes. Its last token may
    hold more than the string does: tokens stay as they were sampled."""

    @property
    def key(self) -> str:
        """The same name that its sample will have; random draws are keyed by it."""
        return f"{self.prompt.id}#{self.index}"


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. `temperature=0` is greedy. With `top_p`, `top_k` or `min_p` the log-probabilities that are
    recorded still refer to the unfiltered distribution at this temperature. Raises ValueError for
    numbers out of bounds."""

    temperature: float = 1.0
    """Temperature of the softmax that tokens are drawn from, and of the teacher's scores; 0: always the most likely token."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities sum to this; 1: all."""
    top_k: int = 0
    """Draw from so many of the most likely tokens; 0: all."""
    min_p: float = 0.0
    """Draw from tokens with at least this share of the most likely one's probability; 0: all."""
    max_new_tokens: int = 512
    """Tokens after which a response is cut off."""

    def __post_init__(self) -> None:
        check_range(self, 0, "temperature")
        check_range(self, 1e-6, "top_p", high=1, off="1 takes every token")
        check_range(self, 0, "top_k", off="0 takes every token")
        check_range(self, 0, "min_p", high=1)
        check_range(self, 1, "max_new_tokens")

    @property
    def filtered(self) -> bool:
        """Whether tokens are drawn from another distribution than the one that their log-probabilities refer to."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0
