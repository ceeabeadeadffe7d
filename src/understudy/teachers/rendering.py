"""Teachers that read the student's response after a different prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import cast

from understudy.errors import DataError, RecipeError, ScoreError
from understudy.lazy import Tensor, torch
from understudy.linear.head import LMHead
from understudy.packing import Unscored
from understudy.tasks.renderer import Renderer
from understudy.teachers.base import Responder, Setup, Teacher, hash_facts
from understudy.types import Author, Need, Prompt, Sample, Scores


class OtherPrompt(Teacher):
    """`log T(y_t | another prompt, y_<t)`, one row for each response token of the sample as it is.

    `ends`: the student's end of a turn and the teacher's, where these are two tokens: each stands for the other in what the
    teacher reads, and in all its distributions.
    """

    def __init__(self, inner: Teacher, setup: Setup, ends: tuple[int, int] | None = None) -> None:
        self._inner = inner
        self._setup = setup
        self._ends = ends
        self.name, self.model, self.temperature = inner.name, inner.model, inner.temperature
        self.remote, self.concurrency = inner.remote, inner.concurrency

    @property
    def collective(self) -> bool:  # type: ignore[override]
        return self._inner.collective

    @abstractmethod
    def _read(self, sample: Sample) -> tuple[Prompt, Tensor]:
        """The prompt that the teacher reads before the sample's response, and its ids. Raises DataError, ScoreError."""

    def score(self, samples: Sequence[Sample], need: frozenset[Need], *, k: int | None = None) -> list[Scores]:
        """Returns the teacher's scores behind its prompt; `Unscored` for a sample that is then longer than its positions.

        Raises DataError for a prompt that it cannot be shown.
        """
        limit = self.max_tokens
        shown = [self._shown(sample) for sample in samples]
        fits = [limit is None or sample.token_ids.numel() - 1 <= limit for sample in shown]
        fitting = [sample for sample, is_short in zip(shown, fits, strict=True) if is_short]
        found = iter(self._inner.score(fitting, need, k=k))
        scores = [
            next(found) if is_short else self._unscored(sample, need, k)
            for sample, is_short in zip(shown, fits, strict=True)
        ]
        if self._ends is None:
            return scores
        return [
            replace(
                one,
                token_ids=sample.response_ids,
                topk_ids=None if one.topk_ids is None else self._exchanged(one.topk_ids),
                likeliest_ids=None if one.likeliest_ids is None else self._exchanged(one.likeliest_ids),
            )
            for one, sample in zip(scores, samples, strict=True)
        ]

    def head_for(self, name: str | None) -> LMHead | None:
        head = self._inner.head_for(name)
        if head is None or self._ends is None:
            return head
        rows = self._exchanged(torch.arange(head.weight.shape[0], device=head.weight.device))
        return replace(head, weight=head.weight[rows], bias=None if head.bias is None else head.bias[rows])

    @property
    def max_tokens(self) -> int | None:
        return self._inner.max_tokens

    def num_prompt_tokens(self, sample: Sample) -> int:
        return self._shown(sample).prompt_length

    def close(self) -> None:
        self._inner.close()

    def _exchanged(self, ids: Tensor) -> Tensor:
        """The ids with the two end tokens swapped."""
        if self._ends is None:
            return ids
        one, other = self._ends
        return torch.where(ids == one, other, torch.where(ids == other, one, ids))

    def _shown(self, sample: Sample) -> Sample:
        """The same response after the prompt that the teacher reads."""
        prompt, prompt_ids = self._read(sample)
        author = sample.author[sample.prompt_length :]
        return replace(
            sample,
            prompt=prompt,
            token_ids=torch.cat([prompt_ids, self._exchanged(sample.response_ids)]),
            author=torch.cat([author.new_full((len(prompt_ids),), Author.PROMPT), author]),
            prompt_length=len(prompt_ids),
            rollout_logprob=None,
            policy_version=None,
        )

    def _unscored(self, sample: Sample, need: frozenset[Need], k: int | None) -> Unscored:
        """NaN scores in the shapes that the sample's scores would have."""
        size, nan = sample.num_response_tokens, float("nan")
        fields: dict[str, Tensor] = {}
        if need & {"sampled", "topk"}:
            fields |= {"logprob": torch.full((size,), nan), "entropy": torch.full((size,), nan)}
        if "topk" in need:
            top = (size, min(k or 0, self._setup.vocab_size))
            fields |= {"topk_ids": torch.full(top, -1), "topk_logprob": torch.full(top, nan)}
        head = self._inner.head_for(sample.teacher) if "full" in need else None
        if head is not None:
            dtype, device = head.weight.dtype, self._setup.device
            fields["hidden"] = torch.full((size, head.weight.shape[1]), nan, dtype=dtype, device=device)
        reason = (
            f"the prompt that it is shown, of {sample.prompt_length} tokens, and the response make {sample.token_ids.numel()} "
            f"tokens, but teacher {self.name!r} has {self.max_tokens} positions (max_position_embeddings): lower "
            "max_new_tokens, or leave out long problems and, where it is shown them, long solutions"
        )
        return Unscored(sample.response_ids, **fields, reason=reason)


