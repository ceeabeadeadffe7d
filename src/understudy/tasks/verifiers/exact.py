"""Exact comparison of strings, for tasks whose answers have one spelling."""

from __future__ import annotations

from understudy.types import Grade


def grade_exact(text: str, reference: str, after: str | None = None) -> Grade:
    """1.0 if the answer equals the reference, white space at both ends aside; 0.0 otherwise.

    The answer is what follows the last `after` in the text, or the whole text where `after` is None.
    """
    if after is not None and after not in text:
        return Grade(0.0, note=f"no {after!r} in the response")
    answer = (text if after is None else text.rpartition(after)[2]).strip()
    if not answer:
        return Grade(0.0, note="the answer is empty")
    if answer == reference.strip():
        return Grade(1.0, answer)
    return Grade(0.0, answer, "differs from the reference")
