"""Rows as chats: messages of OpenAI and ShareGPT, tool calls and tools, in the one shape that chat templates take."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from understudy.errors import brief
from understudy.tasks.fields import MissingValueError
from understudy.tasks.rows import without_nulls
from understudy.types import IMAGE

Said = dict[str, Any]

_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    "function_call": "assistant",
}
"""Roles of ShareGPT and of older interfaces, in any letter case -> those that chat templates know. Others stay as they are."""
_THOUGHTS = ("reasoning", "thinking")
"""Other names of `reasoning_content`."""
_CHAT = re.compile(r"""\s*\[\s*\{\s*["'](role|from|content|value)["']\s*:""")
"""Start of a list of messages as JSON, or as Python prints it."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")
SYSTEM_ROLES = ("system", "developer")


def read_messages(value: object, *, images: bool = False) -> list[Said]:
    """A field of a row as messages: role, content (a string), and what else a message has that is not null.

    A string is a user's message, unless it is a list of messages as JSON. Tool calls are brought into OpenAI's form with
    their arguments as a mapping. `images`: a part of a message may be one, for which `IMAGE` stands. Raises ValueError for what
    is no chat, and MissingValueError for a message without content; their texts go on behind the name of the field.
    """
    if isinstance(value, str):
        value = chat_in(value) or [{"role": "user", "content": value}]
    if isinstance(value, Mapping):
        value = _transposed(value)
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], list | tuple):
        value = value[0]  # a conversation of one part, as BFCL has it
    if not isinstance(value, list | tuple):
        raise ValueError(f" is {brief(value)}; it must be a string, or a list of messages with role and content")
    return [
        _read_message(item, f", message {number}", is_last=number == len(value), images=images)
        for number, item in enumerate(value, start=1)
    ]


def read_tools(value: object) -> tuple[Said, ...] | None:
    """A field of a row as schemas of tools, without nulls; None for none. JSON in strings is read. Raises ValueError."""
    value = _from_json(value or None, "")
    if not value:
        return None
    if not isinstance(value, list | tuple):
        raise ValueError(f" is {brief(value)}; it must be a list of tools")
    tools = []
    for number, item in enumerate(value, start=1):
        tool = without_nulls(_from_json(item, f", tool {number}"))
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f", tool {number} is {brief(item)}; it must be an object with a name")
        if "parameters" in function:
            function["parameters"] = without_nulls(_from_json(function["parameters"], f", parameters of tool {number}"))
        tools.append(tool)
    return tuple(tools)


def conversation_facts(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[object]:
    """Facts by which conversations differ: roles, contents, reasoning, calls, tools; the ids of calls are arbitrary."""
    said = [
        [message["role"], message["content"], message.get("reasoning_content"), message.get("name")]
        + [call.get("function", call) for call in message.get("tool_calls", ())]
        for message in messages
    ]
    return [said, list(tools or ())]


def _read_message(item: object, where: str, *, is_last: bool, images: bool) -> Said:
    if not isinstance(item, Mapping):
        raise ValueError(f"{where} is {brief(item)}; it must have role and content")
    said = {key: value for key, value in item.items() if value is not None}
    # empty strings where other rows have reasoning or calls
    for name in ("reasoning_content", *_THOUGHTS, "tool_calls"):
        if isinstance(said.get(name), str) and not said[name].strip():
            del said[name]
    if "from" in said and "role" not in said:
        said = {"role": said.pop("from"), "content": said.pop("value", None)} | said
    role, content = said.pop("role", None), said.pop("content", None)
    if not isinstance(role, str):
        raise ValueError(f"{where} is {brief(item)}; it must have role and content")
    role = role.lower() if role.lower() in {*_ROLES, *_ROLES.values(), *SYSTEM_ROLES} else role
    for name in _THOUGHTS:
        if "reasoning_content" not in said and isinstance(said.get(name), str):
            said["reasoning_content"] = said.pop(name)
    if role == "function_call":
        said["tool_calls"], content = content, None
    if "function_call" in said:
        said["tool_calls"] = [said.pop("function_call")]
    calls = _read_calls(said.pop("tool_calls", None), where)
    role = _ROLES.get(role, role)
    # a tool may return a list of strings, which are no parts of one text
    if isinstance(content, list | tuple) and not (role == "tool" and any(isinstance(part, str) for part in content)):
        content = "".join(_read_part(part, where, images) for part in content)
    # a question or an answer that is null is a missing one, not a chat of another kind
    is_null_question = role == "user" and not item.keys().isdisjoint(("content", "value"))
    is_null_answer = role == "assistant" and (is_last or "reasoning_content" in said)
    if content is None and (calls or is_null_question or is_null_answer):
        content = ""
    if content is None and not item.keys().isdisjoint(("content", "value")):
        raise MissingValueError(f"{where} ({role}) has no content")
    if not isinstance(content, str):
        hint = " (what a tool returns is JSON in a string)" if role == "tool" else ""
        raise ValueError(f"{where} ({role}) has the content {brief(content)}; it must be a string{hint}")
    return {"role": role, "content": content, **said} | ({"tool_calls": calls} if calls else {})


def _read_part(part: object, where: str, images: bool) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        kind = part.get("type") or "text"
        if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            return str(part["text"])
        if kind in _IMAGE_PARTS and images:
            return IMAGE
        if kind not in _TEXT_PARTS:
            hint = "; task.image_field says where the images are" if kind in _IMAGE_PARTS else ""
            raise ValueError(f"{where} has a part of type {kind!r}; only text is read{hint}")
    raise ValueError(f"{where} has the part {brief(part)}; it must be a text, or an object with type and text")


def _read_calls(value: object, where: str) -> list[Said]:
    value = _from_json(value, f"{where}, tool calls")
    value = [value] if isinstance(value, Mapping) else value or []
    calls: list[Said] = []
    for item in value if isinstance(value, list | tuple) else [value]:
        call = {key: part for key, part in item.items() if part is not None} if isinstance(item, Mapping) else {}
        function = call.pop("function", None) or {key: call.pop(key) for key in ("name", "arguments") if key in call}
        arguments = _from_json(function.get("arguments") or {}, f"{where}, arguments of a tool call") or {}
        if not isinstance(function.get("name"), str) or not isinstance(arguments, Mapping):
            raise ValueError(
                f"{where} has the tool call {brief(item)}; it must have a name, and arguments as an object"
            )
        # nulls among the arguments stay: rows of a columnar format come without theirs
        function = {key: part for key, part in function.items() if part is not None}
        calls.append({"type": "function", **call, "function": function | {"arguments": dict(arguments)}})
    return calls


def _from_json(value: object, where: str) -> Any:
    """The value, or what it holds as JSON where it is a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is {brief(value)}, which is not JSON: {error}") from error


def chat_in(text: str) -> Any:
    """The messages that a string holds as JSON, which a table of text has for chats; None where it is no chat.

    Raises ValueError for a chat that is cut off or printed by Python.
    """
    if not _CHAT.match(text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f" is {brief(text)}, which begins like a list of messages and is not JSON ({error}); write chats as JSON"
        ) from error
    is_chat = all(isinstance(item, dict) and item.keys() & {"role", "from"} for item in value)
    return value if is_chat else None


def _transposed(columns: Mapping[str, Any]) -> object:
    """Messages of one list for each key, as `datasets` writes a `Sequence` of objects; anything else stays."""
    values = list(columns.values())
    if not columns or not all(isinstance(value, list) and len(value) == len(values[0]) for value in values):
        return columns
    return [dict(zip(columns, item, strict=True)) for item in zip(*values, strict=True)]
