"""Tool calls as models write them, which is as their chat templates show calls to them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from understudy.types import ToolCall

_TAG_END = re.compile(r"</(search|answer)>")
"""Ends what a search agent writes: Search-R1, R1-Searcher, ZeroSearch."""

Tools = Sequence[Mapping[str, Any]]
"""Schemas of tools, each with its function under "function" or bare."""

_TAGGED = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"<function=([^>\n]*)>(.*?)(</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]*)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)
_NAMED = re.compile(r"\s*([\w.\-/]+)\s*(?:\[CALL_ID\]\w*)?\s*(?:\[ARGS\])?\s*(?=\{)")


@dataclass(frozen=True)
class CallFormat:
    """One way to write calls."""

    marks: tuple[str, ...]
    """Texts around calls, which some tokenizers have as special tokens."""
    read: Callable[[str, Tools], tuple[str, tuple[ToolCall, ...]]]
    """(a message without its reasoning, the tools) -> what it says beside its calls, and the calls."""


def call_format(template: str) -> CallFormat:
    """The format that a chat template writes calls in; that of Hermes and Qwen where it writes none."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" not in template and '"parameters": ' in template and "ipython" in template:
        return LLAMA
    return TAGGED


def read_call(text: str, arguments_key: str = "arguments") -> ToolCall:
    """The call in a JSON object with `name` and arguments; what cannot be read is a call with its error."""
    try:
        call = _from_json(text)
    except ValueError as error:
        return ToolCall(text, error=f"the call is no JSON: {error}")
    return _checked(text, call, arguments_key)


def _checked(text: str, call: object, arguments_key: str = "arguments") -> ToolCall:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return ToolCall(text, error="the call has no name")
    arguments = call.get(arguments_key, {})
    if not isinstance(arguments, dict):
        return ToolCall(text, call["name"], error=f"the {arguments_key} are no JSON object")
    return ToolCall(text, call["name"], arguments)


def _from_json(text: str) -> Any:
    """Raises ValueError, also for NaN and Infinity, which are no JSON, and for what is nested too deep."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _read_tagged(text: str, tools: Tools) -> tuple[str, tuple[ToolCall, ...]]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, or Qwen3-Coder's `<function=...>` between the same tags."""
    calls = []
    for match in _TAGGED.finditer(text):
        inner = match[1].strip()
        if not match[2]:
            calls.append(ToolCall(inner, error="the call is not closed by </tool_call>"))
        elif inner.startswith("<function="):
            calls.append(_read_function(inner, tools))
        else:
            calls.append(read_call(inner))
    return (_TAGGED.sub("", text).strip() if calls else text), tuple(calls)


def _read_function(text: str, tools: Tools) -> ToolCall:
    """A value is text where the tool's schema says string, else JSON where it is some."""
    match = _FUNCTION.match(text)
    if match is None or not match[3]:
        return ToolCall(text, error="the call is not closed by </function>")
    name = match[1].strip()
    schemas = [tool.get("function", tool) for tool in tools]
    properties = next((_part(schema, "parameters", "properties") for schema in schemas if schema["name"] == name), None)
    arguments: dict[str, Any] = {}
    for key, value in _PARAMETER.findall(match[2]):
        arguments[key] = value
        if _part(properties, key, "type") != "string":
            try:
                arguments[key] = _from_json(value)
            except ValueError:
                arguments[key] = {"True": True, "False": False, "None": None}.get(value, value)
    return ToolCall(text, name, arguments)


def _part(value: object, *keys: str) -> object:
    """The value of a schema under nested keys; None where it has none, or is no schema."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _read_mistral(text: str, tools: Tools) -> tuple[str, tuple[ToolCall, ...]]:
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`; of newer models `[TOOL_CALLS]name[ARGS]{...}` for each call."""
    content, *parts = text.split("[TOOL_CALLS]")
    calls: list[ToolCall] = []
    for part in parts:
        part = part.strip()
        if named := _NAMED.match(part):
            try:
                calls.append(ToolCall(part, named[1], _from_json(part[named.end() :])))
            except ValueError as error:
                calls.append(ToolCall(part, named[1], error=f"the arguments are no JSON: {error}"))
            continue
        try:
            found = _from_json(part)
        except ValueError as error:
            calls.append(ToolCall(part, error=f"the call is no JSON: {error}"))
            continue
        items = found if isinstance(found, list) else [found]
        calls += [_checked(json.dumps(call, ensure_ascii=False), call) for call in items]
    return (content.strip() if parts else text), tuple(calls)


def _read_llama(text: str, tools: Tools) -> tuple[str, tuple[ToolCall, ...]]:
    """A message that is nothing but `{"name": ..., "parameters": {...}}`, or several with semicolons between them."""
    told = text.strip()
    marked = told.startswith("<|python_tag|>")
    told = told.removeprefix("<|python_tag|>").strip()
    if not marked and re.match(r'\{\s*"(name|type)"\s*:', told) is None:
        return text, ()
    calls, decoder, at = list[ToolCall](), json.JSONDecoder(parse_constant=_refuse), 0
    while at < len(told):
        try:
            call, end = decoder.raw_decode(told, at)
        except (ValueError, RecursionError) as error:
            why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
            calls.append(ToolCall(told[at:], error=f"the call is no JSON: {why}"))
            break
        key = "parameters" if isinstance(call, dict) and "parameters" in call else "arguments"
        calls.append(_checked(told[at:end], call, key))
        at = end
        while at < len(told) and told[at] in "; \n\t":
            at += 1
    return "", tuple(calls)


TAGGED = CallFormat(("<tool_call>", "</tool_call>"), _read_tagged)
MISTRAL = CallFormat(("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), _read_mistral)
LLAMA = CallFormat(("<|python_tag|>",), _read_llama)


def parse_tag(text: str) -> ToolCall | None:
    """The first `<search>...</search>` or `<answer>...</answer>` that is closed. What opens it is the last such tag before its
    end: thoughts may name it."""
    end = _TAG_END.search(text)
    if end is None:
        return None
    name = end[1]
    _, opening, inside = text[: end.start()].rpartition(f"<{name}>")
    return ToolCall(inside.strip(), name, error="" if opening else f"there is no <{name}> before </{name}>")