class OwnRendering(OtherPrompt):
    """Reads the messages as its own chat template writes them, then the student's response.

    `renderer`: the teacher's, with the student's tokens. Raises RecipeError where one template begins the response
    within a <think> block, or behind one, and the other does not: the same tokens would mean something else. Behind a closed
    block and in a template that knows none they mean the same.
    """

    def __init__(self, inner: Teacher, setup: Setup, renderer: Renderer) -> None:
        student, self.renderer = setup.renderer, renderer
        assert student is not None
        if not self.renderer.has_template:
            raise RecipeError(
                f"teacher {setup.name!r} is to read its own rendering, but its tokenizer has no chat template; set rendering: "
                "student"
            )
        # a closed block and a template without one both ask for the answer only
        answers = all(one.begins == "</think>" or not (one.begins or one.thinks) for one in (student, renderer))
        if renderer.begins != student.begins and not answers:
            raise RecipeError(
                f"the student's prompts end with {student.begins or 'no thinking'} and those of teacher {setup.name!r} with "
                f"{self.renderer.begins or 'no thinking'}, so a response would mean something else to it; set rendering: "
                "student, or what turns thinking on or off in both templates (student.template_kwargs)"
            )
        self.own_end = renderer.turn_end.token_id
        if self.own_end >= setup.vocab_size or self.own_end in setup.absent:
            raise RecipeError(
                f"the chat template of teacher {setup.name!r} ends a turn with token {self.own_end}, which the student lacks; "
                "set rendering: student"
            )
        ends = student.turn_end.token_id, self.own_end
        super().__init__(inner, setup, None if ends[0] == ends[1] else ends)
        # only some teachers can be asked how they are
        self.health: Callable[[], str]
        if hasattr(inner, "health"):
            self.health = inner.health

    @property
    def origin(self) -> str | None:
        return self._inner.origin

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the teacher's own, and of how it renders."""
        return hash_facts([self._inner.fingerprint, self.renderer.settings, self._ends])

    def uncached(self) -> OwnRendering:
        return OwnRendering(self._inner.uncached(), self._setup, self.renderer)

    def respond(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float = 0.0) -> list[str | None]:
        """The teacher's responses, if it generates any."""
        writer = cast("Responder", self._inner)
        return writer.respond(prompts, max_new_tokens=max_new_tokens, temperature=temperature)

    def _read(self, sample: Sample) -> tuple[Prompt, Tensor]:
        if (sample.author == Author.ENVIRONMENT).any():
            raise ScoreError(
                f"sample {sample.key} has several turns, which stand there as the student's template writes them; teacher "
                f"{self.name!r} can read only a single one in its own rendering: set rendering: student"
            )
        try:
            return sample.prompt, self.renderer.start(sample.prompt)
        except DataError as error:
            raise type(error)(f"teacher {self.name!r} cannot read its own rendering: {error}") from error
