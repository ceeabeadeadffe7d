"""Tools of Python functions, and the customers of tau-bench: what a student may do to them, and all reference episodes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from tests.chat_server import ChatServer, says
from understudy.environments.tau import DOMAINS, Database, Service, UserModel, domain_tools, read_tables, replay
from understudy.environments.tau.database import calculate
from understudy.environments.tools import Tool, ToolUse
from understudy.errors import DataError
from understudy.types import Message, ToolCall


def add(
    numbers: Annotated[list[int], "What to add."],
    sign: Literal["plus", "minus"] = "plus",
    note: str | None = None,
) -> int:
    """Adds integers."""
    return sum(numbers) * (1 if sign == "plus" else -1)


def fails(how: str) -> str:
    """Fails."""
    if how == "exit":
        raise SystemExit(3)
    return {}[how]  # type: ignore[no-any-return]


def asks(*calls: tuple[str, dict[str, Any]], content: str = "", error: str = "") -> Message:
    return Message("", content, tool_calls=tuple(ToolCall("", name, arguments, error) for name, arguments in calls))


def test_a_tool_knows_its_schema() -> None:
    assert Tool.of(add).schema == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds integers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "numbers": {"type": "array", "items": {"type": "integer"}, "description": "What to add."},
                    "sign": {"type": "string", "enum": ["plus", "minus"]},
                    "note": {"type": "string"},
                },
                "required": ["numbers"],
            },
        },
    }

    def strange(what: set[int]) -> None: ...

    strange.__annotations__["what"] = set[int]
    with pytest.raises(TypeError, match=r"strange\(what\)"):
        Tool.of(strange)


@pytest.mark.parametrize(
    ("name", "arguments", "reply", "is_error"),
    [
        ("add", {"numbers": [1, 2]}, "3", False),
        ("add", {"numbers": [1, 2], "sign": "minus"}, "-3", False),
        ("add", {}, "must have 'numbers'", True),
        ("add", {"numbers": "1, 2"}, "'numbers' must be of type array", True),
        ("add", {"numbers": [1, "2"]}, "item 2 of 'numbers' must be of type integer", True),
        ("add", {"numbers": [True]}, "must be of type integer", True),
        ("add", {"numbers": [], "sign": "times"}, "must be one of plus, minus", True),
        ("add", {"numbers": [], "sgn": "plus"}, "did you mean", True),
        ("ad", {"numbers": []}, "there is no tool 'ad'; did you mean", True),
        ("fails", {"how": "exit"}, "3", True),
        ("fails", {"how": "key"}, "'key'", True),
        ("", {}, "there is no tool", True),
    ],
)
def test_results_and_errors_go_back_as_text(name: str, arguments: Any, reply: str, is_error: bool) -> None:
    step = ToolUse([Tool.of(add), Tool.of(fails)]).step(asks((name, arguments)))
    (message,) = step.messages
    assert (message["role"], message.get("error", False), step.done) == ("tool", is_error, False)
    assert reply in message["content"]
    assert message["content"].startswith("Error: ") == is_error


def test_calls_are_answered_in_order_and_limited() -> None:
    tools = ToolUse([Tool.of(add)], max_calls=2, max_result_chars=10)
    step = tools.step(
        asks(("add", {"numbers": [1]}), ("add", {"numbers": [2]}), ("add", {"numbers": [3]}), ("add", {}))
    )
    assert [message["content"] for message in step.messages][:2] == ["1", "2"]
    assert step.messages[2]["content"].startswith("Error: a m")
    assert len(step.messages) == 3
    assert len({message["tool_call_id"] for message in step.messages}) == 3
    assert all(len(message["tool_call_id"]) == 9 for message in step.messages)
    assert tools.step(Message("3", "3")).done
    broken = tools.step(asks(("", {}), error="the call is no JSON"))
    assert broken.messages[0]["error"]


@pytest.mark.parametrize(
    ("expression", "value"),
    [("1 + 2*3", "7.0"), ("(168 + 114) / -2", "-141.0"), ("0.1+0.2", "0.3"), (" 1319.43 - 302.67 ", "1016.76")],
)
def test_expressions(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "1/0",
        "2**99999999",
        "__import__('os')",
        "a",
        "1;2",
        "(" * 150,
        "1" * 201,
        "'a'*9",
        "True",
    ],
)
def test_other_expressions_are_refused(expression: str) -> None:
    with pytest.raises(ValueError, match="expression"):
        calculate(expression)


# tau-bench


def tables(shared: Path, domain: str) -> Any:
    return read_tables(str(shared / "data" / "tau_bench" / f"{domain}_db"), DOMAINS[domain].tables)


def rows(shared: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (shared / "data" / "tau_bench" / f"{name}.jsonl").read_text().splitlines()]


def service(shared: Path, name: str, number: int, **options: Any) -> Service:
    domain, row = name.partition("_")[0], rows(shared, name)[number]
    return Service(domain, tables(shared, domain), actions=row["actions"], outputs=row["outputs"], **options)


READS = ("find_", "get_", "list_", "search_", "calculate")
REFUSED = {
    # reference calls that the policy forbids: they change nothing, here as upstream
    "retail_test_12": "the refund must go to the order's payment method or to a gift card",
    "retail_test_13": "the refund must go to the order's payment method or to a gift card",
    "retail_test_64": "the order is pending, and not delivered",
    "retail_test_106": "the gift card has not enough balance for the difference in price",
}


@pytest.mark.parametrize(
    ("name", "num"), [("retail_test", 115), ("retail_dev", 20), ("retail_train", 500), ("airline_test", 50)]
)
def test_the_reference_calls_work(shared: Path, name: str, num: int) -> None:
    """All that change something, but for known mistakes: of the training rows 19 pay by gift cards with too little."""
    domain, refused = name.partition("_")[0], {}
    for row in rows(shared, name):
        _, failed = replay(domain, tables(shared, domain), row["actions"])
        if wrong := [why for why in failed if not why.startswith(READS)]:
            refused[row["id"]] = wrong
    assert len(rows(shared, name)) == num
    if name == "retail_train":
        assert len(refused) == 19
        assert all("the gift card has not enough balance" in why for wrong in refused.values() for why in wrong)
        return
    known = {key: why for key, why in REFUSED.items() if key.startswith(name)}
    assert refused.keys() == known.keys()
    for key, why in known.items():
        assert why in refused[key][0]


@pytest.mark.parametrize("name", ["retail_test", "airline_test"])
def test_reference_episodes_are_right_and_empty_ones_wrong(shared: Path, name: str) -> None:
    """An episode in which nothing is to be done is right with the words alone."""
    domain = name.partition("_")[0]
    for number, row in enumerate(rows(shared, name)):
        right = service(shared, name, number)
        for action in row["actions"]:
            step = right.step(asks((action["name"], action["kwargs"])))
        step = right.step(Message("", "So it is " + ", ".join(row["outputs"])))
        assert step.done
        assert step.reward is not None
        assert step.reward.right, (row["id"], step.reward.note)
        changes = bool(replay(domain, tables(shared, domain), row["actions"])[0].changes())
        idle = service(shared, name, number).step(Message("", "Done."))
        assert idle.reward is not None
        assert idle.reward.right == (not changes and not row["outputs"])


def test_another_order_of_calls_ends_in_the_same_state(shared: Path) -> None:
    row = rows(shared, "retail_test")[0]
    writes = [action for action in row["actions"] if not action["name"].startswith(READS)]
    swapped = [{**action, "kwargs": {**action["kwargs"]}} for action in writes]
    for action in swapped:
        for key in action["kwargs"].keys() & {"item_ids", "new_item_ids"}:
            action["kwargs"][key] = action["kwargs"][key][::-1]
    assert any(len(action["kwargs"].get("item_ids", ())) > 1 for action in writes)
    found = replay("retail", tables(shared, "retail"), swapped)[0].changes()
    assert found == replay("retail", tables(shared, "retail"), row["actions"])[0].changes()


def test_a_wrong_change_and_a_missing_word_are_named(shared: Path) -> None:
    wrong = service(shared, "retail_test", 0)
    user = "yusuf_rossi_9620"
    address = dict.fromkeys(("address1", "address2", "city", "state", "country", "zip"), "x")
    wrong.step(asks(("modify_user_address", {"user_id": user, **address})))
    step = wrong.step(Message("", "Done."))
    assert step.reward is not None
    assert f"users/{user}" in step.reward.note
    told = service(shared, "retail_test", 2)
    for action in rows(shared, "retail_test")[2]["actions"]:
        told.step(asks((action["name"], action["kwargs"])))
    step = told.step(Message("", "There are many options."))
    assert step.reward is not None
    assert "was not told 10" in step.reward.note


def test_thousands_are_told_with_or_without_commas(shared: Path) -> None:
    number = next(n for n, row in enumerate(rows(shared, "retail_test")) if row["outputs"] == ["8276.23"])
    for said, right in (("You get $8,276.23.", True), ("You get 8276.23", True), ("You get 276.23", False)):
        episode = service(shared, "retail_test", number)
        for action in rows(shared, "retail_test")[number]["actions"]:
            episode.step(asks((action["name"], action["kwargs"])))
        step = episode.step(Message("", said))
        assert step.reward is not None
        assert step.reward.right == right


def test_a_failed_call_changes_nothing_and_episodes_share_nothing(shared: Path) -> None:
    data = tables(shared, "retail")
    one, other = Database(data), Database(data)
    tools = {tool.name: tool for tool in domain_tools("retail", one)}
    order = next(key for key, row in one.rows("orders") if row["status"] == "pending" and len(row["items"]) > 1)
    before = json.dumps(one.read("orders", order))
    items = [item["item_id"] for item in one.read("orders", order)["items"]]
    for arguments in (
        {"item_ids": items, "new_item_ids": items[:1]},
        {"item_ids": [], "new_item_ids": []},
        {"item_ids": items * 2, "new_item_ids": items * 2},
        {"item_ids": ["1"], "new_item_ids": ["1"]},
    ):
        with pytest.raises(ValueError):  # noqa: PT011 (of different words)
            tools["modify_pending_order_items"].call({"order_id": order, "payment_method_id": "none", **arguments})
        assert one.changes() == {}
    tools["cancel_pending_order"].call({"order_id": order, "reason": "no longer needed"})
    with pytest.raises(ValueError, match="cancelled, and not pending"):
        tools["cancel_pending_order"].call({"order_id": order, "reason": "no longer needed"})
    assert ("orders", order) in one.changes()
    assert other.changes() == {}
    assert json.dumps(other.read("orders", order)) == before


def test_a_transfer_ends_the_episode(shared: Path) -> None:
    step = service(shared, "retail_test", 0).step(asks(("transfer_to_human_agents", {"summary": "too hard"})))
    assert step.done
    assert step.reward is not None
    wrong = service(shared, "retail_test", 0).step(asks(("transfer_to_human_agents", {})))
    assert not wrong.done


def test_a_model_plays_the_customer(shared: Path) -> None:
    """It is told the situation, sees the roles exchanged, and ends the conversation."""
    replies = iter(["My name is Yusuf.", "Thanks. ###DONE###"])
    with ChatServer(lambda request, number: says(next(replies))) as server:
        section = UserModel(url=server.url, model="someone")
        episode = service(
            shared,
            "retail_test",
            0,
            customer=lambda said: section.say("You want a keyboard.", said, "p"),
            opening="Hello",
        )
        step = episode.step(Message("", "Who are you?"))
        assert step.messages == ({"role": "user", "content": "My name is Yusuf."},)
        assert episode.step(Message("", "Done.")).done
        first, last = server.requests
    assert "You want a keyboard." in first.question
    told = [(message["role"], message["content"]) for message in last.body["messages"]]
    assert [role for role, _ in told] == ["system", *["user", "assistant"] * 2, "user"]
    assert [content for _, content in told][2:] == ["Hello", "Who are you?", "My name is Yusuf.", "Done."]


def test_a_broken_data_base_is_named(tmp_path: Path) -> None:
    (tmp_path / "users.json").write_text("[1]")
    with pytest.raises(DataError, match="users.json must be an object"):
        read_tables(str(tmp_path), ("users",))
    with pytest.raises(DataError, match="orders.json"):
        read_tables(str(tmp_path), ("orders",))


def test_an_episode_costs_little(shared: Path) -> None:
    tables(shared, "retail")
    start = time.process_time()
    for _ in range(50):
        service(shared, "retail_test", 0)
    # reading the database for each would take seconds
    assert (time.process_time() - start) / 50 < 0.5
