"""A judge whose weights are in this process: one forward per question, and logits of the ten digits alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from understudy.errors import DataError, RecipeError
from understudy.linear.head import LMHead
from understudy.models import (
    DType,
    check_model_dir,
    lm_head,
    load_causal_lm,
    load_tokenizer,
    num_positions,
    probe_head,
)
from understudy.tasks.renderer import Renderer
from understudy.teachers.base import Judge, ScoreForm, Setup, TeacherSection, Weights
from understudy.teachers.judges.wording import DIGITS, STEP_SEPARATOR, Question, Reply, Wording, as_text, verdicts
from understudy.teachers.local import LocalTeacher
from understudy.types import Author, Need, Prompt, Sample, Verdict

_PROBE = Sample(
    prompt=Prompt(id="probe", text="1"),
    index=0,
    token_ids=torch.zeros(1, dtype=torch.int64),
    author=torch.zeros(1, dtype=torch.uint8),
    prompt_length=1,
    finish="data",
    text="1",
)


@dataclass(frozen=True, kw_only=True)
class Verbal(TeacherSection):
    """The section of a recipe for a judge whose weights are in this process."""

    says_digits = True
    alone = True

    model: str
    """A directory or a hub name."""
    dtype: DType = "auto"
    """ "auto": the checkpoint's own."""
    offload: bool = False
    """Keep the weights in host memory between uses."""
    revision: str | None = None
    attn_implementation: str | None = None
    template: str | None = None
    """With {problem}, {response} and {fence}; None: `wording.WHOLE`."""
    step_template: str | None = None
    """With {problem}, {steps}, {step} and {fence}; None: `wording.STEP`."""
    step_separator: str = STEP_SEPARATOR
    template_kwargs: Mapping[str, Any] = field(default_factory=lambda: {"enable_thinking": False})
    """For the chat template: without thinking, so that the digit comes at once. Templates ignore keys they do not know."""
    max_batch_tokens: int | None = None
    """Slots of one forward; None: what suits the device."""

    def __post_init__(self) -> None:
        _ = self.wording
        if self.max_batch_tokens is not None and self.max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens is {self.max_batch_tokens}; it must be at least 1, or left out")

    @property
    def wording(self) -> Wording:
        """Wording of the questions."""
        return Wording.of(self.template, self.step_template, self.step_separator)

    @property
    def gives(self) -> frozenset[Need]:
        return frozenset({"none", "verbal"})

    @property
    def weights(self) -> Weights:
        return Weights(model=self.model, dtype=self.dtype, offload=self.offload)

    @property
    def shown(self) -> str:
        return self.model

    def check(self) -> str:
        """Raises RecipeError for a directory that is no model."""
        return f"teacher: {check_model_dir(self.model)}"

    def open(self, setup: Setup) -> VerbalTeacher:
        """Loads model and tokenizer. Raises RecipeError where either cannot be, or digits are not single tokens."""
        asker = Asker(Renderer(load_tokenizer(self.model, revision=self.revision), self.template_kwargs), self.wording)
        model = load_causal_lm(
            self.model,
            dtype=self.dtype,
            device="cpu" if self.offload else setup.device,
            attn_implementation=self.attn_implementation,
            revision=self.revision,
        )
        probe_head(model)
        return VerbalTeacher(
            model,
            asker,
            name=setup.name,
            max_batch_tokens=self.max_batch_tokens,
            device=setup.device,
            offload=self.offload,
        )


class Asker:
    """Questions as tokens of the judge's own tokenizer, in its own chat template where it has one, else as plain text.

    A special token of the judge that untrusted text spells out, such as the end of a turn, is encoded as plain characters.
    Raises RecipeError where the ten digits, each a single token, cannot follow a question.
    """

    def __init__(self, renderer: Renderer, wording: Wording) -> None:
        self.wording = wording
        self.renderer = renderer
        self._space, self.digit_ids = self._find_digits()

    @property
    def facts(self) -> list[Any]:
        """Everything here that verdicts depend on."""
        words, renderer = self.wording, self.renderer
        template = [renderer.tokenizer.chat_template, renderer.template_kwargs]
        return [words.whole, words.step, words.separator, *template, self._space, self.digit_ids]

    def encode(self, question: Question) -> list[int]:
        """Token ids up to where the digit follows. Raises DataError for what the tokenizer cannot encode."""

        def wording(texts: Sequence[str]) -> str:
            given = iter(texts)
            return "".join(next(given) if piece.foreign else piece.text for piece in question)

        return self.renderer.ask(wording, [piece.text for piece in question if piece.foreign], self._space)

    def _find_digits(self) -> tuple[str, tuple[int, ...]]:
        """Text to add to a question, and the ids of the digits that may then follow it, each a single token."""
        question = self.wording.questions(_PROBE, steps=False)[0]
        try:
            asked = self.renderer.question(as_text(question))
            self.renderer.encode_question(asked)
        except DataError as error:
            raise RecipeError(
                f"{self._name}: the judge's tokenizer or chat template cannot take the question ({error}); write "
                "teacher.template in its own words"
            ) from error
        # a text that ends in a word goes on with " 7", if that is one token, or with a space and then "7"; a turn of a
        # chat begins with "7"
        forms = [("", ""), ("", " "), (" ", "")]
        if not self.renderer.has_template and not asked[-1:].isspace():
            forms = [("", " "), (" ", ""), ("", "")]
        for space, before in forms:
            found = self._digits_after(asked + space, before)
            if found is not None:
                return space, found
        raise RecipeError(
            f"{self._name}: the digits 0 to 9 are not single tokens after the question, so this model cannot judge with "
            "one; choose another model, or change the end of teacher.template"
        )

    def _digits_after(self, asked: str, before: str) -> tuple[int, ...] | None:
        try:
            context = self.renderer.encode_question(asked)
            longer = [self.renderer.encode_question(asked + before + digit) for digit in DIGITS]
        except DataError:
            return None
        ids = tuple(item[-1] for item in longer if item[:-1] == context)
        return ids if len(set(ids)) == len(DIGITS) and not self.renderer.special_ids & set(ids) else None

    @property
    def _name(self) -> str:
        return str(self.renderer.tokenizer.name_or_path or "the judge")


