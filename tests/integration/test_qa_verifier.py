"""Short answers: exact match, F1 and cover match over all aliases, against answers that only look right."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from understudy.tasks.verifiers import find_verifier, grade_answer
from understudy.tasks.verifiers.qa import normalise

RIGHT = [
    ("the Eiffel Tower!", "Eiffel Tower"),
    ("  eiffel   tower\n", "The Eiffel Tower"),
    ("<answer> Beijing </answer>", "Beijing"),
    ("<answer>one</answer> no, <answer>two</answer>", "two"),
    ("use <answer> and </answer>: <answer>two</answer>", "two"),
    ("<think>Rome? <answer>Rome</answer></think><answer>Paris</answer>", "Paris"),
    ("<think>it is Rome</think>\n\nParis", "Paris"),
    ("Beyonce\u0301", "Beyonc\u00e9"),
    ("U.S.", "us"),
    ("The The", "the the"),
    ("!!!", "!!!"),
    ("14 December, 1972", "14 december 1972"),
]
"""Response, reference: equal after normalisation."""
WRONG = [
    ("", "Paris"),
    ("<answer></answer>", "Paris"),
    ("<answer> \n </answer>", "Paris"),
    ("<answer>Paris", "Paris"),
    ("Paris</answer>", "Paris"),
    ("<answer>Rome</answer> Paris", "Paris"),
    ("the answer is Paris", "Paris"),
    ("<information>the answer is Paris</information> <answer>Rome</answer>", "Paris"),
    ("<answer>Paris, Rome, London</answer>", "Paris"),
    ("<answer>not Paris</answer>", "Paris"),
    ("<answer>\\boxed{Paris} or Rome</answer>", "Paris"),
    ("<answer>Pa ris</answer>", "Paris"),
    ("<answer>\u0420aris</answer>", "Paris"),
    ("<answer>pari\u200bs</answer>", "Paris"),
    ("<answer>the</answer>", "!!!"),
    ("<answer>a</answer>", "The The"),
    ("<answer>.</answer>", "the"),
    ("<answer>\u00b2</answer>", "2"),
    ("<answer>yes and no</answer>", "yes"),
    ("<answer>" + "9" * 20_000 + "</answer>", "9" * 20_000),
    ("<Answer>Paris</Answer> Rome", "Paris"),
    ("<answer><answer>Paris</answer></answer>", "Paris"),
]


@pytest.mark.parametrize(("text", "reference"), RIGHT)
def test_equal_answers_are_right(text: str, reference: str) -> None:
    assert find_verifier("em")(text, reference).right
    assert find_verifier("f1")(text, reference).right


@pytest.mark.parametrize(("text", "reference"), WRONG)
def test_hostile_answers_are_wrong(text: str, reference: str) -> None:
    grade = find_verifier("em")(text, reference)
    assert grade.score == 0.0
    assert grade.note
    assert not find_verifier("f1")(text, reference).right


def test_only_a_tag_counts_where_the_prompt_asks_for_it() -> None:
    assert grade_answer("Paris", "Paris").right
    grade = grade_answer("Paris", "Paris", tagged=True)
    assert (grade.score, grade.answer, grade.note) == (0.0, None, "no <answer> in the response")


def test_scores_are_the_best_over_all_aliases() -> None:
    aliases = ["Samuel Langhorne Clemens", "Mark Twain", "Twain, Mark"]
    grade = find_verifier("em")("<answer>the writer Mark Twain</answer>", aliases)
    assert grade.score == 0.0
    assert grade.also == {"em": 0.0, "f1": pytest.approx(2 * 2 / (3 + 2)), "cover_em": 1.0}
    # F1 ignores the order of words, exact match does not: the last alias is the only equal one
    grade = find_verifier("f1")("Clemens Langhorne Samuel", ["Samuel Langhorne Clemens", "clemens langhorne samuel"])
    assert grade.also == {"em": 1.0, "f1": 1.0, "cover_em": 1.0}


def test_f1_is_that_of_squad() -> None:
    f1 = find_verifier("f1")
    assert f1("a b c d", "b c x").score == pytest.approx(2 * (2 / 3) * (2 / 3) / (2 / 3 + 2 / 3))
    assert f1("red red", "red").score == pytest.approx(2 / 3)
    assert f1("yes it is", "yes").score == 0.0
    assert f1("north", "no").also["cover_em"] == 0.0


def test_normalisation_is_idempotent() -> None:
    for text in ("The  a U.S.A. (an)", "!!!", "the", "  ", "\u00c9t\u00e9"):
        assert normalise(normalise(text)) == normalise(text)


def test_long_answers_take_no_time() -> None:
    aliases = [f"alias {number}" for number in range(100)]
    started = time.process_time()
    for text in ("a " * 500_000, "<answer>" * 125_000, "<answer>" + "x" * 10**6 + "</answer>", "</answer>" * 110_000):
        assert find_verifier("em")(text, aliases).score == 0.0
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    "name", ["nq_open/dev", "triviaqa/sample_1000", "bamboogle/test", "hotpotqa/dev_questions_answers"]
)
def test_real_gold_answers_are_right(shared: Path, name: str) -> None:
    lines = (shared / "data" / f"{name}.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        answers = row.get("answers") or [row["answer"]]
        # the first and the last of sometimes hundreds
        for answer in (answers[0], answers[-1]):
            assert grade_answer(f"<answer>{answer}</answer>", answers, tagged=True).right, row
