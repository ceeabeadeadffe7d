"""Mathematical answers: find the final one in a response and compare it with the reference through math-verify."""

from __future__ import annotations

import re

from understudy.tasks.verifiers import notation
from understudy.tasks.verifiers.math_process import compare
from understudy.tasks.verifiers.references import several
from understudy.types import Grade

MAX_ANSWER_CHARS = 1000
"""Longer "answers" are not compared: the longest of MATH-500 has 53 characters."""
MAX_LONE_ANSWER_CHARS = 100
"""A response of one line, at most so long, is its own final answer."""

_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_END_OF_THOUGHT = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_END_TOKENS = re.compile(r"\s*(?:(?:<\|\w+\|>|</s>|<eos>|<end_of_turn>)\s*)+$")
_BRACES = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(?:\{|(?P<bare>[^\s$.,\\{}]+)|)|\\.|[{}]", re.DOTALL)
r"""Boxes (`\boxed 3` too: solutions of MATH write it), braces, and what a backslash escapes (`\{` is no brace)."""
_JOINT = re.compile(
    r"(?:[\s$,;]|\\[()\[\]]|\\q?quad|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|\b[a-zA-Z](?:_\w)?\s*=)*"
)
"""Text that may stand between boxes that hold the parts of one answer; math-verify joins such boxes too."""
_AROUND = (
    "\u200b\u200e\u200f\u2060\ufeff\ufe0f "  # no width, or a mark of direction
    "\u2705\u2714\u2611\u2728\u2b50\U0001f31f\U0001f389\U0001f38a\U0001f3af\U0001f3c6\U0001f44d\U0001f44f\U0001f4af"
    "\U0001f600\U0001f601\U0001f603\U0001f604\U0001f60a\U0001f60e\U0001f642\U0001f680\U0001f973"  # cheerful emoji
)
"""Characters that mean nothing around an answer; inside one they are not read."""
_NAME_BEFORE = re.compile(r"(?<![\\\w])[a-zA-Z](?:_\w)?\s*=\s*$")
_HASHES = re.compile(r"####[ \t]*(.*)")
_JSON = re.compile(r'"(?:final_?)?answer"\s*:\s*(?:"((?:[^"\\]|\\.)*)"|([^\s",{}\[\]]+))\s*[,}]', re.IGNORECASE)
_SENTENCE = re.compile(
    r"(?:\banswers?(?: to (?:the|this) \w+| we \w+)?|\b(?:correct|right|best) (?:option|choice))[*_]*"
    r"(?:\s*(?:is|are|equals|:|=)| (?:should|must|would|will|turns out to) be)"
    r"(?: (?:therefore|thus|simply|exactly|indeed|equal to)\b)?[\s:*]*"
    r"|^[#*_ \t]*(?:final |my )?answer[*_ \t]*\n[\s*]*",
    re.IGNORECASE | re.MULTILINE,
)
_REASON = re.compile(r"(?:,? (?:because|since)|, which is)\b")
_DENIAL = re.compile(
    r"n't|\b(?:no|not|nor|or|but|wrong|false|incorrect|wait|actually|rather|instead|answer|so|however|though|unless|if|else)\b",
    re.IGNORECASE,
)
"""A word in a reason that may take the answer before it back."""
_FENCED = re.compile(r"```\w*\n([^`]*)```")
_FIRST_SENTENCE = re.compile(r"```\w*\n[^`]*```|\\\[.*?\\\]|\$\$.*?\$\$|[^\n]+?(?=\.\s|\n|$)", re.DOTALL)


@several
def grade_math(text: str, reference: str, timeout_s: float = 5.0) -> Grade:
    r"""1.0 if the final answer of `text` equals the reference mathematically, 0.0 otherwise, and why.

    The final answer is the last `\boxed{...}`, joined with those before it where nothing but "and", "or", a comma or "x =" is
    between; else the last `#### ...` line that starts like a number or formula, or ends the text; else the content of the last
    `<answer>...</answer>`; else the value of the last "answer" of a JSON object; else what follows the last "answer is",
    "answer:" or heading "Answer", without a reason behind it ("7 because 3+4=7"); else the whole text, if it is one short
    line. One that was begun and not finished is none. Thoughts, `<think>` to `</think>` or to the end, are not read.

    An answer must be read to its last character: words, relations or commands that the reference lacks make it wrong,
    except a name ("x = 7"), a unit where the reference has none, and what follows the letter of a multiple choice
    ("(C) Paris" is C). A percent sign is a unit: 7% is 7, not 0.07. "0,5" is a decimal where the reference is no list and no
    whole number. "The answer is 7!" is 7 or 5040, as the reference has it; in a box it is 5040. Words, dates and times are
    compared as text. A bare list is a set, unless the reference runs from greatest to least; `(3,1,2)` is ordered.
    `timeout_s` limits the processor time of each comparison; see `math_process`.
    """
    answer = find_answer(text)
    if answer is None:
        return Grade(0.0, note="no final answer: no \\boxed{...}, ####, <answer> or 'answer is', or it is unfinished")
    if len(answer) > MAX_ANSWER_CHARS:
        return Grade(0.0, answer[:MAX_ANSWER_CHARS], f"the answer is longer than {MAX_ANSWER_CHARS} characters")
    note = _difference(answer, _unwrap(reference), timeout_s)
    if (
        note
        and answer.endswith("!")
        and text.rstrip(f"{_AROUND}*\n").endswith("!")
        and _SENTENCE.search(text)
        and not _last_box(text)[0]
    ):
        note = _difference(answer.rstrip("!* "), _unwrap(reference), timeout_s)  # a mark of exclamation, no factorial
    return Grade(0.0, answer, note) if note else Grade(1.0, answer)


def _difference(answer: str, reference: str, timeout_s: float) -> str:
    """Why the answer is not the reference; "" where it is."""
    if answer == reference:
        return ""
    left, right = notation.plain(answer), notation.plain(reference)
    if left == right or ((letter := notation.choice(right)) and letter == notation.choice(left)):
        return ""
    left, right = notation.set_interval(left), notation.set_condition(right)
    if "\\pmod" not in left:
        right = re.sub(r"^(?:\w ?\\equiv )?(.*?) ?\\pmod ?\{\w+\}$", r"\1", right)
    right = right if " " in right else notation.digits(right)
    wanted, found = notation.assigned(notation.items(right)), notation.assigned(notation.items(left))
    if wanted and (wanted.keys() == found.keys() or "=" not in left):
        left = f"({', '.join(map(found.__getitem__, wanted))})" if found else left
        right = f"({', '.join(wanted.values())})"
    if re.fullmatch(r"\d+(?:,\d+)+", answer) and "," in right:
        left = answer  # the reference is a list, so the comma separates
    elif re.fullmatch(r"\d+(?:,\d+)+", reference) and "," in left:
        right = reference
    value, unit = notation.split_unit(notation.items(right))
    if notation.is_text(reference, value):
        return "" if notation.words(left) == notation.words(right) else "differs from the reference"
    if len(right) > 1 and right.isalpha() and left.lower() == right.lower():
        return ""
    if left.lower() == "no" or (notation.is_short_word(right) and left.isalpha()):
        return "differs from the reference"
    left = notation.without_names(notation.items(notation.digits(left)), right)
    if notation.tight(left) == notation.tight(notation.items(right)):
        return ""
    kind, parts = notation.split_list(left)
    is_list = not kind and len(parts) > 1 and len(notation.split_list(value)[1]) == 1
    if is_list and all(part and not _difference(part, reference, timeout_s) for part in parts):
        return ""  # "3/5 or 0.6" states one value twice
    given, given_unit = notation.split_unit(left)
    if unit and given_unit and unit != given_unit:
        return f"the unit is {given_unit}, that of the reference is {unit}"
    if "," not in value and not re.fullmatch(r"-?\d+", value):
        given = notation.decimal_comma(given)
    if note := notation.objection(given, value):
        return note
    values = [value]
    if unit in notation.SHARES and not given_unit:
        values.append(f"\\frac{{{value}}}{{{notation.SHARES[unit]}}}")
    for value in values:
        numbers = notation.number(given), notation.number(value)
        if None not in numbers:
            equal, note = numbers[0] == numbers[1], ""
        else:
            equal, note = compare(notation.latex(value), notation.latex(given), timeout_s)
        if equal:
            return ""
    return note or "differs from the reference"


def find_answer(text: str) -> str | None:
    """The final answer as it is written, without dollar signs and a full stop around it; None where there is none."""
    text = without_thoughts(text).strip()
    text = text[:-100] + _END_TOKENS.sub("", text[-100:])
    has_box, found = _last_box(text)
    if has_box:
        return _unwrap(found) or None
    if hashes := list(_HASHES.finditer(text)):
        last = hashes[-1]
        if last.end() == len(text) and not _SENTENCE.search(last[1]):  # also an empty one: begun and not finished
            return _unwrap(last[1]) or None
        numbers = [match[1] for match in hashes if re.match(r"[-+.\d$\\([{]", match[1])]
        if numbers:
            return _unwrap(numbers[-1]) or None
    if "<answer>" in text:
        content, closed, _ = text.rpartition("<answer>")[2].partition("</answer>")
        text = content.strip() if closed else ""
    if objects := list(_JSON.finditer(text)):
        content = (objects[-1][1] or objects[-1][2]).replace("\\\\", "\\")
        has_box, found = _last_box(content)
        return _unwrap(found if has_box else content) or None
    if sentences := list(_SENTENCE.finditer(text)):
        match = _FIRST_SENTENCE.match(text, sentences[-1].end())
        sentence = match[0] if match else ""
        reason = _REASON.search(sentence)
        if reason and not _DENIAL.search(sentence, reason.end()):
            sentence = sentence[: reason.start()]
        return _unwrap(_unfenced(sentence)) or None
    text = _unfenced(text.strip())
    return _unwrap(text) or None if len(text) <= MAX_LONE_ANSWER_CHARS and "\n" not in text else None


def without_thoughts(text: str) -> str:
    """The text after its reasoning; empty if the reasoning never ends."""
    if "think" not in text.lower():
        return text
    # an end that is left was begun by the prompt
    return _END_OF_THOUGHT.split(_THOUGHT.sub("", text))[-1]


def _unfenced(text: str) -> str:
    """The content of a text that is one block of code."""
    match = _FENCED.fullmatch(text)
    return match[1].strip() if match else text


def _last_box(text: str) -> tuple[bool, str]:
    """Whether there is a box, and the content of the one that starts last, "" where that one is not finished.

    In one pass: a text may open ten thousand boxes and close none.
    """
    boxes: list[tuple[int, int, int]] = []
    """Start of the box, start and end of its content."""
    last_start = -1
    opened: list[tuple[int, int] | None] = []
    """For each open brace: where the box and its content start, None for a brace that is no box's."""
    for match in _BRACES.finditer(text):
        mark = match.group()
        if mark == "}":
            if opened and (box := opened.pop()) is not None:
                boxes.append((*box, match.start()))
        elif mark == "{":
            opened.append(None)
        elif mark.startswith(("\\boxed", "\\fbox")):
            last_start = match.start()
            if mark.endswith("{"):
                opened.append((match.start(), match.end()))
            elif match["bare"]:
                boxes.append((match.start(), match.start("bare"), match.end()))
    boxes.sort()
    if not boxes or boxes[-1][0] != last_start:
        return last_start >= 0, ""
    contents = [text[boxes[-1][1] : boxes[-1][2]]]
    if not contents[0].strip():
        return True, ""
    names = [_name_before(text, boxes[-1][0])]
    for (begin, start, end), (later, _, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        if not _JOINT.fullmatch(text, end + 1 if text[end : end + 1] == "}" else end, later):
            break
        if text[start:end] != contents[-1]:
            contents.append(text[start:end])
            names.append(_name_before(text, begin))
    if len(contents) > 1:
        contents = [name + content for name, content in zip(names, contents, strict=True)]
    return True, ", ".join(reversed(contents))


def _name_before(text: str, box: int) -> str:
    """The "x =" in front of a box, "" where there is none."""
    match = _NAME_BEFORE.search(text, max(0, box - 20), box)
    return match[0] if match else ""


def _unwrap(answer: str) -> str:
    """Without what stands around an answer in a sentence: white space, bold, punctuation, dollar signs or brackets."""
    answer = answer.strip().strip(_AROUND).strip()
    if answer.startswith("*"):
        answer = re.sub(r"^\*\*(.+?)\*\*", r"\1", answer)
    answer = answer.strip("* ")
    if quoted := re.fullmatch(r"([\"'`_]{1,3})([^\"'`]+)\1", answer):
        answer = quoted[2].strip()
    if answer.endswith((".", ",", ";")) and not answer.endswith(("\\.", "..", "\\,", "\\;")):
        answer = answer[:-1].rstrip(" *")
    if not answer.startswith(("$", "\\(", "\\[")):
        return answer
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        end = answer.rfind(closing)
        inner = answer[len(opening) : end]
        if answer.startswith(opening) and end >= len(opening) and not re.search(r"(?<!\\)\$", inner + " "):
            return f"{_unwrap(inner)} {answer[end + len(closing) :]}".strip()
    return answer
