"""Short answers to questions: exact match and F1 of words, after the normalisation of SQuAD (arXiv 1606.05250)."""

from __future__ import annotations

import re
import string
from collections import Counter
from functools import lru_cache
from typing import Literal
from unicodedata import normalize

from understudy.tasks.verifiers.references import several
from understudy.types import Grade

Score = Literal["em", "f1"]

MAX_ANSWER_CHARS = 10_000
"""A longer answer is no short answer: it is wrong unread, whatever it takes to compare it."""
_OPEN, _CLOSE = "<answer>", "</answer>"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED = ("yes", "no", "noanswer")
"""Answers that share no part with another one (HotpotQA's script)."""


@lru_cache(maxsize=1024)
def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and the articles a, an, the; words with single spaces between them.

    A text of nothing but articles keeps them, and one of nothing but punctuation is itself: "The The" and "!!!" are answers,
    and must not equal an empty one. How unicode composes a letter with its accent does not count.
    """
    bare = normalize("NFC", text).lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split()) or " ".join(bare.split()) or text.strip()


def answer_in(text: str, *, tagged: bool) -> tuple[str | None, str]:
    """The answer of a response, and why there is none: what stands in its last `<answer>...</answer>`, or, unless `tagged`, all
    that follows its thoughts where it has no such tag."""
    before, closed, _ = text.rpartition(_CLOSE)
    if not closed:
        if _OPEN in text:
            return None, f"{_OPEN} is not closed"
        if tagged:
            return None, f"no {_OPEN} in the response"
        return text.rpartition("</think>")[2].strip(), ""
    _, opened, answer = before.rpartition(_OPEN)
    if not opened:
        return None, f"no {_OPEN} before {_CLOSE}"
    return answer.strip(), ""


@several
def grade_answer(text: str, reference: str, score: Score = "em", *, tagged: bool = False) -> Grade:
    """The grade of a short answer: 1.0 if it equals the reference after `normalise`, or the F1 of their words.

    `Grade.also` has all three scores: "em", "f1" and "cover_em", which is 1.0 where the words of the reference stand in the
    answer one behind the other.
    """
    answer, note = answer_in(text, tagged=tagged)
    if answer is not None and not answer:
        note = "the answer is empty"
    elif answer is not None and len(answer) > MAX_ANSWER_CHARS:
        note = f"the answer has more than {MAX_ANSWER_CHARS:,} characters"
    if note:
        return Grade(0.0, note=note, also={"em": 0.0, "f1": 0.0, "cover_em": 0.0})
    said, right = normalise(str(answer)), normalise(reference)
    values = {"em": float(said == right), "f1": _f1(said, right), "cover_em": float(f" {right} " in f" {said} ")}
    return Grade(values[score], answer, "" if values[score] >= 1.0 else "differs from the reference", values)


def grade_f1(text: str, reference: str) -> Grade:
    """`grade_answer` with F1 as the score."""
    return grade_answer(text, reference, "f1")


def _f1(said: str, right: str) -> float:
    """The harmonic mean of precision and recall over words, each counted as often as it stands there."""
    if said == right:
        return 1.0
    words, wanted = said.split(), right.split()
    shared = (Counter(words) & Counter(wanted)).total()
    if not shared or said in _CLOSED or right in _CLOSED:
        return 0.0
    return 2 * shared / (len(words) + len(wanted))
