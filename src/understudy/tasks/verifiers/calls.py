"""Function calls compared with the accepted ones, by the rules of the Berkeley Function-Calling Leaderboard (AST match).

The reference is JSON: a list of calls `{function: {argument: [accepted values]}}`, where "" among the values says that an
argument may be left out. The calls may come in any order; an empty list means that none may be made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from understudy.tasks.tool_calls import LLAMA, MISTRAL, TAGGED, Tools
from understudy.types import Grade, ToolCall

_IGNORED = re.compile(r"[ ,./\-_*^]")
"""Characters that do not count in a string, as the leaderboard has them."""
_KINDS: Mapping[str, type] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
}
OPTIONAL = ""


def grade_calls(text: str, reference: str, tools: Tools = ()) -> Grade:
    """1.0 for a response that makes the calls of the reference, 0.0 otherwise.

    Calls are read in any of the formats that chat templates write. `tools` are the schemas that say the arguments' types and
    which of them are required.
    """
    form = MISTRAL if "[TOOL_CALLS]" in text else TAGGED if "<tool_call>" in text else LLAMA
    said, calls = form.read(text, tools)
    return match_calls(said, calls, reference, tools)


def match_calls(said: str, calls: Sequence[ToolCall], reference: str, tools: Tools = ()) -> Grade:
    """The grade of calls that are read already, and of what was said beside them."""
    expected = json.loads(reference)
    answer = _shown(calls) if calls else None
    broken = next((call.error for call in calls if call.error), "")
    if broken:
        return Grade(0.0, answer, broken)
    if not expected:
        if calls:
            return Grade(0.0, answer, "no function fits the question, but one was called")
        return Grade(1.0, "no call") if said.strip() else Grade(0.0, note="the response is empty")
    if len(calls) != len(expected):
        return Grade(0.0, answer, f"{len(calls)} calls were made, and not {len(expected)}")
    functions = {function["name"]: function for function in (tool.get("function", tool) for tool in tools)}
    wrong = [[_difference(call, accepted, functions) for accepted in expected] for call in calls]
    if _all_matched([[not why for why in row] for row in wrong]):
        return Grade(1.0, answer)
    unmatched = next((row for row in wrong if all(row)), None)
    return Grade(0.0, answer, "two calls stand for one" if unmatched is None else min(unmatched, key=_rank))


def gold_calls(reference: str, tools: Tools = ()) -> list[dict[str, Any]]:
    """Calls that the reference accepts: of each argument that is needed the first value."""
    found = []
    for accepted in json.loads(reference):
        ((name, arguments),) = accepted.items()
        schemas = [tool.get("function", tool) for tool in tools]
        required = next((schema["parameters"].get("required", ()) for schema in schemas if schema["name"] == name), ())
        chosen = {key: values for key, values in arguments.items() if key in required or OPTIONAL not in values}
        found.append({"name": name, "arguments": {key: _first(values) for key, values in chosen.items()}})
    return found


def _shown(calls: Sequence[ToolCall]) -> str:
    """The calls as one text, the same for any order of calls and arguments: majority votes count it."""
    told = [json.dumps([_plain_name(call.name or ""), call.arguments], sort_keys=True, default=str) for call in calls]
    return " ".join(sorted(told))


def _first(values: Sequence[Any]) -> Any:
    value = next((value for value in values if value != OPTIONAL), OPTIONAL)
    return _chosen(value)


def _chosen(option: Any) -> Any:
    """The value that an option stands for: of an object, the first accepted value of each key that is needed."""
    if isinstance(option, dict):
        kept = {key: value for key, value in option.items() if not (isinstance(value, list) and OPTIONAL in value)}
        return {key: _first(value) if isinstance(value, list) else _chosen(value) for key, value in kept.items()}
    return [_chosen(item) for item in option] if isinstance(option, list) else option


def _plain_name(name: str) -> str:
    """Some interfaces allow no dots in names."""
    return name.replace(".", "_")


def _rank(why: str) -> int:
    """The most telling of several differences: a wrong value before a wrong function."""
    return why.startswith("the function")


def _difference(call: ToolCall, accepted: Mapping[str, Any], functions: Mapping[str, Any]) -> str:
    """Why a call is not the accepted one; empty where it is."""
    ((name, arguments),) = accepted.items()
    if _plain_name(call.name or "") != _plain_name(name):
        return f"the function {call.name!r} is called, and not {name!r}"
    schema = functions.get(name, {}).get("parameters", {})
    properties = schema.get("properties", {})
    for required in schema.get("required", ()):
        if required not in call.arguments:
            return f"{name} needs the argument {required!r}"
    for key, value in call.arguments.items():
        if key not in arguments or (properties and key not in properties):
            return f"{name} may not have the argument {key!r} here"
        if not _fits(value, arguments[key], properties.get(key, {}).get("type")):
            return f"the argument {key!r} of {name} is {json.dumps(value, default=str)[:80]}"
    for key, values in arguments.items():
        if key not in call.arguments and OPTIONAL not in values:
            return f"{name} needs the argument {key!r} here"
    return ""


def _fits(value: Any, options: Sequence[Any], kind: str | None) -> bool:
    """Whether a value has the type of the schema, or else that of the accepted ones, and is one of them."""
    if kind == "number" and type(value) is int:
        value = float(value)
    expected = _KINDS.get(kind or "")
    typical = next((option for option in options if option != OPTIONAL), None)
    if expected is not None and type(value) is not expected and type(value) is not type(typical):
        return False
    return any(_same(value, option) for option in options)


def _same(value: Any, option: Any) -> bool:
    if isinstance(option, dict):
        return isinstance(value, dict) and _same_object(value, option)
    if isinstance(option, list):
        return (
            isinstance(value, list)
            and len(value) == len(option)
            and all(_same(one, other) for one, other in zip(value, option, strict=True))
        )
    if isinstance(option, str):
        return isinstance(value, str) and _standard(value) == _standard(option)
    if isinstance(option, bool) or isinstance(value, bool):
        return value is option
    return bool(value == option)


def _same_object(value: Mapping[str, Any], option: Mapping[str, Any]) -> bool:
    """Each key of an accepted object has a list of accepted values, as an argument has."""
    lists = {key: values if isinstance(values, list) else [values] for key, values in option.items()}
    return all(key in lists and any(_same(inner, one) for one in lists[key]) for key, inner in value.items()) and all(
        key in value or OPTIONAL in values for key, values in lists.items()
    )


def _standard(text: str) -> str:
    return _IGNORED.sub("", text).lower().replace("'", '"')


def _all_matched(fits: Sequence[Sequence[bool]]) -> bool:
    """Whether each row can have a column of its own that fits it (augmenting paths)."""
    owner: dict[int, int] = {}

    def place(row: int, tried: set[int]) -> bool:
        for column, fit in enumerate(fits[row]):
            if fit and column not in tried:
                tried.add(column)
                if column not in owner or place(owner[column], tried):
                    owner[column] = row
                    return True
        return False

    return all(place(row, set()) for row in range(len(fits)))
