"""Mathematical answers: find the final one in a response and compare it with the reference through math-verify."""

from __future__ import annotations

import re

from understudy.tasks.verifiers.math_process import compare
from understudy.types import Grade

MAX_ANSWER_CHARS = 1000
"""Longer "answers" are not compared: the longest of MATH-500 has 53 characters."""
MAX_LONE_ANSWER_CHARS = 100
"""A response of one line, at most so long, is its own final answer."""

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>[^\s$.,\\{}]+))|\\.|[{}]", re.DOTALL)
r"""Boxes (`\boxed 3` too: solutions of MATH write it), braces, and what a backslash escapes (`\{` is no brace)."""
_HASHES = re.compile(r"####[ \t]*([-+.\d$\\(\[{][^\n]*)")
_SENTENCE = re.compile(r"\banswer\s*(?:is|:|=)[ \t:*]*([^\n]+?)(?=\.\s|\n|$)", re.IGNORECASE)
_INTEGER = re.compile(r"[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)")
_SPACING = re.compile(r"\\[,;:! ]|\\(?:left|right)(?![a-zA-Z.])|[\s~]+")


def grade_math(text: str, reference: str, timeout_s: float = 5.0) -> Grade:
    r"""1.0 if the final answer of `text` equals `reference` mathematically, 0.0 otherwise, with a note that says why.

    The final answer is the last complete `\boxed{...}`; else the last `#### ...` line that starts like a number or
    formula; else what follows the last "answer is" or "answer:"; else the whole text, if it is one short line. Thoughts
    up to the last `</think>` are not read. `timeout_s` limits the processor time of the comparison; see `math_process`.
    """
    answer = find_answer(text)
    if answer is None:
        return Grade(0.0, note="no final answer: neither \\boxed{...} nor #### nor 'answer is'")
    if len(answer) > MAX_ANSWER_CHARS:
        return Grade(0.0, answer[:MAX_ANSWER_CHARS], f"the answer is longer than {MAX_ANSWER_CHARS} characters")
    left, right = _plain(answer), _plain(_unwrap(reference))
    if left == right:
        return Grade(1.0, answer)
    if _INTEGER.fullmatch(left) and _INTEGER.fullmatch(right):
        equal, note = _digits(left) == _digits(right), ""
    else:
        equal, note = compare(_unwrap(reference), answer, timeout_s)
    return Grade(1.0, answer) if equal else Grade(0.0, answer, note or "differs from the reference")


def find_answer(text: str) -> str | None:
    """The final answer as it is written, without dollar signs and a full stop around it; None where there is none."""
    text = text.rpartition("</think>")[2].strip()
    found = _last_box(text)
    for pattern in (_HASHES, _SENTENCE):
        if found is None and (matches := pattern.findall(text)):
            found = matches[-1]
    # a mark that is left was begun and not read: then the line is no answer
    if found is None and len(text) <= MAX_LONE_ANSWER_CHARS and not re.search(r"\n|\\boxed|####", text):
        found = text
    return _unwrap(found or "") or None


def _last_box(text: str) -> str | None:
    """The content of the complete box that starts last, in one pass: a text may open ten thousand and close none."""
    last_start, last = -1, None
    opened: list[int | None] = []
    """Where the content of each open brace starts if the brace is a box's, None for other braces."""
    for match in _BRACES.finditer(text):
        mark = match.group()
        if mark.endswith("{") and not mark.startswith("\\{"):
            opened.append(match.end() if mark.startswith("\\") else None)
        elif mark == "}" and opened:
            start = opened.pop()
            if start is not None and start > last_start:
                last_start, last = start, text[start : match.start()]
        elif match["bare"] and match.start() > last_start:
            last_start, last = match.start(), match["bare"]
    return last


def _unwrap(answer: str) -> str:
    """Without what stands around an answer in a sentence: white space, bold, a full stop, dollar signs or brackets."""
    answer = answer.strip().strip("*").strip()
    if answer.endswith(".") and not answer.endswith("\\."):
        answer = answer[:-1].rstrip().rstrip("*")
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        inner = answer[len(opening) : -len(closing)]
        if answer.startswith(opening) and answer.endswith(closing) and len(answer) > 2 and "$" not in inner:
            return inner.strip()
    return answer


def _plain(answer: str) -> str:
    r"""Without spacing commands and a currency sign: `\$ 1{,}000` and `1,000` have one spelling."""
    answer = _SPACING.sub(lambda match: "" if match.group().startswith("\\") else " ", answer).strip()
    answer = answer.replace("{,}", ",").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return answer.removeprefix("\\$").removeprefix("$").strip()


def _digits(integer: str) -> str:
    """One spelling of an integer, without converting it: `int()` refuses more than 4,300 digits."""
    sign = "-" if integer.startswith("-") else ""
    digits = integer.lstrip("+-").replace(",", "").lstrip("0")
    return sign + digits if digits else "0"
