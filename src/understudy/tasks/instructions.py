"""The task `instructions`: prompts with instructions that a program checks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from understudy.errors import DataError, RecipeError, brief, nearest
from understudy.given import is_given
from understudy.tasks.base import Split
from understudy.tasks.datasets import Named
from understudy.tasks.fields import read_field
from understudy.tasks.verifiers.ifbench import UNCHECKED
from understudy.tasks.verifiers.instructions import INSTRUCTIONS, check_detector
from understudy.types import Prompt

LANGUAGE = "language:response_language"


@dataclass(frozen=True, kw_only=True)
class Instructions(Named):
    """The task `instructions`: IFEval and IFBench by name, or a file of prompts with instructions of their kinds.

    A response is right where it follows all instructions of its prompt, read strictly. An evaluation also reports the loose
    reading, and both by instruction. Of other kinds a function from Python has to be the verifier; it is given the
    reference `{"instruction_id_list": [...], "kwargs": [...]}` as JSON.
    """

    kind: ClassVar[str] = "instructions"

    kwargs_field: str = ""
    """Arguments of the instructions, a list as long as that of their names. Empty: that of the data set."""
    verifier: str = "instructions"
    """Checks a response."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference_field is None or not self.kwargs_field:
            raise ValueError(
                "reference_field and kwargs_field are both needed; they name the fields of the instructions and their arguments"
            )

    def fields_read(self, row: Mapping[str, Any]) -> list[str | None]:
        return [*super().fields_read(row), self.kwargs_field]

    def to_prompt(self, place: str, row: Mapping[str, Any]) -> Prompt:
        names = read_field(row, str(self.reference_field), place)
        given = read_field(row, self.kwargs_field, place, required=True)
        if not isinstance(names, list) or not isinstance(given, list) or len(names) != len(given):
            raise DataError(
                f"{place}: {self.reference_field!r} is {brief(names)} and {self.kwargs_field!r} is {brief(given)}; they "
                "must be lists of one length"
            )
        asked = []
        for name, arguments in zip(names, given, strict=True):
            if name in UNCHECKED and not is_given(self.verifier):
                raise DataError(
                    f"{place}: the instruction {name!r} is not checked here, because {UNCHECKED[name]}; leave its rows out by "
                    f"where: [{self.reference_field} != {name}], or give a verifier of your own from Python"
                )
            if name not in INSTRUCTIONS and not is_given(self.verifier):
                raise DataError(
                    f"{place}: the instruction {name!r} is none of IFEval's or IFBench's ({nearest(str(name), INSTRUCTIONS)}); "
                    "give a verifier of your own from Python"
                )
            asked.append({key: value for key, value in (arguments or {}).items() if value is not None})
        reference = json.dumps({"instruction_id_list": names, "kwargs": asked}, ensure_ascii=False)
        return super().to_prompt(place, {**row, str(self.reference_field): reference})

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Raises RecipeError too where an instruction needs a package that is missing."""
        found = super().prompts(split)
        if not is_given(self.verifier) and any(LANGUAGE in str(prompt.reference) for prompt in found):
            try:
                check_detector()
            except RecipeError as error:
                raise RecipeError(f"{self.name}: {error}") from error
        return found
