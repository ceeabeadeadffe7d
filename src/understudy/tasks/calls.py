"""The task `calls`: questions to answer by calling the right functions with the right arguments, as BFCL has them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from understudy.config import load_json
from understudy.environments import Environment
from understudy.environments.tools import Graded
from understudy.errors import DataError, brief
from understudy.tasks.chats import Said
from understudy.tasks.datasets import Named
from understudy.tasks.fields import read_field
from understudy.tasks.verifiers.calls import gold_calls, grade_calls, match_calls
from understudy.types import Grade, Message, Prompt

_TYPES: Mapping[str, str | None] = {"dict": "object", "float": "number", "tuple": "array", "list": "array", "any": None}
"""Types of BFCL, which are Python's -> those of JSON schemas; None: any."""


@dataclass(frozen=True, kw_only=True)
class Calls(Named):
    """The task `calls`: the rows of BFCL with one turn, or others of their form.

    The chat template shows the functions to the student. A response is right if its calls are those of the reference, in any
    order, by the rules of the verifier `calls`; where no function fits, if it makes no call.
    """

    kind: ClassVar[str] = "calls"

    tools_field: str | None = "function"
    """Schemas of the functions."""
    verifier: str = "calls"
    """`calls`, which knows the types of the functions' arguments."""

    def grade(self, prompt: Prompt, text: str) -> Grade:
        if prompt.reference is None or self.verifier != "calls":
            return super().grade(prompt, text)
        return grade_calls(text, prompt.reference[0], prompt.tools or ())

    def environment(self, prompt: Prompt) -> Environment:
        """Grades the calls as the chat template reads them."""
        if prompt.reference is None or self.verifier != "calls":
            return super().environment(prompt)
        reference, tools = prompt.reference[0], prompt.tools or ()

        def grade(message: Message) -> Grade:
            return match_calls(message.content, message.tool_calls, reference, tools)

        return Graded(grade)

    def gold(self, prompt: Prompt) -> Sequence[str]:
        """A response that the reference accepts, in the format of Hermes and Qwen."""
        if prompt.reference is None or self.verifier != "calls":
            return super().gold(prompt)
        calls = gold_calls(prompt.reference[0], prompt.tools or ())
        told = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls]
        return ("\n".join(told) or "None of these functions can answer this.",)

    def _conversation(
        self, place: str, row: Mapping[str, Any]
    ) -> tuple[list[Said], tuple[Said, ...] | None, str | None]:
        turns = row.get(self.prompt_field)
        if "involved_classes" in row and isinstance(turns, list):
            raise DataError(
                f"{place}: field {self.prompt_field!r} has {len(turns)} turns, whose calls need simulated services; the task "
                "calls reads rows of one turn"
            )
        messages, tools, solution = super()._conversation(place, row)
        functions = [_as_json_schema(tool.get("function", tool)) for tool in tools or ()]
        return messages, tuple({"type": "function", "function": one} for one in functions) or None, solution

    def _references(self, place: str, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The accepted calls as JSON; an empty list is a reference too."""
        field = str(self.reference_field)
        value = [] if row.get(field) == [] else read_field(row, field, place)
        try:
            value = load_json(value) if isinstance(value, str) else value
        except ValueError as error:
            raise DataError(f"{place}: field {field!r} is {brief(value)}, which is not JSON: {error}") from error
        calls = value if isinstance(value, list) else [None]
        if not all(isinstance(call, dict) and len(call) == 1 for call in calls):
            raise DataError(f"{place}: field {field!r} is {brief(value)}; it must be a list of {{function: arguments}}")
        for arguments in (next(iter(call.values())) for call in calls if call):
            if not isinstance(arguments, dict) or not all(isinstance(values, list) for values in arguments.values()):
                raise DataError(
                    f"{place}: field {field!r} has the arguments {brief(arguments)}; each needs a list of accepted values"
                )
        return (json.dumps(calls, ensure_ascii=False),)


def _as_json_schema(schema: Any) -> Any:
    """The schema with the types of JSON, at any depth; a property may itself be named `type`."""
    if isinstance(schema, list):
        return [_as_json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _as_json_schema(value) for key, value in schema.items()}
    if isinstance(kind := schema.get("type"), str):
        known = _TYPES.get(kind, kind)
        found = {key: known if key == "type" else value for key, value in found.items() if key != "type" or known}
    return found
