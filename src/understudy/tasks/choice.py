"""The task `choice`: multiple-choice questions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from string import ascii_uppercase
from typing import Any, ClassVar, cast

from understudy.errors import DataError, brief
from understudy.randomness import hash_name
from understudy.tasks.datasets import Named
from understudy.tasks.fields import MissingValueError, accepted_answers, read_field, read_text
from understudy.tasks.overlap import normalise
from understudy.types import Prompt

ASKED = "{prompt}\nPlease reason step by step, and put the letter of your choice within \\boxed{}."
MAX_OPTIONS = 10
"""As many letters the verifier reads."""
_REFERS = re.compile(
    r"\b(?:all|any|both|each|either|neither|none|two) of (?:the |these )?(?:above|these|others?|options|choices|answers)\b"
    r"|\bthe above\b|\b[A-J]\)?,? ?(?:and|or|nor|&) \(?[A-J]\b",
    re.IGNORECASE,
)
"""An option that refers to others, by their position or their letters."""


@dataclass(frozen=True, kw_only=True)
class Choice(Named):
    r"""The task `choice`: MMLU, ARC, GPQA and others by name, or a file of questions with options.

    Options are shown with letters, in an order that is drawn for each question from `option_seed` and the question itself, so
    that it is the same in every run and no matter how the rows stand; rows with an option that speaks of others ("all of the
    above", "A and C") keep theirs. The answer is the place of the right option from 0 on, its label or letter, or its text.
    The student is asked to put a letter within `\boxed{}`. The verifier is `choice`.
    """

    kind: ClassVar[str] = "choice"

    choices_field: str = ""
    """The options: a list, an object with `text` and `label`, an object of letters, or several fields with commas between
    them. Empty: that of the data set."""
    option_seed: int | None = 0
    """Seed of the order of the options; None: as the data have them."""
    template: str = ASKED
    """The wording around question and options."""
    verifier: str = "choice"
    """Finds the letter in a response."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.choices_field:
            raise ValueError("choices_field is missing; it names the field of the options")
        if self.option_seed is None and self.reference_field in self._option_fields:
            raise ValueError(
                f"option_seed is null, but the right answer is always the option of {self.reference_field!r}, in one place; "
                "give a seed"
            )

    @property
    def _option_fields(self) -> list[str]:
        return [name.strip() for name in self.choices_field.split(",")]

    def fields_read(self, row: Mapping[str, Any]) -> list[str | None]:
        return [*super().fields_read(row), *self._option_fields]

    def to_prompt(self, place: str, row: Mapping[str, Any]) -> Prompt:
        """The id is a hash of question and options, whatever their order."""
        question = read_text(row, self.prompt_field, place)
        options, labels = self._options(place, row)
        if not 2 <= len(options) <= MAX_OPTIONS:
            raise DataError(f"{place}: {len(options)} options; a question has 2 to {MAX_OPTIONS}")
        said = normalise("\n".join([question, *sorted(options)]))
        key = blake2b(said.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        order = list(range(len(options)))
        if self.option_seed is not None and not any(map(_REFERS.search, options)):
            order.sort(key=lambda index: (hash_name(f"{self.option_seed}/{key}/{options[index]}"), index))
        shown = [f"{letter}. {options[index]}" for letter, index in zip(ascii_uppercase, order, strict=False)]
        made = {**row, self.prompt_field: "\n".join([question, "", *shown])}
        if self.reference_field is not None:
            right = self._right(place, row, options, labels)
            # both copies of a repeated text are right
            made[self.reference_field] = [
                letter
                for letter, index in zip(ascii_uppercase, order, strict=False)
                if options[index] == options[right]
            ]
        return replace(super().to_prompt(place, made), id=f"{self.name}/{key}")

    def _options(self, place: str, row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """The options and what the data call them."""
        names = [self.choices_field] if self.choices_field in row else self._option_fields
        if len(names) > 1:
            return [read_text(row, name, place).strip() for name in names], names
        value = read_field(row, names[0], place, required=True)
        labels: Any = list(ascii_uppercase[:MAX_OPTIONS])
        if isinstance(value, Mapping):
            value, labels = (
                (value["text"], value.get("label", labels)) if "text" in value else (list(value.values()), list(value))
            )
        if not isinstance(value, list) or not isinstance(labels, list):
            raise DataError(
                f"{place}: field {names[0]!r} is {brief(value)}; it must be a list of options, or an object of them"
            )
        try:
            options = [next(iter(accepted_answers(option)), "").strip() for option in value]
        except ValueError as error:
            raise DataError(f"{place}: an option in field {names[0]!r} is {error}") from error
        if not all(options):
            raise MissingValueError(f"{place}: field {names[0]!r} has an empty option")
        return options, [str(label).strip() for label in labels[: len(options)]]

    def _right(self, place: str, row: Mapping[str, Any], options: list[str], labels: list[str]) -> int:
        """The place of the right option in the data."""
        field = cast(str, self.reference_field)
        if field in self._option_fields and len(self._option_fields) > 1:
            return self._option_fields.index(field)
        value = read_field(row, field, place)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(options):
            return value
        told = str(value).strip()
        for known in (labels, list(ascii_uppercase[: len(options)]), options):
            if told in known:
                return known.index(told)
        raise DataError(
            f"{place}: field {field!r} is {brief(value)}; it must be the place of the right option (from 0 on), its label "
            f"({', '.join(labels)}) or its text"
        )
