"""The tokenizers of a run: the student's, and those of teachers and references, which must have its tokens."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from understudy.errors import RecipeError, VocabularyError
from understudy.models import Vision, compare_vocabularies, load_tokenizer, load_vision, vocabulary_size
from understudy.recipe.schema import Recipe
from understudy.tasks.renderer import Renderer
from understudy.teachers import Source

_IMAGE_SIZES = (96, 64), (64, 96), (1280, 720), (3000, 4000)
"""Sizes of the images by which two processors are compared: small and large ones, which are scaled."""


def tokenizer_source(recipe: Recipe) -> Source | None:
    """Returns where the student's tokenizer is read from; None: the task has its own. Raises RecipeError for neither."""
    name = recipe.student.tokenizer or recipe.student.model
    if name is not None:
        return Source(name, recipe.student.revision)
    if any(part.num_tokens is None for part in recipe.task.places().values()):
        raise RecipeError("student.build needs student.tokenizer: the task has no tokenizer of its own")
    return None


class Tokenizers:
    """The student's tokenizer, and those that must have its tokens. Each is loaded and compared once, when it is asked for."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._others: dict[Source, tuple[Any, dict[int, str]]] = {}
        self._visions: dict[Source, Vision] = {}

    @cached_property
    def student(self) -> Any:
        """Raises VocabularyError for a tokenizer without EOS, RecipeError where there is none."""
        source = tokenizer_source(self._recipe)
        if source is None:
            # of a mix, the part whose alphabet has the most tokens can be read by all
            return max(self._recipe.task.places().values(), key=lambda part: part.num_tokens or 0).tokenizer()
        tokenizer = load_tokenizer(source.name, revision=source.revision)
        if tokenizer.eos_token_id is None:
            raise VocabularyError(
                f"the tokenizer of {source.name} has no EOS, so no response would ever end; set eos_token in its "
                "configuration"
            )
        return tokenizer

    @property
    def sources(self) -> list[Source]:
        """The tokenizers of models whose probabilities are compared with the student's."""
        found = (section.vocabulary for section in self._recipe.scorers.values())
        return list(dict.fromkeys(source for source in found if source is not None))

    def other(self, source: Source) -> tuple[Any, dict[int, str]]:
        """Returns a tokenizer and the tokens that it has and the student's has not, by id. Raises VocabularyError."""
        if source not in self._others:
            tokenizer = load_tokenizer(source.name, revision=source.revision)
            self._others[source] = tokenizer, compare_vocabularies(self.student, tokenizer)
        return self._others[source]

    @property
    def absent(self) -> tuple[int, ...]:
        """Ids between those of the student that only teachers have a token for, and those in whose place an image stands, which
        nobody writes. Raises VocabularyError."""
        size = vocabulary_size(self.student)
        foreign = {index for source in self.sources for index in self.other(source)[1] if index < size}
        return tuple(sorted(foreign.union(() if self.vision is None else self.vision.image_ids)))

    @cached_property
    def vision(self) -> Vision | None:
        """The student's processor of images; None where no prompt has some. Raises RecipeError for a model of text."""
        student = self._recipe.student
        if not self._recipe.has_images or student.model is None:
            return None
        return load_vision(student.model, self.student, revision=student.revision)

    def other_vision(self, source: Source) -> Vision | None:
        """Returns a teacher's processor of images; None where no prompt has some.

        Raises RecipeError for a model of text, VocabularyError for a processor that makes other tokens of an image than the
        student's.
        """
        if self.vision is None:
            return None
        if source not in self._visions:
            other = load_vision(source.name, self.other(source)[0], revision=source.revision)
            for size in _IMAGE_SIZES:
                image = self.vision.example(*size)
                own, found = (vision.read(image).ids.tolist() for vision in (self.vision, other))
                if own != found or self.vision.image_ids != other.image_ids:
                    raise VocabularyError(
                        f"an image of {size[0]} x {size[1]} pixels is {len(own)} tokens for the student and {len(found)} for "
                        f"{source.name}: token scores only mean something where both read the same tokens. Choose models of "
                        "one family, and give their processors the same sizes (preprocessor_config.json)"
                    )
            self._visions[source] = other
        return self._visions[source]

    def compare_ends(self) -> None:
        """Raises VocabularyError for a teacher that reads the student's ids and ends a response with another token.

        In a chat the end is the template's, where both have one, else EOS.
        """
        recipe = self._recipe
        chats = {part.is_chat for part in recipe.task.places().values()}
        for section in recipe.scorers.values():
            if section.vocabulary is None or section.rendering == "own":
                continue
            pair = [self.student, self.other(section.vocabulary)[0]]
            for is_chat in chats:
                kind, ends = "EOS differs", [tokenizer.eos_token_id for tokenizer in pair]
                if is_chat and all(tokenizer.chat_template for tokenizer in pair):
                    kind = "the chat templates end a turn with different tokens"
                    renderers = [Renderer(one, recipe.student.template_kwargs, vision=self.vision) for one in pair]
                    ends = [one.turn_end.token_id for one in renderers]
                if ends[0] != ends[1]:
                    names = [repr(one.convert_ids_to_tokens(end)) for one, end in zip(pair, ends, strict=True)]
                    raise VocabularyError(
                        f"{kind}: {names[0]} (id {ends[0]}) for the student, {names[1]} (id {ends[1]}) for "
                        f"{section.shown}. The teacher would never approve of the student's ending and lengths would explode: "
                        "have the teacher of a chat read its own rendering (rendering: own), use its tokenizer for the "
                        "student (student.tokenizer), or a base teacher for a base student"
                    )
