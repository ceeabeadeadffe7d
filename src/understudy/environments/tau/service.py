"""tau-bench: a customer whom the student serves with tools that change a database, by a policy.

Yao et al. 2024, arXiv 2406.12045. Data bases, policies and tasks are those of the benchmark, the tools are written anew.
An episode is right if its database ends as after the reference calls, and the customer was told what the task says.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Protocol

from understudy.environments.base import Step
from understudy.environments.tau.airline import Airline
from understudy.environments.tau.database import Database, Tables
from understudy.environments.tau.retail import Retail
from understudy.environments.tools import Tool, ToolUse
from understudy.types import Grade, Message

TRANSFER = "transfer_to_human_agents"
"""The tool that ends an episode."""


@dataclass(frozen=True)
class Domain:
    """A shop, an airline: what it has and what can be done with it."""

    tables: tuple[str, ...]
    """Names of the files of its database."""
    kind: Callable[[Database], object]
    """Its tools: the public methods of this class."""


DOMAINS: Mapping[str, Domain] = {
    "retail": Domain(("orders", "products", "users"), Retail),
    "airline": Domain(("flights", "reservations", "users"), Airline),
}


class Customer(Protocol):
    """Who answers what the student says."""

    def __call__(self, said: Sequence[Mapping[str, Any]]) -> str | None:
        """The next words, after messages of "assistant" and "user" in turn; None: there is nothing more to say."""


def silent(said: Sequence[Mapping[str, Any]]) -> str | None:
    """A customer who has said everything at the start."""
    return None


def domain_tools(domain: str, database: Database) -> list[Tool]:
    """The tools of a domain on a database. A tool that fails leaves it as it was."""
    service = DOMAINS[domain].kind(database)
    methods = inspect.getmembers(service, inspect.ismethod)
    return [Tool.of(_undoing(method, database)) for name, method in methods if not name.startswith("_")]


def _undoing(method: Callable[..., object], database: Database) -> Callable[..., object]:
    @wraps(method)
    def call(*args: Any, **arguments: Any) -> object:
        before = database.changes()
        try:
            return method(*args, **arguments)
        except BaseException:
            database.undo_to(before)
            raise

    return call


def replay(domain: str, tables: Tables, actions: Sequence[Mapping[str, Any]]) -> tuple[Database, list[str]]:
    """The database after the calls `{name, kwargs}`, and what went wrong with those that failed."""
    database = Database(tables)
    tools = {tool.name: tool for tool in domain_tools(domain, database)}
    failed = []
    for action in actions:
        try:
            if action["name"] != TRANSFER:
                tools[action["name"]].call(action["kwargs"])
        except (ValueError, LookupError) as error:
            failed.append(f"{action['name']}: {error}")
    return database, failed


class Service(ToolUse):
    """One episode of a domain: the student serves a customer."""

    def __init__(
        self,
        domain: str,
        tables: Tables,
        *,
        actions: Sequence[Mapping[str, Any]],
        outputs: Sequence[str],
        customer: Customer = silent,
        opening: str = "",
        max_turns: int = 30,
        deadline_s: float = 120.0,
    ) -> None:
        """`actions`: the reference calls; `outputs`: what the student has to say; `opening`: the customer's first words."""
        self.database = Database(tables)
        self._domain, self._tables, self._actions = domain, tables, tuple(actions)
        self._outputs, self._customer = tuple(outputs), customer
        self._said: list[Mapping[str, Any]] = [{"role": "user", "content": opening}]
        super().__init__(
            domain_tools(domain, self.database),
            answer=self._reply_to,
            ending={TRANSFER: self._end},
            max_turns=max_turns,
            deadline_s=deadline_s,
        )

    def _reply_to(self, message: Message) -> Step:
        self._said.append({"role": "assistant", "content": message.content})
        reply = self._customer(self._said)
        if reply is None:
            return self._end()
        self._said.append({"role": "user", "content": reply})
        return Step(({"role": "user", "content": reply},))

    def _end(self) -> Step:
        return Step(done=True, reward=self.grade())

    def grade(self) -> Grade:
        """1.0 if the database is as it should be and everything was told. The answer is the state, for majority votes.

        Some reference calls change nothing; where the student says and does nothing at all, it is wrong all the same.
        """
        changed = self.database.changes()
        expected = replay(self._domain, self._tables, self._actions)[0].changes()
        answer = json.dumps(sorted([*row, value] for row, value in changed.items()))
        rows = sorted(row for row in changed.keys() | expected.keys() if changed.get(row) != expected.get(row))
        if rows:
            named = ", ".join("/".join(row) for row in rows)
            return Grade(0.0, answer, f"the database is not as it should be: {named}")
        told = _plain(" ".join(str(message["content"]) for message in self._said if message["role"] == "assistant"))
        if not self._num_calls and not told.strip():
            return Grade(0.0, answer, "nothing was said and nothing done")
        missing = [text for text in self._outputs if _plain(text) not in told]
        if missing:
            return Grade(0.0, answer, f"the customer was not told {', '.join(missing)}")
        return Grade(1.0, answer)


def _plain(text: str) -> str:
    """Text in which a number is found however it is written: 1,234.5 is 1234.5."""
    return re.sub(r"(?<=\d),(?=\d)", "", text).lower()
