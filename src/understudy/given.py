"""Objects that a run is given from Python: loaded models, rows and functions. In its recipe a name stands for each."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from decimal import Decimal
from hashlib import blake2b
from numbers import Real
from typing import Any

from understudy.errors import DataError, RecipeError
from understudy.types import Grade

PREFIX = "in-memory: "
"""Begins every such name; a fingerprint of the object, or the name of the function follows."""
_given: list[Mapping[str, Any]] = []


@contextmanager
def given(objects: Mapping[str, Any]) -> Iterator[None]:
    """Inside, every thread finds the objects by their names."""
    _given.append(objects)
    try:
        yield
    finally:
        _given[:] = [others for others in _given if others is not objects]


def is_given(name: object) -> bool:
    """Whether the value of a key stands for an object."""
    return isinstance(name, str) and name.startswith(PREFIX)


def find(name: str) -> Any:
    """The object that a name stands for; None for any other name. Raises RecipeError where it was not given."""
    for objects in reversed(_given):
        if name in objects:
            return objects[name]
    if is_given(name):
        raise RecipeError(
            f"{name!r} stands for an object of a Python program, which no recipe can hold; start from Python and give it "
            "again, as in distil(..., resume=True)"
        )
    return None


def check_given(values: Mapping[str, Any]) -> None:
    """Raises RecipeError that names the key of an object which was not given. `values`: leaf by its path in the recipe."""
    for key, value in values.items():
        for name in value if isinstance(value, list) else [value]:
            if is_given(name):
                try:
                    find(name)
                except RecipeError as error:
                    raise RecipeError(f"{key}: {error}") from error


def name_of_function(function: Any) -> str:
    """The name that stands for a function, or for an object by its class: module and qualified name."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{PREFIX}{named.__module__}.{named.__qualname__}"


def name_of_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """The name that stands for rows, with a hash of their contents. Raises DataError for what is no row of plain values."""
    digest = blake2b(digest_size=8)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"row {number} is of type {type(row).__name__}; rows are mappings of field names to values")
        try:
            digest.update(json.dumps(row, sort_keys=True, default=_plain).encode("utf-8", "surrogatepass"))
        except TypeError as error:
            raise DataError(f"row {number} cannot be told from others: {error}; keep plain values in rows") from error
    return f"{PREFIX}{len(rows):,} rows {digest.hexdigest()}"


def _plain(value: Any) -> Any:
    """Dates, bytes, and numbers and arrays of numpy and torch as JSON has them."""
    for convert in ("isoformat", "hex", "tolist"):
        if hasattr(value, convert):
            return getattr(value, convert)()
    raise TypeError(f"a value is of type {type(value).__name__}")


def name_of_model(model: Any, tokenizer: Any) -> str:
    """The name that stands for a loaded model and its tokenizer, with a hash of weights, configuration and vocabulary."""
    import torch

    digest = blake2b(digest_size=8)
    facts = [model.config.to_diff_dict(), tokenizer.get_vocab(), tokenizer.chat_template, tokenizer.eos_token]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for key, value in model.state_dict().items():
        digest.update(f"{key}/{value.dtype}/{tuple(value.shape)}".encode())
        digest.update(value.detach().reshape(-1).view(torch.uint8).cpu().numpy())
    return f"{PREFIX}{type(model).__name__} {digest.hexdigest()}"


def check_callable(function: Any, place: str, *arguments: str) -> None:
    """Raises RecipeError for a class, an async function, and a function that cannot be called with these arguments."""
    if isinstance(function, type):
        raise RecipeError(
            f"{place} is the class {function.__name__}; give an object of it, as in {function.__name__}()"
        )
    if any(map(inspect.iscoroutinefunction, (function, type(function).__call__))):
        raise RecipeError(f"{place} is async; give a plain function, which may call asyncio.run")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        # some functions that are written in C have none
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        bare = [one.replace(annotation=one.empty) for one in signature.parameters.values()]
        raise RecipeError(
            f"{place} takes {inspect.Signature(bare)}; it is called with ({', '.join(arguments)})"
        ) from None


def call(name: str, *arguments: Any) -> Any:
    """The result of a function that was given. Raises DataError, which names the function, for what it raises."""
    function = find(name)
    try:
        return function(*arguments)
    except Exception as error:
        raise DataError(f"{name.removeprefix(PREFIX)} raised {type(error).__name__}: {error}") from error


def as_grade(value: Any, name: str) -> Grade:
    """The result of a verifier or reward function that somebody gave. Raises DataError for neither a number nor a Grade."""
    score = value.score if isinstance(value, Grade) else value
    # an array of several numbers has no item; an integer may be too large for a float
    with suppress(ValueError, RuntimeError, OverflowError):
        score = score.item() if hasattr(score, "item") else score
        if isinstance(score, Real | Decimal) and math.isfinite(float(score)):
            return replace(value, score=float(score)) if isinstance(value, Grade) else Grade(float(score))
    raise DataError(
        f"{name.removeprefix(PREFIX)} returned {value!r}; it must return a finite number, a bool or a Grade"
    )
