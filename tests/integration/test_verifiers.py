"""Grading against real reference answers, and under attack: the verifier reads text that a model wrote."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from understudy import given
from understudy.errors import DataError
from understudy.tasks import Jsonl
from understudy.tasks.verifiers import (
    Reference,
    find_verifier,
    grade_exact,
    grade_instructions,
    grade_math,
    math_process,
)
from understudy.tasks.verifiers.instructions import IFEVAL
from understudy.tasks.verifiers.math import MAX_ANSWER_CHARS, find_answer
from understudy.tasks.verifiers.math_process import compare
from understudy.types import Grade, Prompt

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).parents[1] / "fixtures"
NO_ANSWER = ["", "   \n", "I give up.\nReally.", "\\boxed{}", "\\boxed{", "#### ", "<think>\\boxed{1}</think>"]
WRONG = "123456789"
"""No reference of the data sets here has this value."""

TABLE = yaml.safe_load((FIXTURES / "answers.yaml").read_text(encoding="utf-8"))
HOSTILE = yaml.safe_load((FIXTURES / "hostile_answers.yaml").read_text(encoding="utf-8"))

DATA = {
    "gsm8k test": ("gsm8k/test.jsonl", 1319),
    "gsm8k train": ("gsm8k/train.jsonl", 7473),
    "math500": ("math500/test.jsonl", 500),
    "aime_2024": ("aime_2024/test.jsonl", 30),
    "aime_2025": ("aime_2025/test.jsonl", 30),
    "amc_2023": ("amc_2023/test.jsonl", 40),
    "aime_1983_2023": ("deepscaler_aime_1983_2023/train.jsonl", 975),
    "dapo": ("dapo_math_17k/train.jsonl.gz", 17176),
}


def read(path: Path) -> list[dict[str, str]]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.splitlines()]


def references(rows: list[dict[str, str]]) -> list[str]:
    """GSM8K states the answer after the last "####" of its solutions."""
    return [row["answer"].rpartition("####")[2].strip() for row in rows]


def check_gold(rows: list[dict[str, str]]) -> None:
    """The bare answer in every form, and the worked solutions of GSM8K and MATH-500, which end as a response should."""
    for row, reference in zip(rows, references(rows), strict=True):
        texts = [f"So the answer is $\\boxed{{{reference}}}$.", f"So\n#### {reference}", f"The answer is {reference}."]
        texts += [f"Thus:\n**Answer:** ${reference}$"]
        texts += [row["answer"]] if "####" in row["answer"] else []
        texts += [row["solution"]] if "unique_id" in row else []
        for text in texts:
            assert grade_math(text, reference).score == 1.0, (reference, grade_math(text, reference))


def check_wrong(rows: list[dict[str, str]]) -> None:
    for reference in references(rows):
        for text in (*NO_ANSWER, f"\\boxed{{{WRONG}}}"):
            grade = grade_math(text, reference)
            assert grade.score == 0.0, (text, reference)
            assert grade.note


@pytest.mark.parametrize("name", DATA)
def test_every_gold_answer_is_right(shared: Path, name: str) -> None:
    path, num_rows = DATA[name]
    rows = read(shared / "data" / path)
    assert len(rows) == num_rows
    check_gold(rows)


@pytest.mark.parametrize("name", DATA)
def test_empty_and_wrong_answers_are_wrong(shared: Path, name: str) -> None:
    check_wrong(read(shared / "data" / DATA[name][0]))


def test_every_reference_of_math500_equals_itself_through_math_verify(shared: Path) -> None:
    """Equal spelling needs no comparison, so the tests above may never reach math-verify; this one always does."""
    for reference in references(read(shared / "data/math500/test.jsonl")):
        assert compare(reference, reference, 5.0) == (True, ""), reference


def test_answers_of_other_problems_are_wrong(shared: Path) -> None:
    answers = references(read(shared / "data/math500/test.jsonl"))
    mistaken = [
        (answer, reference)
        for answer, reference in zip(answers, [*answers[1:], answers[0]], strict=True)
        if answer != reference and grade_math(f"\\boxed{{{answer}}}", reference).score
    ]
    assert mistaken == [("5", "x=5")], "equal in mathematics"


def test_a_changed_digit_makes_every_answer_wrong() -> None:
    for reference in references(read(FIXTURES / "math500.jsonl")):
        for match in re.finditer(r"\d", reference):
            other = str((int(match[0]) + 1) % 10)
            answer = reference[: match.start()] + other + reference[match.end() :]
            assert grade_math(f"\\boxed{{{answer}}}", reference).score == 0.0, (answer, reference)


@pytest.mark.parametrize("name", ["gsm8k", "math500"])
def test_samples_of_the_data_sets(name: str) -> None:
    rows = read(FIXTURES / f"{name}.jsonl")
    check_gold(rows)
    check_wrong(rows)
    for reference in references(rows):
        assert compare(reference, reference, 5.0) == (True, ""), reference


@pytest.mark.parametrize("block", TABLE, ids=lambda block: block["kind"])
def test_the_table_of_answers(block: dict[str, Any]) -> None:
    cases = [(text, *rest) for text, *rest in block.get("texts", [])]
    cases += [(f"\\boxed{{{answer}}}", *rest) for answer, *rest in block.get("boxed", [])]
    for text, reference, score in cases:
        grade = grade_math(text, reference)
        assert grade.score == score, (text, reference, grade)
        assert (grade.note == "") == (score == 1), (text, reference, grade)


@pytest.mark.parametrize("block", HOSTILE, ids=lambda block: block["kind"])
def test_hostile_answers_are_wrong(block: dict[str, Any]) -> None:
    form = "{}" if block.get("whole") else "\\boxed{{{}}}"
    for answer, reference in product(block["answers"], block["references"]):
        grade = grade_math(form.format(answer.replace("{r}", reference)), reference)
        assert grade.score == 0.0, (answer, reference, grade)
        assert grade.note


def test_the_tables_are_large_enough() -> None:
    assert sum(len(block.get(form, [])) for block in TABLE for form in ("texts", "boxed")) >= 200
    assert sum(len(block["answers"]) * len(block["references"]) for block in HOSTILE) >= 600
    assert all(block["source"] for block in TABLE)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("\\boxed{\\frac{1}{2}}", "0.5"),
        ("\\boxed{\\dfrac12}", "\\frac{1}{2}"),
        ("\\boxed{1,234}", "1234"),
        ("\\boxed{1{,}234}", "1,234"),
        ("\\boxed{\\$18}", "18"),
        ("\\boxed{18.00}", "18"),
        ("#### 18", "18"),
        ("The answer is 18.", "18"),
        ("**Answer:** 18", "18"),
        ("18", "18"),
        ("\\boxed{ (3, \\frac{\\pi}{2}) }", "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("\\boxed{\\{1, 2\\}}", "\\{2, 1\\}"),
        ("\\boxed{2\\sqrt{2}}", "\\sqrt{8}"),
        ("\\boxed{4}. Wait, no: \\boxed{5}", "5"),
        ("<think>\\boxed{4}</think> It is \\boxed{5}", "5"),
        ("\\boxed{" + "0" * 500 + "7}", "7"),
    ],
)
def test_other_spellings_are_right(text: str, reference: str) -> None:
    assert grade_math(text, reference).score == 1.0, grade_math(text, reference)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("\\boxed{5}. Wait, no: \\boxed{4}", "5"),
        ("\\boxed{-5}", "5"),
        ("\\boxed{50}", "5"),
        ("\\boxed{(1,2)}", "(2,1)"),
        ("\\boxed{5 or 6}", "5"),
        ("\\boxed{x}", "5"),
        ("It may be 5 or 6.\nWho knows?", "5"),
        ("I do not know, perhaps 5", "5"),
        ("#### none of them, not 5", "5"),
    ],
)
def test_other_answers_are_wrong(text: str, reference: str) -> None:
    assert grade_math(text, reference).score == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed{a{b}{c}} d", "a{b}{c}"),
        ("\\boxed{\\boxed{3}}", "3"),
        ("\\boxed{1} \\boxed{2", None),
        ("\\boxed{1 \\boxed{2}", "2"),
        ("\\boxed 7", "7"),
        ("\\boxed{\\text{a \\} b}}", "\\text{a \\} b}"),
        ("} } \\boxed{$x$.}", "x"),
    ],
)
def test_which_box_is_the_answer(text: str, answer: str | None) -> None:
    assert find_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 20_000,
        "{" * 100_000,
        "answer " * 20_000,
        "answer is" + " " * 100_000,
        "#### " * 20_000,
        "$" * 100_000,
        "```a\n" * 20_000,
        "answer is ```\n" * 10_000,
        "\\boxed{" + "]1," * 300 + "}",
        "\\boxed{" + "\\underline{" * 80 + "}" * 81,
    ],
    ids=lambda text: text[:8],
)
def test_reading_takes_linear_time(text: str) -> None:
    start = time.process_time()
    assert grade_math(text, "1").score == 0.0
    assert time.process_time() - start < 2, "quadratic scanning of 100,000 characters would take minutes"


HEAVY = ["9^{9^{9^{9}}}", "10^{10^{10}}", "(x+1)^{100000}", "\\sum_{n=1}^{10^{12}} \\frac{1}{n^2}", "1000000!!!!"]


@pytest.mark.parametrize("expression", HEAVY)
def test_a_heavy_expression_ends_at_the_limit_and_is_wrong(expression: str) -> None:
    assert compare("1", "1.0", 20.0) == (True, "")  # a worker is up: importing sympy is no part of the limit
    grade = grade_math(f"\\boxed{{{expression}}}", "\\frac{1}{3}", timeout_s=0.5)
    assert grade.score == 0.0
    assert "0.5 s" in grade.note or "not comparable" in grade.note or "differs" in grade.note
    assert grade_math("\\boxed{1/3}", "\\frac{1}{3}").score == 1.0, "the next comparison is not affected"


def test_the_limit_is_what_stops_a_heavy_expression() -> None:
    assert compare("\\frac{1}{3}", HEAVY[0], 0.5) == (False, "the comparison took more than 0.5 s")


def test_a_long_answer_is_not_compared() -> None:
    grade = grade_math("\\boxed{" + "x+" * MAX_ANSWER_CHARS + "1}", "1")
    assert grade.score == 0.0
    assert f"longer than {MAX_ANSWER_CHARS}" in grade.note
    assert grade.answer is not None
    assert len(grade.answer) == MAX_ANSWER_CHARS


@pytest.mark.parametrize(
    "text", ["\\boxed{\x00}", "\\boxed{\ud800}", "\\boxed{\n\r\u2028}", '\\boxed{"}', "\\boxed{\\}"]
)
def test_odd_characters_are_wrong_and_raise_nothing(text: str) -> None:
    assert grade_math(text, "\\frac12").score == 0.0


def test_comparisons_from_many_threads() -> None:
    pairs = [(f"\\frac{{{number}}}{{7}}", f"{number}/7", True) for number in range(1, 20)]
    pairs += [(f"\\frac{{{number}}}{{7}}", f"{number + 1}/7", False) for number in range(1, 20)]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda pair: compare(pair[0], pair[1], 20.0)[0], pairs))
    assert results == [equal for _, _, equal in pairs]


def test_a_worker_that_was_killed_is_replaced() -> None:
    assert compare("1", "1.0", 20.0) == (True, "")
    for worker in math_process._idle:
        worker.process.kill()
        worker.process.wait()
    assert compare("1", "1.0", 20.0) == (True, "")


def test_the_worker_does_not_see_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET_KEY", "s3cret")
    math_process.close_workers()
    assert compare("1", "1.0", 20.0) == (True, "")
    environment = Path(f"/proc/{math_process._idle[-1].process.pid}/environ")
    if not environment.exists():
        pytest.skip("no /proc on this system")
    assert b"s3cret" not in environment.read_bytes()


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_the_worker_starts_late_and_ends_with_its_parent() -> None:
    code = (
        "from understudy.tasks.verifiers import grade_math, math_process\n"
        "assert grade_math(r'\\boxed{1}', '1').score == 1.0 and not math_process._idle, 'equal spelling needs no worker'\n"
        "assert grade_math(r'\\boxed{2/2}', '1').score == 1.0\n"
        "print(math_process._idle[0].process.pid)\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert has_ended(int(done.stdout))


def test_the_worker_ends_when_its_parent_is_killed() -> None:
    code = (
        "import os\nfrom understudy.tasks.verifiers import grade_math, math_process\n"
        "grade_math(r'\\boxed{2/2}', '1')\n"
        "print(math_process._idle[0].process.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    done = run_python(code)
    assert done.returncode == -9
    assert has_ended(int(done.stdout))


def has_ended(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        status = Path(f"/proc/{pid}/stat")
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True  # dead, and whoever inherited it has not asked for its status yet
        time.sleep(0.1)
    return False


def test_math_without_math_verify_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('no module named math_verify')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    math_process.close_workers()
    with pytest.raises(Exception, match="is `math-verify` installed"):
        compare("1", "1.0", 20.0)


@pytest.mark.parametrize(
    ("text", "after", "score"),
    [
        ("690=15#1035", "#", 1.0),
        ("1#2#1035", "#", 1.0),
        (" 1035\n", None, 1.0),
        ("690=15#1036", "#", 0.0),
        ("1035", "#", 0.0),
        ("1035#", "#", 0.0),
        ("", None, 0.0),
    ],
)
def test_exact(text: str, after: str | None, score: float) -> None:
    grade = grade_exact(text, "1035", after)
    assert grade.score == score
    assert (grade.note == "") == (score == 1.0)


def test_the_best_of_several_accepted_answers_counts() -> None:
    aliases = find_verifier("exact")
    assert [aliases(text, ("John Snow", "Jon Snow")).score for text in ("Jon Snow", "John Snow", "Snow")] == [1, 1, 0]
    assert find_verifier("math")("\\boxed{0.5}", ("\\frac{1}{3}", "\\frac{1}{2}")).right
    with pytest.raises(ValueError, match="give at least one"):
        aliases("1", ())


def test_a_lone_reference_is_the_only_accepted_answer() -> None:
    assert Prompt("p", text="1+1=", reference="12").reference == ("12",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("Clemens", ["Mark Twain", "Clemens"], 1.0),
        ("Sawyer", ["Mark Twain", ["Clemens"]], 0.0),
        ("7", 7, 1.0),
        ("7", 7.0, 1.0),
        ("0.25", 0.25, 1.0),
        ("yes", True, 1.0),
        ("True", False, 0.0),
        ("cafe\u0301", "caf\u00e9", 1.0),
        ("\u00a0caf\u00e9\u2003", "cafe\u0301", 1.0),
        ("Clemens", "clemens", 0.0),
        ("\uff17", "7", 0.0),
        ("7.0", "7", 0.0),
    ],
)
def test_exact_with_several_answers_numbers_and_booleans(text: str, reference: Reference, score: float) -> None:
    grade = grade_exact(text, reference)
    assert grade.score == score
    assert (grade.note == "") == (score == 1.0)


@pytest.mark.parametrize("reference", [[], [[]], None, float("nan"), {"value": "7"}])
@pytest.mark.parametrize("verifier", [grade_exact, grade_math])
def test_a_reference_that_is_none_is_an_error(verifier: Callable[..., Grade], reference: object) -> None:
    with pytest.raises(ValueError, match="the reference is"):
        verifier("\\boxed{7}", reference)


@pytest.mark.parametrize(
    ("result", "score"),
    [
        (True, 1.0),
        (np.bool_(True), 1.0),
        (np.float32(0.5), 0.5),
        (np.array([0.5]), 0.5),
        (Fraction(1, 2), 0.5),
        (Grade(np.float32(0.5)), 0.5),  # type: ignore[arg-type]
        (None, None),
        ("1", None),
        (1j, None),
        (float("nan"), None),
        (10**400, None),
        (np.array([0.5, 1.0]), None),
        ({"score": 1.0}, None),
        ((1.0, "why"), None),
        (Grade(float("nan")), None),
        (Grade("1"), None),  # type: ignore[arg-type]
    ],
    ids=repr,
)
def test_what_a_function_of_ones_own_returns(result: Any, score: float | None) -> None:
    name = f"{given.PREFIX}mine.verify"
    with given.given({name: lambda text, reference: result}):
        if score is not None:
            assert find_verifier(name)("7", "7").score == score
            return
        with pytest.raises(
            DataError, match=r"^mine\.verify returned .*; it must return a finite number, a bool or a Grade"
        ):
            find_verifier(name)("7", "7")


def test_an_unknown_verifier_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="'maths'; did you mean 'math'"):
        Jsonl(path="data.jsonl", prompt_field="question", verifier="maths")


FOLLOWED: list[tuple[str, dict[str, Any], str, str]] = [
    ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 2}, "NO and NO", "NO"),
    ("change_case:english_capital", {}, "YES, 2.", "Yes."),
    ("change_case:english_lowercase", {}, "yes, 2.", "Yes."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "say hi.\nHi.", "Hi. Say hi."),
    ("combination:two_responses", {}, "one\n******\ntwo", "one ****** one"),
    ("combination:two_responses", {}, "one ****** two ******", "one ****** ****** two"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye. P. S. more", "Bye. PS more"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "P.P.S more", "P.S. more"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "Maybe."),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "a: 1"),
    ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2}, "Day 1 x Day 2 y", "Day 1"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and **"),
    ("detectable_format:title", {}, "<<joy>> text", "<< >> text"),
    ("keywords:existence", {"keywords": ["Sun", "sea"]}, "sun and sea", "sun"),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "rocket", "a Rock."),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "less than"}, "a", "a A"),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "at least"}, "##", "#"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        'First.\n\n"Then, more.',
        "Then.\n\nFirst.",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n***\n***\nb"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two!", "One, two."),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "one two", "one two three"),
    ("punctuation:no_comma", {}, "one two", "one, two"),
    ("startend:end_checker", {"end_phrase": "The end."}, 'So "the end."', "The end. So"),
    ("startend:quotation", {}, ' "all of it" ', '"a part" of it'),
]


@pytest.mark.parametrize(("name", "arguments", "followed", "missed"), FOLLOWED)
def test_an_instruction_is_followed_or_not(name: str, arguments: dict[str, Any], followed: str, missed: str) -> None:
    reference = json.dumps({"instruction_id_list": [name], "kwargs": [arguments | {"num_bananas": None}]})
    assert grade_instructions(followed, reference).right
    assert replace(grade_instructions(missed, reference), also={}) == Grade(0.0, note=f"not followed: {name}")
    assert not grade_instructions(" ", reference).right


def test_every_instruction_of_a_prompt_counts() -> None:
    assert {name for name, *_ in FOLLOWED} == IFEVAL.keys() - {"language:response_language"}
    asked = {"instruction_id_list": ["punctuation:no_comma", "detectable_format:title"], "kwargs": [{}, {}]}
    verify = find_verifier("instructions")
    assert verify("<<a>> b", json.dumps(asked)).right
    assert verify("a, b", json.dumps(asked)).note == "not followed: punctuation:no_comma, detectable_format:title"
    with pytest.raises(ValueError, match="the instruction 'count:emojis' cannot be checked"):
        verify("a", json.dumps({"instruction_id_list": ["count:emojis"], "kwargs": [{}]}))
    with pytest.raises(ValueError, match="does not take \\['num_words'\\]"):
        verify("a", json.dumps({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": 3}]}))


def test_real_instructions_can_all_be_read(shared: Path) -> None:
    for row in read(shared / "data/ifeval/input_data.jsonl"):
        assert set(row["instruction_id_list"]) <= IFEVAL.keys()
        if "language:response_language" not in row["instruction_id_list"] or find_spec("langdetect"):
            assert grade_instructions("text", json.dumps(row)).score in (0.0, 1.0)
