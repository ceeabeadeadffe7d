"""A database in memory that many episodes share: each has its own changes."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from understudy.config import load_json
from understudy.errors import DataError

_OPERATORS: Mapping[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
MAX_EXPRESSION_CHARS = 200

Tables = Mapping[str, Mapping[str, Any]]


class Database:
    """Tables of rows by their keys, which are never changed, and the rows that this episode has changed."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._changed: dict[tuple[str, str], Any] = {}

    def read(self, table: str, key: str) -> Any:
        """A row, not to be changed. Raises ValueError where there is none."""
        if (table, key) in self._changed:
            return self._changed[table, key]
        if key not in self._tables[table]:
            raise ValueError(f"there is no {table.removesuffix('s')} {key!r}")
        return self._tables[table][key]

    def edit(self, table: str, key: str) -> Any:
        """The episode's own copy of a row, to be changed in place. Raises ValueError where there is none."""
        if (table, key) not in self._changed:
            self._changed[table, key] = deepcopy(self.read(table, key))
        return self._changed[table, key]

    def add(self, table: str, key: str, row: Any) -> None:
        """Adds a row."""
        self._changed[table, key] = row

    def rows(self, table: str) -> Iterator[tuple[str, Any]]:
        """All rows with their keys, not to be changed."""
        for key, row in self._tables[table].items():
            yield key, self._changed.get((table, key), row)
        for of, key in self._changed:
            if of == table and key not in self._tables[table]:
                yield key, self._changed[of, key]

    def undo_to(self, changed: Mapping[tuple[str, str], Any]) -> None:
        """Goes back to what `changes` was."""
        self._changed = dict(changed)

    def changes(self) -> dict[tuple[str, str], Any]:
        """Copies of the rows that differ from what they were at first: equal for two episodes that end in the same state."""
        return {
            (table, key): deepcopy(row)
            for (table, key), row in self._changed.items()
            if row != self._tables[table].get(key)
        }


@lru_cache(maxsize=8)
def read_tables(folder: str, names: tuple[str, ...]) -> Tables:
    """The tables `NAME.json` of a folder. Raises DataError for one that is missing or no JSON."""
    tables = {}
    for name in names:
        path = Path(folder) / f"{name}.json"
        try:
            tables[name] = load_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {path}, a table of the database: {error}") from error
        if not isinstance(tables[name], dict):
            raise DataError(f"{path} must be an object of rows by their keys")
    return tables


def calculate(expression: str) -> str:
    """The value of numbers, + - * / and parentheses, to two decimals. Raises ValueError for anything else."""
    if len(expression) > MAX_EXPRESSION_CHARS:
        raise ValueError(f"the expression is longer than {MAX_EXPRESSION_CHARS} characters")

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
            return float(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.operand))
        raise ValueError("the expression may have numbers, + - * / and parentheses only")

    try:
        return str(round(value(ast.parse(expression.strip(), mode="eval").body), 2))
    except (SyntaxError, ZeroDivisionError, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"the expression cannot be calculated: {error}") from None


class Desk:
    """The tools of one episode that every domain has; the public methods of a domain are its others."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def calculate(self, expression: Annotated[str, "Numbers, + - * / and parentheses."]) -> str:
        """Calculates an expression."""
        return calculate(expression)

    def transfer_to_human_agents(self, summary: Annotated[str, "The user's issue in short."]) -> str:
        """Hands the user over to a human agent, if the request cannot be handled with the tools; this ends the conversation."""
        return "The user is transferred."
