"""Verifiers: pure functions (text, reference) -> Grade. They know nothing of tasks, prompts or models.

A verifier of the table compares with one accepted answer; `several` makes one of several accepted answers out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from unicodedata import normalize

from understudy import given
from understudy.errors import nearest
from understudy.tasks.verifiers.calls import grade_calls
from understudy.tasks.verifiers.choice import grade_choice
from understudy.tasks.verifiers.code import grade_code
from understudy.tasks.verifiers.instructions import grade_instructions
from understudy.tasks.verifiers.math import grade_math
from understudy.tasks.verifiers.qa import grade_answer, grade_f1
from understudy.tasks.verifiers.references import Reference, accepted, several
from understudy.types import Grade


@several
def grade_exact(text: str, reference: str, after: str | None = None) -> Grade:
    """For answers that have one spelling: 1.0 if it equals the reference, 0.0 otherwise.

    White space at both ends does not count, nor how unicode composes a letter with its accent; case does.
    The answer is what follows the last `after` in the text, or the whole text where `after` is None.
    """
    if after is not None and after not in text:
        return Grade(0.0, note=f"no {after!r} in the response")
    answer = normalize("NFC", text if after is None else text.rpartition(after)[2]).strip()
    if not answer:
        return Grade(0.0, note="the answer is empty")
    if answer == normalize("NFC", reference).strip():
        return Grade(1.0, answer)
    return Grade(0.0, answer, "differs from the reference")


VERIFIERS: Mapping[str, Callable[[str, str], Grade]] = {
    "calls": grade_calls,
    "choice": grade_choice,
    "code": grade_code,
    "em": grade_answer,
    "exact": grade_exact,
    "f1": grade_f1,
    "instructions": grade_instructions,
    "math": grade_math,
}


def find_verifier(name: str) -> Callable[[str, Reference], Grade]:
    """The verifier of that name, for any number of accepted answers: the best of their grades. Raises ValueError."""
    if name not in VERIFIERS and not given.is_given(name):
        raise ValueError(f"there is no verifier {name!r}; {nearest(name, VERIFIERS)}")
    if name in VERIFIERS:
        return several(VERIFIERS[name])
    return several(lambda text, reference: given.as_grade(given.call(name, text, reference), name))


__all__ = [
    "VERIFIERS",
    "Reference",
    "accepted",
    "find_verifier",
    "grade_answer",
    "grade_calls",
    "grade_choice",
    "grade_code",
    "grade_exact",
    "grade_instructions",
    "grade_math",
    "several",
]
