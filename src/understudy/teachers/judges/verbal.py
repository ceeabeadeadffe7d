"""A judge whose weights are in this process: one forward per question, and logits of the ten digits alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from understudy.errors import DataError, RecipeError, check_range
from understudy.lazy import Tensor, nn, no_grad, torch
from understudy.linear.head import LMHead
from understudy.models import lm_head, load_tokenizer, num_positions
from understudy.tasks.renderer import Renderer
from understudy.teachers.base import Judge, LoadedSection, ScoreForm, Setup, Source, hash_facts
from understudy.teachers.judges.wording import DIGITS, JudgeSection, Question, Reply, Wording, as_text, verdicts
from understudy.teachers.local import LocalTeacher
from understudy.types import Author, Prompt, Sample, Verdict


@dataclass(frozen=True, kw_only=True)
class Verbal(JudgeSection, LoadedSection):
    """The section of a recipe for a judge whose weights are in this process."""

    writes_responses = True

    model: str
    """A directory or a hub name."""
    revision: str | None = None
    """Commit, branch or tag of a hub model."""
    template_kwargs: Mapping[str, Any] = field(default_factory=lambda: {"enable_thinking": False})
    """For the chat template: without thinking, so that the digit comes at once. Templates ignore keys they do not know."""
    max_batch_tokens: int | None = None
    """Slots of one forward; None: what suits the device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, "max_batch_tokens", off="null takes what suits the device")

    @property
    def source(self) -> Source:
        return Source(self.model, self.revision)

    def open(self, setup: Setup) -> VerbalTeacher:
        """Loads model and tokenizer. Raises RecipeError where either cannot be, or digits are not single tokens."""
        tokenizer = load_tokenizer(self.model, revision=self.revision)
        date = None if setup.renderer is None else setup.renderer.date
        renderer = Renderer(tokenizer, self.template_kwargs, date=date)
        asker = Asker(renderer, self.wording)
        return VerbalTeacher(
            self.load(setup.device),
            asker,
            name=setup.name,
            max_batch_tokens=self.max_batch_tokens,
            device=setup.device,
            offload=self.offload,
            generate=None if setup.generate is None else partial(setup.generate, reader=renderer),
        )


class Asker:
    """Questions as tokens of the judge's own tokenizer, in its own chat template where it has one, else as plain text.

    A special token of the judge that untrusted text spells out, such as the end of a turn, is encoded as plain characters.
    Raises RecipeError where the ten digits, each a single token, cannot follow a question.
    """

    def __init__(self, renderer: Renderer, wording: Wording) -> None:
        self.wording = wording
        self.renderer = renderer
        self.space, self.digit_ids = self._find_digits()

    def encode(self, question: Question) -> list[int]:
        """Token ids up to where the digit follows. Raises DataError for what the tokenizer cannot encode."""

        def wording(texts: Sequence[str]) -> str:
            given = iter(texts)
            return "".join(next(given) if piece.foreign else piece.text for piece in question)

        return self.renderer.ask(wording, [piece.text for piece in question if piece.foreign], self.space)

    def _find_digits(self) -> tuple[str, tuple[int, ...]]:
        """Text to add to a question, and the ids of the digits that may then follow it, each a single token."""
        prompt, ids = Prompt(id="probe", text="1"), torch.zeros(1, dtype=torch.int64)
        question = self.wording.questions(Sample(prompt, 0, ids, ids, 1, "data", "1"), steps=False)[0]
        name = self.renderer.tokenizer.name_or_path or "the judge"
        try:
            asked = self.renderer.question(as_text(question))
            self.renderer.encode_question(asked)
        except DataError as error:
            raise RecipeError(
                f"{name}: the judge's tokenizer or chat template cannot take the question ({error}); write "
                "teacher.template in its own words"
            ) from error
        # a text that ends in a word goes on with " 7", if that is one token, or with a space and then "7"; a turn of a
        # chat begins with "7"
        forms = [("", ""), ("", " "), (" ", "")]
        if not self.renderer.has_template and not asked[-1:].isspace():
            forms = [("", " "), (" ", ""), ("", "")]
        for space, before in forms:
            try:
                context = self.renderer.encode_question(asked + space)
                longer = [self.renderer.encode_question(asked + space + before + digit) for digit in DIGITS]
            except DataError:
                continue
            found = tuple(item[-1] for item in longer if item[:-1] == context)
            if len(set(found)) == len(DIGITS) and not self.renderer.special_ids & set(found):
                return space, found
        raise RecipeError(
            f"{name}: the digits 0 to 9 are not single tokens after the question, so this model cannot judge with "
            "one; choose another model, or change the end of teacher.template"
        )