class VerbalTeacher(Judge):
    """Any causal language model as a judge that says one digit.

    The logits behind the question are those of the ten digit tokens alone, in float32 (float64 for float64): "argmax" is
    the most likely digit, "expectation" `sum_d d p(d)` under their softmax. A question that is longer than the judge's
    positions, or that its tokenizer cannot encode, leaves its sample unscored.
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        asker: Asker,
        *,
        name: str,
        max_batch_tokens: int | None = None,
        device: str | torch.device | None = None,
        offload: bool = False,
    ) -> None:
        head = lm_head(model)
        if max(asker.digit_ids) >= head.num_tokens:
            raise RecipeError(
                f"teacher {name!r}: the tokenizer's digits have ids up to {max(asker.digit_ids)}, but the head of the "
                f"model has {head.num_tokens} rows: they do not belong together"
            )
        self._asker = asker
        self.name, self.model = name, model
        self._reader = LocalTeacher(
            model,
            name=name,
            vocab_size=head.num_tokens,
            max_batch_tokens=max_batch_tokens,
            device=device,
            offload=offload,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of model, templates and digit tokens; reads all weights once."""
        facts = json.dumps([self._reader.fingerprint, *self._asker.facts], sort_keys=True, default=str)
        return blake2b(facts.encode(), digest_size=16).hexdigest()

    def judge(self, samples: Sequence[Sample], *, score: ScoreForm = "argmax", steps: bool = False) -> list[Verdict]:
        """Returns a verdict for each sample, in order. Samples do not see each other."""
        asked = [self._asker.wording.questions(sample, steps=steps) for sample in samples]
        replies = self._answer([question for questions in asked for question in questions], score)
        return verdicts(replies, [len(questions) for questions in asked], score=score, steps=steps)

    @torch.no_grad()
    def _answer(self, questions: Sequence[Question], score: ScoreForm) -> list[Reply]:
        replies: dict[int, Reply] = {}
        readable: dict[int, Sample] = {}
        limit = num_positions(self.model)
        for index, question in enumerate(questions):
            try:
                ids = self._asker.encode(question)
            except DataError as error:
                replies[index] = Reply(None, attempts=0, note=str(error))
                continue
            if limit is not None and len(ids) > limit:
                note = f"the question has {len(ids)} tokens, and the judge {limit} positions (max_position_embeddings)"
                replies[index] = Reply(None, attempts=0, note=note)
            else:
                readable[index] = _to_read(ids, self._asker.digit_ids[0], index)
        if readable:
            logits = self._digit_logits(list(readable.values())).cpu()
            replies.update(zip(readable, (_reply(row, score) for row in logits), strict=True))
        return [replies[index] for index in range(len(questions))]

    def _digit_logits(self, samples: Sequence[Sample]) -> Tensor:
        """Returns the logits of the ten digits after each question. [N, 10]"""
        scores = self._reader.score(samples, frozenset({"full"}))
        hidden = torch.cat([found.hidden for found in scores if found.hidden is not None])
        head = lm_head(self.model)
        ids = torch.tensor(self._asker.digit_ids, device=head.weight.device)
        bias = None if head.bias is None else head.bias[ids].to(hidden.device)
        return LMHead(head.weight[ids].to(hidden.device), bias, head.softcap, head.scale).logits(hidden)


def _to_read(ids: Sequence[int], digit_id: int, index: int) -> Sample:
    """The question as a prompt, with a digit as its response: a teacher's row for it is the one behind the question."""
    token_ids = torch.tensor([*ids, digit_id], dtype=torch.int64)
    author = torch.full((len(token_ids),), int(Author.PROMPT), dtype=torch.uint8)
    author[-1] = int(Author.TEACHER)
    return Sample(Prompt(id="question"), index, token_ids, author, len(ids), "data", "")


def _reply(logits: Tensor, score: ScoreForm) -> Reply:
    """Reads the logits of one question. [10]"""
    if not bool(logits.isfinite().all()):
        return Reply(None, note="the judge's logits are not finite")
    if score == "argmax":
        return Reply(float(logits.argmax()))
    digits = torch.arange(len(DIGITS), dtype=logits.dtype)
    return Reply(float(logits.softmax(-1) @ digits))
