"""References as data sets give them, and verifiers that take all of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal
from functools import wraps
from numbers import Integral, Real
from typing import Any

from understudy.types import Grade

Reference = str | bool | float | Sequence["Reference"]
"""An answer, or several of which each is right. Integers too."""


def accepted(reference: Reference) -> list[str]:
    """The accepted answers as strings; true is "true" or "yes". Raises ValueError where there is none."""
    if isinstance(reference, str):
        return [reference]
    if isinstance(reference, bool):
        return ["true", "True", "yes", "Yes"] if reference else ["false", "False", "no", "No"]
    if isinstance(reference, Integral):
        return [f"{Decimal(int(reference)):f}"]
    if isinstance(reference, Real) and math.isfinite(reference):
        # an array's float keeps the digits of its own precision, and adding zero takes the sign off -0.0
        number = float(str(reference)) if hasattr(reference, "dtype") else float(reference)
        return [f"{Decimal(repr(number + 0)):f}".removesuffix(".0")]
    if not isinstance(reference, Sequence):
        raise ValueError(f"the reference is {reference!r}; it must be a string, a number, a boolean or a list of these")
    answers = [answer for item in reference for answer in accepted(item)]
    if not answers:
        raise ValueError("the reference is an empty list; give at least one accepted answer")
    return answers


def several(verify: Callable[..., Grade]) -> Callable[..., Grade]:
    """The verifier for any number of accepted answers: the best of their grades, the first of equal ones, and the best of each
    other score."""

    @wraps(verify)
    def grade(text: str, reference: Reference, *options: Any, **named: Any) -> Grade:
        first, *others = accepted(reference)
        best = verify(text, first, *options, **named)
        for answer in others:
            if best.right and not best.also:
                break
            found = verify(text, answer, *options, **named)
            also = {name: max(value, best.also.get(name, value)) for name, value in found.also.items()}
            best = replace(found if found.score > best.score else best, also=also)
        return best

    return grade
