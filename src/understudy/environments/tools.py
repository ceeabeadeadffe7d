"""Tools: Python functions that the student calls by name, and the environment that makes its calls."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from understudy.environments.base import Step
from understudy.errors import nearest
from understudy.types import Grade, Message, ToolCall

_TYPES: Mapping[object, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    dict: "object",
    list: "array",
}
_PYTHON: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (Mapping,),
    "array": (list, tuple),
}


@dataclass(frozen=True)
class Tool:
    """A function and the JSON schema by which a model knows it. Build one from a plain function with `Tool.of`."""

    function: Callable[..., object]
    """Called with the arguments by name, as JSON has them. An exception goes back to the model as text."""
    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of the arguments, an object."""

    @classmethod
    def of(cls, function: Callable[..., object]) -> Tool:
        """Name, description and parameters from a function's name, docstring and annotations.

        `Annotated[str, "The user's id"]` describes a parameter. Raises TypeError for an annotation without a JSON schema.
        """
        hints = typing.get_type_hints(function, include_extras=True)
        properties, required = {}, []
        for name, parameter in inspect.signature(function).parameters.items():
            properties[name] = _schema(hints.get(name, str), f"{function.__name__}({name})")
            if parameter.default is parameter.empty:
                required.append(name)
        parameters = {"type": "object", "properties": properties, "required": required}
        return cls(function, function.__name__, inspect.getdoc(function) or "", parameters)

    @cached_property
    def schema(self) -> dict[str, Any]:
        """The tool as `Prompt.tools` has it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    def call(self, arguments: Mapping[str, Any]) -> object:
        """Raises ValueError for arguments that do not fit the schema, and as the function."""
        if wrong := misfit(arguments, self.parameters, "the arguments"):
            raise ValueError(wrong)
        return self.function(**arguments)


def _schema(hint: Any, place: str) -> dict[str, Any]:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return {**_schema(args[0], place), "description": args[1]}
    if origin is Literal:
        return {"type": "string", "enum": list(args)}
    if origin in (Union, types.UnionType):
        return _schema(next(arg for arg in args if arg is not type(None)), place)
    if typing.is_typeddict(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        properties = {name: _schema(inner, f"{place}.{name}") for name, inner in hints.items()}
        return {"type": "object", "properties": properties, "required": sorted(hint.__required_keys__)}
    if (origin or hint) is list:
        return {"type": "array"} | ({"items": _schema(args[0], place)} if args else {})
    if (origin or hint) not in _TYPES:
        raise TypeError(f"{place} is annotated with {hint!r}, which has no JSON schema here")
    return {"type": _TYPES[origin or hint]}


def misfit(value: object, schema: Mapping[str, Any], place: str) -> str:
    """Why a value does not fit a JSON schema of types, properties, items and enums; empty where it does."""
    kind = schema.get("type")
    expected = _PYTHON.get(kind) if isinstance(kind, str) else None
    if expected is not None and (not isinstance(value, expected) or (isinstance(value, bool) and kind != "boolean")):
        return f"{place} must be of type {kind}, not {json.dumps(value, default=str)[:80]}"
    if "enum" in schema and value not in schema["enum"]:
        return (
            f"{place} must be one of {', '.join(map(str, schema['enum']))}, not {json.dumps(value, default=str)[:80]}"
        )
    if isinstance(value, Mapping) and "properties" in schema:
        for name in schema.get("required", ()):
            if name not in value:
                return f"{place} must have {name!r}"
        for name, inner in value.items():
            if name not in schema["properties"]:
                return f"{place} may not have {name!r}; {nearest(name, schema['properties'])}"
            if wrong := misfit(inner, schema["properties"][name], repr(name)):
                return wrong
    if isinstance(value, list | tuple) and "items" in schema:
        wrongs = (misfit(item, schema["items"], f"item {number} of {place}") for number, item in enumerate(value, 1))
        return next(filter(None, wrongs), "")
    return ""


class Graded:
    """The environment of tasks that grade the student's only message as the chat template reads it, tool calls included."""

    max_turns = 1

    def __init__(self, grade: Callable[[Message], Grade]) -> None:
        self._grade = grade

    def step(self, message: Message) -> Step:
        """The grade; the episode is over."""
        return Step(done=True, reward=self._grade(message))

    def close(self) -> None:
        """Nothing is held."""


class ToolUse:
    """Makes the calls in each message of the student and gives it the results; a message without a call is its answer.

    A call that is malformed, unknown or does not fit its schema, and a tool that raises, give the student an error to read. One
    thread at a time calls the tools, so they may share a state; each episode needs tools of its own then.
    """

    def __init__(
        self,
        tools: Iterable[Tool],
        *,
        answer: Callable[[Message], Step] = lambda message: Step(done=True),
        ending: Mapping[str, Callable[[], Step]] | None = None,
        max_turns: int = 10,
        max_calls: int = 16,
        max_result_chars: int = 8000,
        deadline_s: float = 60.0,
    ) -> None:
        """`answer`: what follows a message without a call. `ending`: tools that end the episode, with their last step.

        `max_calls` is a limit for each message, and `deadline_s` for all calls of it together.
        """
        self.tools = {tool.name: tool for tool in tools}
        self.max_turns = max_turns
        self.deadline_s = deadline_s
        self._answer, self._ending = answer, ending or {}
        self._max_calls, self._max_result_chars = max_calls, max_result_chars
        self._num_calls = 0

    def step(self, message: Message) -> Step:
        """The results of the message's calls, in order, or what `answer` says."""
        if not message.tool_calls:
            return self._answer(message)
        results = []
        for number, call in enumerate(message.tool_calls, start=1):
            if number > self._max_calls:
                results.append(self._reply(call, f"a message may make {self._max_calls} calls", is_error=True))
                break
            reply = self._make(call)
            results.append(reply)
            end = self._ending.get(call.name or "")
            if end is not None and "error" not in reply:
                return end()
        return Step(tuple(results))

    def close(self) -> None:
        """Nothing is held."""

    def _make(self, call: ToolCall) -> Mapping[str, Any]:
        if call.error:
            return self._reply(call, call.error, is_error=True)
        tool = self.tools.get(call.name or "")
        if tool is None:
            hint = nearest(str(call.name), self.tools)
            return self._reply(call, f"there is no tool {str(call.name)[:80]!r}; {hint}", is_error=True)
        try:
            result = tool.call(call.arguments)
        # a tool is other people's code, and may run the student's
        except (Exception, SystemExit) as error:
            return self._reply(call, str(error) or type(error).__name__, is_error=True)
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        return self._reply(call, text)

    def _reply(self, call: ToolCall, text: str, *, is_error: bool = False) -> Mapping[str, Any]:
        """A message of the role tool. Its id has nine characters, as Mistral's templates demand."""
        self._num_calls += 1
        text = f"Error: {text}" if is_error else text
        if len(text) > self._max_result_chars:
            text = f"{text[: self._max_result_chars]}... ({len(text) - self._max_result_chars:,} more characters)"
        reply = {"role": "tool", "name": call.name or "", "content": text, "tool_call_id": f"call{self._num_calls:05d}"}
        return reply | ({"error": True} if is_error else {})
