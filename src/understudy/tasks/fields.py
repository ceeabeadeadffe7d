"""Values of a row's fields: the one that a name stands for, whether there is one, the answers in it, conditions on it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any, cast

import numpy as np

from understudy.errors import DataError, brief, nearest
from understudy.tasks.verifiers import Reference, accepted


class NoFieldError(DataError):
    """A row lacks a field that it must have. `field` is its name."""

    field: str | None = None


class MissingValueError(NoFieldError):
    """A row has nothing in a field that the recipe names, so it is left out. `key` is its problem's, where it has one."""

    key: str | None = None


def accepted_answers(value: object) -> list[str]:
    """The texts of an answer, or of all answers in a list, in which nulls are left out. Raises ValueError for no answer."""
    if is_missing(value):
        return []
    if isinstance(value, list | tuple):
        return [text for item in value for text in accepted_answers(item)]
    if isinstance(value, Decimal):
        value = f"{value:f}"
    if isinstance(value, str) or (isinstance(value, Real) and abs(cast("float", value)) < math.inf):
        return accepted(cast("Reference", value))
    hint = f"; name a part of it with a dot: FIELD.{next(iter(value))}" if isinstance(value, dict) and value else ""
    raise ValueError(f"{brief(value)}; it must be a string, a number, true or false, or a list of them{hint}")


def is_missing(value: object) -> bool:
    """Whether a field holds nothing: null, NaN, a text of white space only, an empty list."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))


def read_field(row: Mapping[str, Any], field: str, place: str, *, required: bool = False) -> Any:
    """The value of a field, which may be nested: `a.b`. Raises MissingValueError where there is none.

    A row without such a field is a DataError if it is `required`, or if the row has one of nearly the same name.
    """
    value: Any = row
    for part in [field] if field in row else field.split("."):
        if value is None:
            break
        if not isinstance(value, Mapping) or part not in value:
            known = value if isinstance(value, Mapping) else row
            hint = nearest(part, known)
            is_close = hint.startswith("did you mean")
            kind = NoFieldError if required or is_close else MissingValueError
            shown = ", ".join(map(str, row)) + (f" ({hint})" if is_close else "")
            error = kind(f"{place}: no field {field!r}; fields: {shown}")
            error.field = field
            raise error
        value = value[part]
    try:
        value = _plain(value)
    except RecursionError:
        raise DataError(f"{place}: field {field!r} is nested too deeply") from None
    if is_missing(value):
        raise MissingValueError(f"{place}: field {field!r} is {'null' if value is None else brief(value)}")
    return value


def _plain(value: Any) -> Any:
    """The value without types of numpy and pandas, at any depth."""
    if isinstance(value, np.float32 | np.float16):
        return float(str(value))  # the shortest of its own precision
    if isinstance(value, np.ndarray | np.generic):
        value = list(value) if isinstance(value, np.ndarray) and value.ndim else value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    # pandas is not imported for its two nulls
    return None if type(value).__name__ in ("NAType", "NaTType") else value


def read_text(row: Mapping[str, Any], field: str, place: str) -> str:
    """A string or a number of a row as text. Raises as `read_field`, and DataError for anything else."""
    value = read_field(row, field, place)
    if isinstance(value, str) or (
        isinstance(value, int | float) and abs(value) < math.inf and not isinstance(value, bool)
    ):
        return accepted(value)[0]
    raise DataError(f"{place}: field {field!r} is {brief(value)}; it must be a string or a number")


_CONDITION = re.compile(r"\s*(\S.*?)\s*(>=|<=|!=|=|\sin\s)\s*(\S.*?)\s*", re.DOTALL)


@dataclass(frozen=True)
class Condition:
    """A condition on a field of a row, such as `difficulty >= 6`."""

    field: str
    sign: str
    values: tuple[str, ...]

    @classmethod
    def read(cls, text: str) -> Condition:
        """Raises ValueError for a string that is not a condition."""
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise ValueError(
                f"where has {text!r}; a condition is FIELD = VALUE, FIELD != VALUE, FIELD >= NUMBER, FIELD <= NUMBER or "
                "FIELD in VALUE, VALUE"
            )
        field, sign, value = match[1], match[2].strip(), match[3]
        if sign in (">=", "<="):
            try:
                float(value)
            except ValueError:
                raise ValueError(f"where has {text!r}, but {value!r} is no number") from None
        return cls(field, sign, tuple(map(str.strip, value.split(","))) if sign == "in" else (value,))

    def holds(self, row: Mapping[str, Any], place: str) -> bool:
        """Whether the row meets it; one without a value does not. Raises DataError for a missing field and for no number."""
        try:
            value = read_field(row, self.field, place, required=True)
        except MissingValueError:
            return False
        if self.sign in (">=", "<="):
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise DataError(
                    f"{place}: field {self.field!r} is {brief(value)}; where needs a number in it"
                ) from None
            return number >= float(self.values[0]) if self.sign == ">=" else number <= float(self.values[0])
        found = set(accepted_answers(value)) & set(self.values)
        return not found if self.sign == "!=" else bool(found)
