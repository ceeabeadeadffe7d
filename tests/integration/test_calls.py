"""Function calls compared with those that BFCL accepts: its rules, hostile calls, and all of its reference answers."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from understudy.tasks.verifiers.calls import grade_calls, match_calls
from understudy.types import Grade, ToolCall

TOOL = {
    "name": "trip.book",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "nights": {"type": "integer"},
            "price": {"type": "number"},
            "breakfast": {"type": "boolean"},
            "stops": {"type": "array", "items": {"type": "string"}},
            "guest": {"type": "object"},
            "legs": {"type": "array", "items": {"type": "object"}},
        },
        "required": ["city"],
    },
}
ACCEPTED = {
    "city": ["New York, NY", "NYC"],
    "nights": [2],
    "price": ["", 100.0],
    "breakfast": ["", True],
    "stops": ["", ["Boston", "New Haven"]],
    "guest": ["", {"name": ["Ann"], "age": ["", 30]}],
    "legs": ["", [{"to": ["Boston"]}, {"to": ["NYC", "New York"]}]],
}
LEAST = {"city": "NYC", "nights": 2}


def graded(*arguments: dict[str, Any], name: str = "trip.book", accepted: Any = None, said: str = "") -> Grade:
    reference = json.dumps([{"trip.book": ACCEPTED}] * len(arguments) if accepted is None else accepted)
    return match_calls(said, [ToolCall("", name, one) for one in arguments], reference, [TOOL])


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"city": "new york NY"},
        {"city": "New-York. (NY)".replace("(", "").replace(")", "")},
        {"price": 100},
        {"price": 100.0},
        {"breakfast": True},
        {"stops": ["boston", "New-Haven"]},
        {"guest": {"name": "ann"}},
        {"guest": {"age": 30, "name": "Ann"}},
        {"legs": [{"to": "boston"}, {"to": "New York"}]},
    ],
)
def test_accepted_calls(more: dict[str, Any]) -> None:
    grade = graded(LEAST | more)
    assert grade.right, grade.note
    assert grade.note == ""
    assert graded(LEAST | more, name="trip_book").right


@pytest.mark.parametrize(
    ("more", "note"),
    [
        ({"city": "Boston"}, "'city'"),
        ({"city": ["NYC"]}, "'city'"),
        ({"city": None}, "'city'"),
        ({"city": ""}, "'city'"),
        ({"nights": 3}, "'nights'"),
        ({"nights": "2"}, "'nights'"),
        ({"nights": 2.0}, "'nights'"),
        ({"nights": True}, "'nights'"),
        ({"price": "100.0"}, "'price'"),
        ({"price": 100.5}, "'price'"),
        ({"price": ""}, "'price'"),
        ({"breakfast": 1}, "'breakfast'"),
        ({"breakfast": "true"}, "'breakfast'"),
        ({"stops": ["New Haven", "Boston"]}, "'stops'"),
        ({"stops": ["Boston"]}, "'stops'"),
        ({"stops": "Boston, New Haven"}, "'stops'"),
        ({"guest": {"age": 30}}, "'guest'"),
        ({"guest": {"name": "Ann", "vip": True}}, "'guest'"),
        ({"legs": [{"to": "Boston"}]}, "'legs'"),
        ({"pets": 1}, "'pets'"),
        ({"": 1}, "''"),
    ],
)
def test_other_calls(more: dict[str, Any], note: str) -> None:
    grade = graded(LEAST | more)
    assert not grade.right
    assert note in grade.note


def test_arguments_that_are_needed() -> None:
    assert "'city'" in graded({"nights": 2}).note
    assert "'nights'" in graded({"city": "NYC"}).note
    assert "is called" in graded(LEAST, name="trip").note


def test_several_calls_come_in_any_order_and_each_counts_once() -> None:
    accepted = [{"trip.book": ACCEPTED | {"nights": [1, 2]}}, {"trip.book": ACCEPTED | {"nights": [1]}}]
    one, two = LEAST | {"nights": 1}, LEAST
    # the first call fits both, so it must leave the one that only it fits
    assert graded(one, two, accepted=accepted).right
    assert graded(two, one, accepted=accepted).right
    assert "stand for one" in graded(two, two, accepted=accepted).note
    assert "1 calls" in graded(two, accepted=accepted).note
    assert "3 calls" in graded(two, one, one, accepted=accepted).note
    assert graded(one, two, accepted=accepted).answer == graded(two, one, accepted=accepted).answer


def test_no_call_where_none_fits() -> None:
    assert graded(accepted=[], said="I cannot do that.").right
    assert not graded(accepted=[]).right
    assert not graded(LEAST, accepted=[], said="Well").right
    assert not grade_calls("<tool_call>{oops</tool_call>", "[]").right


REFERENCE = json.dumps([{"trip.book": ACCEPTED}])
RIGHT = '{"name": "trip.book", "arguments": {"city": "NYC", "nights": 2}}'
TEXTS = [
    (f"<tool_call>\n{RIGHT}\n</tool_call>", True),
    (f"So I book it. <tool_call>{RIGHT}</tool_call>", True),
    (f"[TOOL_CALLS] [{RIGHT}]", True),
    (RIGHT.replace("arguments", "parameters"), True),
    ("", False),
    ("trip.book(city='NYC', nights=2)", False),
    (f"```json\n{RIGHT}\n```", False),
    (f"<tool_call>{RIGHT}", False),
    (f"<tool_call>{RIGHT}</tool_call><tool_call>{RIGHT}</tool_call>", False),
    (f"<tool_call>{RIGHT} {RIGHT}</tool_call>", False),
    (f"<tool_call>{RIGHT}</tool_call><tool_call>oops</tool_call>", False),
    (RIGHT.replace("NYC", "ＮＹＣ"), False),
    (RIGHT.replace("NYC", "NYC\\u200b"), False),
    (RIGHT.replace("2}", "2e0}"), False),
    (RIGHT.replace("2}", "0x2}"), False),
    (RIGHT.replace("2}", "9" * 5000 + "}"), False),
    (f"The reference is {REFERENCE}", False),
    (REFERENCE, False),
    ("<tool_call>null</tool_call>", False),
    (f"<tool_call>[{RIGHT}]</tool_call>", False),
]


@pytest.mark.parametrize(("text", "right"), TEXTS, ids=range(len(TEXTS)))
def test_texts(text: str, right: bool) -> None:
    assert grade_calls(text, REFERENCE, [TOOL]).right == right


def test_a_megabyte_is_graded_in_time() -> None:
    start = time.process_time()
    for part in (f"<tool_call>{RIGHT}</tool_call>", "<tool_call>", "[TOOL_CALLS]", RIGHT + ";", "x", '{"a":'):
        assert not grade_calls(part * (1_000_000 // len(part)), REFERENCE, [TOOL]).right
    long = RIGHT.replace("NYC", "N" * 1_000_000)
    assert not grade_calls(f"<tool_call>{long}</tool_call>", REFERENCE, [TOOL]).right
    assert time.process_time() - start < 60
