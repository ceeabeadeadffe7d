"""Multiple choice: find the letter that a response chooses."""

from __future__ import annotations

from understudy.tasks.verifiers import notation
from understudy.tasks.verifiers.math import find_answer, without_thoughts
from understudy.tasks.verifiers.references import several
from understudy.types import Grade

MAX_CHOICE_CHARS = 1000
"""Longer answers, which may repeat the text of an option, are not read."""
MAX_LINE_CHARS = 300
"""Longest last line that is read where the response names no answer."""


@several
def grade_choice(text: str, reference: str) -> Grade:
    r"""1.0 if the response chooses the letter of `reference`, 0.0 otherwise, and why.

    The final answer is found as `grade_math` does: `\boxed{C}`, `<answer>`, `"answer": "C"`, "the answer is (C)"; without one
    it is the last line, where that begins with a letter ("C", "(C) Paris", "C. Paris") and the one before it does not, as in a
    list of the options. The letter has to be named alone: "A or C" is none, and neither is the text of an option without its
    letter. Thoughts are not read.
    """
    answer = find_answer(text)
    if answer is None and "\\boxed" not in text and "<answer>" not in text:
        answer = _last_line(without_thoughts(text))
    if answer is None:
        return Grade(0.0, note="no final answer: no \\boxed{...}, <answer>, 'answer is' or letter in the last line")
    if len(answer) > MAX_CHOICE_CHARS:
        return Grade(0.0, answer[:MAX_CHOICE_CHARS], f"the answer is longer than {MAX_CHOICE_CHARS} characters")
    letter = read_letter(answer)
    if not letter:
        return Grade(0.0, answer, "the answer names no letter, or more than one")
    return Grade(1.0, letter) if letter == reference.strip().upper() else Grade(0.0, letter, "another option is right")


def _last_line(text: str) -> str | None:
    """The last line that is not empty; None for a long line and for the end of a list of options."""
    lines = [line.strip("*_ \t") for line in text[-4 * MAX_LINE_CHARS :].splitlines() if line.strip()]
    if not lines or len(lines[-1]) > MAX_LINE_CHARS:
        return None
    return None if len(lines) > 1 and len(lines[-2]) <= MAX_LINE_CHARS and read_letter(lines[-2]) else lines[-1]


def read_letter(answer: str) -> str:
    """The letter of an answer, in upper case; "" where it names none or more than one."""
    told = notation.plain(answer).strip("*_`\"' ")
    letter = told.strip("()[]{}.:, ")
    return letter.upper() if len(letter) == 1 and letter.isascii() and letter.isalpha() else notation.choice(told)
