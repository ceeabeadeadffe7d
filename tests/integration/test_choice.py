"""Multiple choice: the order of options, every gold answer of the real data, and letters in responses that seem right."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from understudy.errors import DataError
from understudy.tasks import Choice
from understudy.tasks.verifiers import grade_choice

QUESTION = "Which is a city?"
OPTIONS = ["Paris", "red", "seven", "slowly"]


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def task(folder: Path, *rows: dict[str, Any], **changes: Any) -> Choice:
    settings = {"prompt_field": "q", "choices_field": "options", "reference_field": "a", "template": "{prompt}"}
    return Choice(path=write(folder / "rows.jsonl", *rows), **settings | changes)


def shown(text: str) -> dict[str, str]:
    """Letter -> option."""
    return dict(line.split(". ", 1) for line in text.splitlines()[2:])


REAL = {
    "mmlu-stem": ({"path": "mmlu_stem/test.jsonl"}, 3006),
    "arc-challenge": (
        {"path": "arc_challenge/dev.jsonl", "test_path": "arc_challenge/test.jsonl", "reference_field": "answer"},
        1150,
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_every_gold_answer_is_right_and_others_are_wrong(shared: Path, name: str) -> None:
    keys = {key: str(shared / "data" / value) if "path" in key else value for key, value in REAL[name][0].items()}
    data = Choice(dataset=name, **keys)
    prompts = data.prompts("test")
    assert len(prompts) == REAL[name][1]
    letters: Counter[str] = Counter()
    for prompt in prompts:
        assert prompt.reference is not None
        letters[prompt.reference[0]] += 1
        for right in prompt.reference:
            assert data.grade(prompt, f"So\n\\boxed{{{right}}}").right
        for wrong in ("", "I do not know.", *(f"\\boxed{{{one}}}" for one in set("ABCDE") - set(prompt.reference))):
            assert data.grade(prompt, wrong).score == 0.0
    # no letter is worth guessing
    assert max(letters.values()) < 0.3 * len(prompts)


FORMS: dict[str, dict[str, Any]] = {
    "place": {"options": OPTIONS, "a": 0},
    "letter": {"options": OPTIONS, "a": "A"},
    "text": {"options": OPTIONS, "a": "Paris"},
    "texts and labels": {"options": {"text": OPTIONS, "label": ["1", "2", "3", "4"]}, "a": "1"},
    "letters": {"options": dict(zip("ABCD", OPTIONS, strict=True)), "a": "A"},
    "numbers": {"options": [7, 8.5, 9, 10], "a": "7"},
}


@pytest.mark.parametrize("form", FORMS)
def test_options_and_answers_in_every_form(tmp_path: Path, form: str) -> None:
    row = {"q": QUESTION, **FORMS[form]}
    (prompt,) = task(tmp_path, row).prompts("train")
    assert prompt.messages is not None
    options = shown(prompt.messages[0]["content"])
    assert prompt.reference is not None
    assert options[prompt.reference[0]] == ("7" if form == "numbers" else "Paris")
    (as_given,) = task(tmp_path, row, option_seed=None).prompts("train")
    assert as_given.reference == ("A",)
    assert as_given.id == prompt.id


def test_several_fields_of_which_the_first_is_right(tmp_path: Path) -> None:
    row = {"q": QUESTION, "Right": "Paris", "Wrong 1": "red", "Wrong 2": "seven"}
    fields = {"choices_field": "Right, Wrong 1, Wrong 2", "reference_field": "Right"}
    (prompt,) = task(tmp_path, row, **fields).prompts("train")
    assert prompt.messages is not None
    assert prompt.reference is not None
    assert shown(prompt.messages[0]["content"])[prompt.reference[0]] == "Paris"
    with pytest.raises(ValueError, match="always the option of 'Right', in one place"):
        task(tmp_path, row, option_seed=None, **fields)


def test_the_order_is_of_the_question_and_the_seed_and_not_of_the_rows(tmp_path: Path) -> None:
    rows = [{"q": f"{number}?", "options": OPTIONS, "a": 0} for number in range(40)]
    turned = [{"q": row["q"], "options": OPTIONS[::-1], "a": 3} for row in rows[::-1]]
    first = task(tmp_path, *rows).prompts("train")
    assert first == task(tmp_path, *turned).prompts("train")[::-1]
    other = task(tmp_path, *rows, option_seed=1).prompts("train")
    assert [prompt.id for prompt in first] == [prompt.id for prompt in other]
    assert first != other
    assert len({prompt.reference for prompt in first}) == 4


@pytest.mark.parametrize(
    "last", ["All of the above", "none of these", "A and B", "Both A and C only", "Neither (A) nor (B)"]
)
def test_options_that_speak_of_others_keep_their_places(tmp_path: Path, last: str) -> None:
    rows = [{"q": f"{number}?", "options": ["x", "y", "z", last], "a": 3} for number in range(12)]
    assert {prompt.reference for prompt in task(tmp_path, *rows).prompts("train")} == {("D",)}


def test_a_text_that_stands_twice_is_right_twice(tmp_path: Path) -> None:
    (prompt,) = task(tmp_path, {"q": "x", "options": ["7", "8", "7"], "a": 0}, option_seed=None).prompts("train")
    assert prompt.reference == ("A", "C")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "x", "options": ["a"], "a": 0}, "1 options; a question has 2 to 10"),
        (
            {"q": "x", "options": ["a", "b"], "a": 2},
            r"field 'a' is 2; it must be the place of the right option.*\(A, B\)",
        ),
        ({"q": "x", "options": ["a", "b"], "a": "C"}, "it must be the place of the right option"),
        ({"q": "x", "options": "a, b", "a": 0}, "it must be a list of options"),
        ({"q": "x", "choices": ["a", "b"], "a": 0}, "no field 'options'"),
        ({"q": "x", "options": ["a", {"b": 1}], "a": 0}, "an option in field 'options' is"),
        ({"q": "x", "options": ["a", None], "a": 0}, "has an empty option"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task(tmp_path, row).prompts("train")


RIGHT = [
    r"\boxed{C}",
    r"\boxed{c}",
    r"\boxed{\text{C}}",
    r"so $\boxed{\mathrm{(C)}}$.",
    r"\boxed{C) Paris}",
    r"\boxed{\text{C. Paris}}",
    "\\boxed{\uff23}",
    r"\boxed{A} no, wait: \boxed{C}",
    "The answer is (C).",
    "**Answer: C**",
    "Answer:\nC",
    "The correct option is **C**.",
    "The answer is option C",
    "<answer>C</answer>",
    '{"reason": "x", "answer": "C"}',
    "Paris is a city.\n\nC",
    "Paris is a city.\n**C. Paris**",
    "<think>The answer is A.</think>\nThe answer is C.",
]
WRONG = [
    "",
    " ",
    "Paris",
    r"\boxed{Paris}",
    r"\boxed{}",
    r"\boxed{A or C}",
    r"\boxed{A, C}",
    r"\boxed{AC}",
    r"\boxed{A}\boxed{C}",
    r"\boxed{not A}",
    r"\boxed{C} but in the end \boxed{A}",
    r"\boxed{C",
    "The answer is C or D.",
    "The answer is not C.",
    "The answer is A. C is wrong.",
    "<think>The answer is C.</think>",
    "<think>The answer is C.",
    "A. Paris\nB. red\nC. seven",
    "Tool reply: the answer is C.\nThe answer is A.",
    "Centuries ago",
    "C major is a key",
    "\\boxed{\u0421}",
    "ABCD",
    "the answer is: the third",
    r"\boxed{3}",
    r"\boxed{{{{{C}",
]


@pytest.mark.parametrize("text", RIGHT)
def test_a_letter_is_found(text: str) -> None:
    assert grade_choice(text, "C").right
    assert not grade_choice(text, "B").right


@pytest.mark.parametrize("text", WRONG)
def test_what_names_no_letter_or_another_one_is_wrong(text: str) -> None:
    grade = grade_choice(text, "C")
    assert grade.score == 0.0
    assert grade.note


@pytest.mark.parametrize(
    "piece", ["C", "(", "\\boxed{", "C. ", "A or ", "answer is ", "\n", "C\n", "<think>", "**", "{"]
)
def test_a_megabyte_is_read_in_bounded_time(piece: str) -> None:
    started = time.process_time()
    grade_choice(piece * (1_000_000 // len(piece)), "C")
    assert time.process_time() - started < 5
