"""Programs: find the code in a response and run it against the tests of its problem, in a sandbox."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from understudy.sandbox import Bubblewrap, Program, Result
from understudy.tasks.verifiers.references import several
from understudy.types import Grade

MAX_ANSWER_CHARS = 1000
"""Characters of the code that a grade keeps as its answer."""
TOLERANCE = 1e-6
"""Relative and absolute, between two numbers that are printed, one of them no whole one."""
_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_END_OF_THOUGHT = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^`\n]*")
_PYTHON = ("", "python", "python3", "py", "python2", "pycon")
_STOPS = re.compile(r"\n(?=(?:class|def|if|print|assert|import|from)\b|[#@]|<\|)")
"""Marks from which on a completion is about another thing, as the authors of HumanEval cut it."""
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


class Runs(Protocol):
    """A sandbox."""

    def run(self, program: Program) -> Result: ...


@dataclass(frozen=True)
class CodeTests:
    """The tests of a problem, which its reference holds as JSON: code that calls functions, or inputs and outputs.

    Raises ValueError where there are neither or both.
    """

    tests: str = ""
    """Python code that passes if it runs to its end. It sees `names` of the program, and nothing else of it."""
    names: tuple[str, ...] = ()
    """Functions and classes that the tests take from the program, the wanted function first."""
    header: str = ""
    """Code in front of every program: imports and helpers of its prompt."""
    prompt: str = ""
    """The beginning of the program, for a response that only goes on with it."""
    inputs: tuple[str, ...] = ()
    """Standard input of the program, a string for each run."""
    outputs: tuple[str, ...] = ()
    """Expected output of each run."""

    def __post_init__(self) -> None:
        if bool(self.tests) == bool(self.inputs):
            raise ValueError("tests of a program are either code (`tests`) or `inputs` and `outputs`")
        if self.tests and not self.names:
            raise ValueError("tests of a program take nothing from it: `names` is empty")
        if len(self.inputs) != len(self.outputs):
            raise ValueError(f"there are {len(self.inputs)} inputs and {len(self.outputs)} outputs")

    def dump(self) -> str:
        """The reference."""
        return json.dumps({name: value for name, value in vars(self).items() if value})

    @staticmethod
    def load(reference: str) -> CodeTests:
        """Reads a reference. Raises ValueError for what is none."""
        try:
            values = json.loads(reference)
        except ValueError as error:
            raise ValueError(f"the tests of a program are no JSON: {error}") from error
        if not isinstance(values, Mapping) or not values.keys() <= CodeTests.__dataclass_fields__.keys():
            known = ", ".join(CodeTests.__dataclass_fields__)
            raise ValueError(f"the tests of a program are a JSON object of {known}")
        told: dict[str, Any] = {}
        for name, value in values.items():
            is_list = name in ("names", "inputs", "outputs")
            if is_list and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
                raise ValueError(f"{name} of the tests of a program must be a list of strings")
            if not is_list and not isinstance(value, str):
                raise ValueError(f"{name} of the tests of a program must be a string")
            told[name] = tuple(value) if is_list else value
        return CodeTests(**told)


@several
def grade_code(text: str, reference: str, sandbox: Runs | None = None) -> Grade:
    """1.0 if the program in the response passes all of its tests, 0.0 otherwise, and why.

    The program is the last fenced block that defines the wanted function, else the last block of Python; without a block the
    whole response, as the rest of the prompt's program where it defines nothing itself. `reference` is what
    `CodeTests.dump` writes. `sandbox` is bubblewrap with its default limits. Raises ValueError for a malformed reference,
    RecipeError or EngineError where the sandbox does not work.
    """
    tests = CodeTests.load(reference)
    code = find_code(text, tests.names[:1])
    if code is None:
        return Grade(0.0, note="no program: no finished block of Python code")
    answer = code[:MAX_ANSWER_CHARS]
    program = f"{tests.header}\n{code}"
    if tests.names and tests.prompt and not defines(code, tests.names[0]):
        program = tests.prompt + ("" if tests.prompt.endswith("\n") else "\n") + code
    box = Bubblewrap() if sandbox is None else sandbox
    if tests.tests:
        result = box.run(Program(program, tests=tests.tests, names=tests.names))
        return Grade(1.0, answer) if result.passed else Grade(0.0, answer, _note(result))
    for number, (given, wanted) in enumerate(zip(tests.inputs, tests.outputs, strict=True), 1):
        result = box.run(Program(program, stdin=given))
        if not result.passed:
            return Grade(0.0, answer, f"test {number} of {len(tests.inputs)}: {_note(result)}")
        if not same_output(result.stdout, wanted):
            return Grade(0.0, answer, f"test {number} of {len(tests.inputs)}: another output")
    return Grade(1.0, answer)


def _note(result: Result) -> str:
    return f"{result.outcome}: {result.note}" if result.note else result.outcome


def find_code(text: str, names: Sequence[str] = ()) -> str | None:
    """The program in a response; None where there is none, or its block is not finished. Nothing is parsed or run here."""
    if "think" in text.lower():
        text = _END_OF_THOUGHT.split(_THOUGHT.sub("", text))[-1]
    blocks, fenced = _blocks(text)
    found = [code for language, code in blocks if language in _PYTHON and code.strip()]
    if found:
        wanted = [code for code in found if all(defines(code, name) for name in names)]
        # a later block without the function is an example of its use
        return (wanted or found)[-1]
    if fenced or not text.strip():
        return None
    defined = any(defines(text, name) for name in names)
    # no strip in front: a body begins with its indentation
    return text.rstrip() if defined or not names else _STOPS.split(f"\n{text}", maxsplit=1)[0][1:] or None


def _blocks(text: str) -> tuple[list[tuple[str, str]], bool]:
    """The finished fenced blocks with the language of each, and whether there is any fence."""
    blocks = list[tuple[str, str]]()
    indent, inside, language, lines = "", "", "", list[str]()
    fenced = False
    for line in text.splitlines():
        match = _FENCE.fullmatch(line)
        if inside:
            if match and not match[3] and match[2].startswith(inside):
                # the fence of an item of a list is indented, and its code with it
                blocks.append((language, textwrap.dedent("\n".join(lines)) if indent else "\n".join(lines)))
                inside = ""
            else:
                lines.append(line)
        elif match:
            fenced = True
            indent, inside, language, lines = match[1], match[2], match[3].lower(), []
    return blocks, fenced


def defines(code: str, name: str) -> bool:
    """Whether code has a function, class or variable of that name at its top level."""
    defined = rf"^(?:(?:async[ \t]+)?def|class)[ \t]+{re.escape(name)}\b|^{re.escape(name)}[ \t]*(?::[^=\n]+)?=(?!=)"
    return re.search(defined, code, re.MULTILINE) is not None


def same_output(found: str, wanted: str) -> bool:
    """Whether two outputs say the same: equal lines, white space at their ends and between their words aside.

    Two numbers of which one has a point or an exponent are equal within `TOLERANCE`.
    """
    left, right = (text.rstrip().splitlines() for text in (found, wanted))
    if len(left) != len(right):
        return False
    for ours, theirs in zip(left, right, strict=True):
        if ours.strip() == theirs.strip():
            continue
        words = ours.split(), theirs.split()
        if len(words[0]) != len(words[1]) or not all(map(_same_word, *words)):
            return False
    return True


def _same_word(found: str, wanted: str) -> bool:
    if found == wanted:
        return True
    if not (_NUMBER.fullmatch(found) and _NUMBER.fullmatch(wanted)) or (found + wanted).strip("+-").isdecimal():
        return False
    if not set(".eE") & set(found + wanted):
        return False
    left, right = float(found), float(wanted)
    return abs(left - right) <= TOLERANCE * max(1.0, abs(left), abs(right))
