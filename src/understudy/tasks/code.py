"""The task `code`: programs that are run against the tests of their problems."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, cast

from understudy import config
from understudy.errors import DataError, brief
from understudy.sandbox import SANDBOXES, Bubblewrap, Sandbox
from understudy.tasks.datasets import Named
from understudy.tasks.fields import MissingValueError, is_missing, read_field, read_text
from understudy.tasks.verifiers.code import CodeTests, defines, grade_code
from understudy.tasks.verifiers.code_tests import (
    assert_tests,
    contest_tests,
    evalplus_tests,
    humaneval_tests,
    io_tests,
    mbpp_tests,
    packed_tests,
)
from understudy.types import Grade, Prompt

PROGRAM = "{prompt}\nAnswer with the complete program in one block of Python code (```python ... ```)."
_COMPLETE = "Complete this function:"
_READS = "The program reads from standard input and prints to standard output."
_BESIDE = (
    "entry_point",
    "test_setup_code",
    "test_imports",
    "base_input",
    "plus_input",
    "atol",
    "assertion",
    "starter_code",
)
"""Fields beside those that are named, as the usual data sets have them."""
_PYTHON_3 = 3
"""Its number among the languages of CodeContests."""
_SOLVED = "canonical_solution"
"""The solution in EvalPlus's own files, which have other fields than those on the hub."""


@dataclass(frozen=True, kw_only=True)
class Code(Named):
    """The task `code`: HumanEval, MBPP, their extended versions and others by name, or a file of problems with tests.

    The field of the tests holds Python code or a list of asserts, which call the functions that `solution_field` defines; or
    `inputs` and `outputs` of a program, as an object or as JSON. Rows of HumanEval(+) and MBPP(+) are known by their further
    fields. The verifier is `code`, and programs run in `sandbox`.
    """

    kind: ClassVar[str] = "code"

    sandbox: Sandbox | None = config.choice(SANDBOXES, optional=True)
    """Sandbox of the programs; null: bubblewrap with its defaults."""
    template: str = PROGRAM
    """The wording around the problem."""
    verifier: str = "code"
    """Runs the program of a response."""

    @cached_property
    def _box(self) -> Sandbox:
        return self.sandbox or Bubblewrap()

    def check_files(self) -> None:
        super().check_files()
        if self.verifier == "code":
            self._box.check()

    def grade(self, prompt: Prompt, text: str) -> Grade:
        if self.verifier != "code" or prompt.reference is None:
            return super().grade(prompt, text)
        return grade_code(text, prompt.reference, self._box)

    @property
    def graders(self) -> int:
        return 1 if self.verifier != "code" or self.rewards else self._box.num_workers

    def fields_read(self, row: Mapping[str, Any]) -> list[str | None]:
        beside = [*_BESIDE]
        if row.get("base_input"):
            beside.append(_SOLVED)
        if len(self.reference_fields(row)) > 1:
            beside.append("metadata")
        return [*super().fields_read(row), *beside]

    def to_prompt(self, place: str, row: Mapping[str, Any]) -> Prompt:
        made = dict(row)
        solution = None if self.solution_field is None else self._program(place, row)
        if self.reference_field is not None:
            tests = self._tests(place, row, solution)
            made[self.reference_field] = tests.dump()
            made[self.prompt_field] = self._shown(place, row, tests)
        if self.solution_field is not None:
            made[self.solution_field] = None if solution is None else f"```python\n{solution.strip()}\n```"
        return super().to_prompt(place, made)

    def _tests(self, place: str, row: Mapping[str, Any], solution: str | None) -> CodeTests:
        """The tests of a row. Raises DataError for malformed tests, MissingValueError if there are none."""
        field = cast(str, self.reference_field)
        try:
            if row.get("base_input"):
                return evalplus_tests(row)
            names = self.reference_fields(row)
            value = read_field(row, names[0], place) if len(names) == 1 else self._contest(place, row, names)
            if isinstance(value, str) and row.get("entry_point") and "def check(" in value:
                return humaneval_tests({**row, "prompt": read_text(row, self.prompt_field, place), "test": value})
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                return mbpp_tests({**row, "test_list": value, "code": solution or ""})
            if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
                value = config.load_json(value)
            if isinstance(value, Mapping) and not {"tests", "names"} - value.keys():
                return CodeTests.load(json.dumps(value))
            if isinstance(value, Mapping | list):
                if not value or not (value["inputs"] if isinstance(value, Mapping) else value):
                    raise MissingValueError(f"{place}: field {field!r} has no tests")
                return io_tests(value)
            return assert_tests(str(value), solution or "")
        except (ValueError, KeyError, TypeError, SyntaxError) as error:
            if isinstance(error, MissingValueError):
                raise
            raise DataError(
                f"{place}: field {field!r} holds no tests that can be read ({type(error).__name__}: {brief(str(error))}); they "
                "are Python code, a list of asserts, or inputs and outputs"
            ) from error

    def _contest(self, place: str, row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """The tests of several fields, such as public and private ones, of which all but one may be empty."""
        values = list[Any]()
        for name in names:
            try:
                value = read_field(row, name, place, required=True)
            except MissingValueError:
                continue
            values.append(packed_tests(value) if isinstance(value, str) else value)
        facts = row.get("metadata")
        facts = config.load_json(facts) if isinstance(facts, str) and facts.strip() else facts
        return contest_tests(values, facts.get("func_name") if isinstance(facts, Mapping) else None)

    def _program(self, place: str, row: Mapping[str, Any]) -> str | None:
        """The solution of a row, whole. None where it has none."""
        named = cast(str, self.solution_field)
        value = read_field(row, _SOLVED if row.get("base_input") and named not in row else named, place)
        if isinstance(value, Mapping):
            # CodeContests has programs in several languages
            pairs = zip(value.get("language", ()), value.get("solution", ()), strict=False)
            value = [program for language, program in pairs if language in (_PYTHON_3, "PYTHON3")]
        if isinstance(value, str) and value.lstrip()[:1] == "[":
            value = config.load_json(value)
        if isinstance(value, list):
            value = next(iter(value), None)
        if is_missing(value):
            return None
        name = row.get("entry_point")
        if not name or defines(str(value), name):
            return str(value)
        return read_text(row, self.prompt_field, place) + str(value)

    def _shown(self, place: str, row: Mapping[str, Any], tests: CodeTests) -> Any:
        """The problem as the student reads it. A chat prompt states the request; a base model continues the text."""
        value = read_field(row, self.prompt_field, place, required=True)
        if not isinstance(value, str) or not self.chat:
            return value
        said = value.strip()
        if row.get("entry_point"):
            return f"{_COMPLETE}\n```python\n{value.rstrip()}\n```"
        starter = row.get("starter_code")
        if isinstance(starter, str) and starter.strip():
            return f"{said}\n\nBegin with:\n```python\n{starter.rstrip()}\n```"
        if tests.inputs:
            return f"{said}\n\n{_READS}"
        names = self.reference_fields(row)
        listed = read_field(row, names[0], place) if len(names) == 1 else None
        # how the function is called; the others are for grading only
        return f"{said}\nFor example:\n{listed[0]}" if isinstance(listed, list) and listed else said