class VerbalTeacher(Judge):
    """Any causal language model as a judge that says one digit, and as a writer of responses.

    The logits behind the question are those of the ten digit tokens alone, in float32 (float64 for float64): "argmax" is
    the most likely digit, "expectation" `sum_d d p(d)` under their softmax. A question that is longer than the judge's
    positions, or that its tokenizer cannot encode, leaves its sample unscored.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, asker: Asker, *, name: str, **options: Any) -> None:
        """`options`: those of a `LocalTeacher`."""
        head = lm_head(model)
        if max(asker.digit_ids) >= head.num_tokens:
            raise RecipeError(
                f"teacher {name!r}: the tokenizer's digits have ids up to {max(asker.digit_ids)}, but the head of the "
                f"model has {head.num_tokens} rows: they do not belong together"
            )
        self._asker = asker
        self.name, self.model = name, model
        self._reader = LocalTeacher(model, name=name, vocab_size=head.num_tokens, **options)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of model, templates and digit tokens; reads all weights once."""
        asker, words, renderer = self._asker, self._asker.wording, self._asker.renderer
        template = renderer.settings
        asked = [words.whole, words.step, words.separator, *template, asker.space, asker.digit_ids]
        return hash_facts([self._reader.fingerprint, *asked])

    def judge(self, samples: Sequence[Sample], *, score: ScoreForm = "argmax", steps: bool = False) -> list[Verdict]:
        """Returns a verdict for each sample, in order. Samples do not see each other."""
        asked = [self._asker.wording.questions(sample, steps=steps) for sample in samples]
        replies = self._answer([question for questions in asked for question in questions], score)
        starts = [self._asker.wording.starts(sample, steps=steps) for sample in samples]
        return verdicts(replies, starts, score=score, steps=steps)

    def respond(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float = 0.0) -> list[str | None]:
        """The model's own response to each prompt, in order; None for an empty one, one that was cut off, and a prompt that is
        too long or that its tokenizer cannot encode. A text is a user's message where it has a chat template."""
        renderer, limit = self._asker.renderer, num_positions(self.model)
        asked: dict[int, Prompt] = {}
        for index, prompt in enumerate(prompts):
            if renderer.has_template and prompt.messages is None:
                said = {"role": "user", "content": prompt.text or ""}
                prompt = replace(prompt, text=None, quoted=(), messages=(said,))
            elif not renderer.has_template and prompt.messages is not None:
                prompt = replace(prompt, text=prompt.conversation, messages=None, tools=None)
            try:
                size = len(renderer.start(prompt)) + max_new_tokens
            except DataError:
                continue
            if limit is None or size <= limit:
                asked[index] = prompt
        texts: list[str | None] = []
        if asked:
            chosen = list(asked.values())
            texts = self._reader.respond(chosen, max_new_tokens=max_new_tokens, temperature=temperature)
        found = dict(zip(asked, texts, strict=True))
        return [found.get(index) or None for index in range(len(prompts))]

    @no_grad
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
                continue
            # a digit as the response, so that the teacher's row for it is the one behind the question
            token_ids = torch.tensor([*ids, self._asker.digit_ids[0]])
            author = torch.full((len(token_ids),), int(Author.PROMPT), dtype=torch.uint8)
            author[-1] = int(Author.TEACHER)
            readable[index] = Sample(Prompt(id="question"), index, token_ids, author, len(ids), "data", "")
        if readable:
            scores = self._reader.score(list(readable.values()), frozenset({"full"}))
            hidden = torch.cat([found.hidden for found in scores if found.hidden is not None])
            replies.update(zip(readable, self._read(hidden, score), strict=True))
        return [replies[index] for index in range(len(questions))]

    def _read(self, hidden: Tensor, score: ScoreForm) -> Iterator[Reply]:
        """Reads the digits behind the hidden states of some questions. [N, H]"""
        head = lm_head(self.model)
        ids = torch.tensor(self._asker.digit_ids, device=head.weight.device)
        bias = None if head.bias is None else head.bias[ids].to(hidden.device)
        digits = LMHead(head.weight[ids].to(hidden.device), bias, head.softcap, head.scale)
        for row in digits.logits(hidden).cpu():
            if not bool(row.isfinite().all()):
                yield Reply(None, note="the judge's logits are not finite")
            elif score == "argmax":
                yield Reply(float(row.argmax()))
            else:
                yield Reply(float(row.softmax(-1) @ torch.arange(len(DIGITS), dtype=row.dtype)))
