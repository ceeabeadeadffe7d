"""Instructions that a program checks: strict and loose, by prompt and by instruction; hostile texts; the real prompts."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from understudy.errors import DataError, RecipeError
from understudy.eval.summary import summarise
from understudy.tasks import Instructions
from understudy.tasks.verifiers import grade_instructions
from understudy.tasks.verifiers import instructions as checks
from understudy.types import Author, Grade, Prompt, Sample

needs_langdetect = pytest.mark.skipif(
    find_spec("langdetect") is None, reason="langdetect is missing: pip install 'understudy[instructions]'"
)


def asked(*named: tuple[str, dict[str, Any]]) -> str:
    return json.dumps({"instruction_id_list": [name for name, _ in named], "kwargs": [given for _, given in named]})


NO_COMMA = ("punctuation:no_comma", dict[str, Any]())
QUOTED = ("startend:quotation", dict[str, Any]())
TITLE = ("detectable_format:title", dict[str, Any]())


@pytest.mark.parametrize(
    ("text", "strict", "loose"),
    [
        ('"all of it"', True, True),
        ('Sure, here it is:\n"all of it"', False, True),
        ('"all of it"\nI hope this helps.', False, True),
        ('Sure:\n"all of it"\nI hope this helps.', False, True),
        ('**"all of it"**', False, True),
        ('Sure:\nHere:\n"all of it"', False, False),
        ("all of it", False, False),
        ("", False, False),
        ('<think>\nno quotes\n</think>\n"all of it"', True, True),
        ('<think>\n"all of it"', False, False),
        ('"<think>', False, False),
    ],
)
def test_strict_and_loose(text: str, strict: bool, loose: bool) -> None:
    grade = grade_instructions(text, asked(QUOTED))
    assert (grade.right, grade.also["loose"]) == (strict, float(loose))
    assert grade.also["instructions"] == (int(strict), 1)
    assert grade.also["instructions_loose"] == (int(loose), 1)


def test_a_prompt_is_followed_where_all_its_instructions_are() -> None:
    grade = grade_instructions("<<joy>> one, two", asked(NO_COMMA, TITLE, QUOTED))
    assert grade.score == 0.0
    assert grade.also == {"loose": 0.0, "instructions": (1, 3), "instructions_loose": (1, 3)}
    assert grade.note == "not followed: punctuation:no_comma, startend:quotation"


@pytest.mark.parametrize(
    ("text", "num"),
    [
        ("One. Two! Three?", 3),
        ("Dr. Smith met J. Doe. They ate, e.g. pens.", 2),
        ('He said "no." Then he left.', 2),
        ("It costs 3.50 dollars.", 1),
        ("No. Not that. Plan B. I see.", 3),
        ("...", 0),
        ("no stop at all", 1),
    ],
)
def test_sentences_are_counted(text: str, num: int) -> None:
    for bound, followed in ((num, True), (num + 1, False)):
        given = {"relation": "at least", "num_sentences": bound}
        found = checks.follows(text, "length_constraints:number_sentences", given)
        assert found == followed, (text, bound)


@needs_langdetect
@pytest.mark.parametrize(
    ("text", "language", "followed"),
    [
        ("Das ist ein kurzer Text in deutscher Sprache.", "de", True),
        ("Das ist ein kurzer Text in deutscher Sprache.", "en", False),
        ("\u0ca8\u0cae\u0cb8\u0ccd\u0c95\u0cbe\u0cb0 \u0c87\u0ca6\u0cc1 \u0c95\u0ca8\u0ccd\u0ca8\u0ca1", "kn", True),
        ("12345", "de", False),
        ("...", "en", False),
    ],
)
def test_the_language_of_a_response(text: str, language: str, followed: bool) -> None:
    reference = asked(("language:response_language", {"language": language}))
    assert {grade_instructions(text, reference).right for _ in range(5)} == {followed}


def test_a_missing_detector_is_named_before_anything_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "Say hi.", "instruction_id_list": ["language:response_language"], "kwargs": [{"language": "de"}]}
    path.write_text(json.dumps(row))
    with pytest.raises(RecipeError, match=r"ifeval: .*needs the package langdetect; run: pip install"):
        Instructions(dataset="ifeval", path=str(path)).prompts("test")


def test_the_prompts_of_ifeval(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: True)
    task = Instructions(dataset="ifeval", path=str(shared / "data/ifeval/input_data.jsonl"))
    prompts = task.prompts("test")
    assert len(prompts) == task.intake("test").num_rows == 541
    kinds = {name for prompt in prompts for name in json.loads(prompt.reference[0])["instruction_id_list"]}  # type: ignore[index]
    assert kinds == checks.IFEVAL.keys()
    assert len(kinds) == 25
    assert prompts[0].messages == (
        {"role": "user", "content": prompts[0].messages[0]["content"]},  # type: ignore[index]
    )
    for prompt in prompts:
        empty = task.grade(prompt, "")
        assert empty.score == empty.also["loose"] == 0.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]},
            "none of IFEval's or IFBench's .did you mean",
        ),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}, {}]}, "must be lists of one length"),
        ({"instruction_id_list": "punctuation:no_comma", "kwargs": [{}]}, "must be lists of one length"),
        ({"instruction_id_list": ["punctuation:no_comma"]}, "no field 'kwargs'"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "x", **row}))
    with pytest.raises(DataError, match=message):
        Instructions(dataset="ifeval", path=str(path)).prompts("test")


ARGUMENTS: dict[str, dict[str, Any]] = {
    "change_case:capital_word_frequency": {"capital_relation": "at least", "capital_frequency": 3},
    "combination:repeat_prompt": {"prompt_to_repeat": "Say hi."},
    "detectable_content:number_placeholders": {"num_placeholders": 3},
    "detectable_content:postscript": {"postscript_marker": "P.P.S"},
    "detectable_format:multiple_sections": {"section_spliter": "Section", "num_sections": 3},
    "detectable_format:number_bullet_lists": {"num_bullets": 3},
    "detectable_format:number_highlighted_sections": {"num_highlights": 3},
    "keywords:existence": {"keywords": ["a"]},
    "keywords:forbidden_words": {"forbidden_words": ["a"]},
    "keywords:frequency": {"keyword": "a", "frequency": 3, "relation": "at least"},
    "keywords:letter_frequency": {"letter": "a", "let_frequency": 3, "let_relation": "at least"},
    "language:response_language": {"language": "en"},
    "length_constraints:nth_paragraph_first_word": {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "a"},
    "length_constraints:number_paragraphs": {"num_paragraphs": 2},
    "length_constraints:number_sentences": {"num_sentences": 3, "relation": "at least"},
    "length_constraints:number_words": {"num_words": 3, "relation": "at least"},
    "startend:end_checker": {"end_phrase": "The end."},
}


@pytest.mark.parametrize(
    "piece", ["[", "<<", "*", "\n", " ", "x\n ", "{", "```", "a. ", '." ', "***", "Section ", "P.", "\u0130"]
)
def test_a_megabyte_is_read_in_bounded_time(piece: str) -> None:
    text = f"x{piece * (1_000_000 // len(piece))}x"
    for name in checks.IFEVAL:
        if name == "language:response_language" and find_spec("langdetect") is None:
            continue
        started = time.process_time()
        checks.follows(text, name, ARGUMENTS.get(name, {}))
        assert time.process_time() - started < 5, name


def graded(name: str, index: int, also: dict[str, Any]) -> Sample:
    ids = torch.tensor([0, 1])
    author = torch.tensor([Author.PROMPT, Author.STUDENT], dtype=torch.uint8)
    grade = Grade(1.0, also=also)
    return Sample(Prompt(name, text="x"), index, ids, author, 1, "stop", "x", grade=grade)


def test_a_share_of_counts_is_at_most_one() -> None:
    samples = [graded(str(count), 0, {"n": (count - 1, count)}) for count in (2, 9)]
    found = summarise(samples, step=0, split="test", eos_ids=[1]).metrics["score/n"]
    assert found.value == pytest.approx(9 / 11)
    assert found.high == 1.0


def test_counts_are_averaged_over_all_instructions_and_shares_over_prompts() -> None:
    counts = {"a": [(1, 1), (0, 1)], "b": [(2, 4), (3, 4)], "c": [(0, 2), (2, 2)]}
    samples = [
        graded(name, index, {"n": pair, "share": pair[0] / pair[1]})
        for name, pairs in counts.items()
        for index, pair in enumerate(pairs)
    ]
    metrics = summarise(samples, step=0, split="test", eos_ids=[1]).metrics
    assert metrics["score/n"].value == pytest.approx(8 / 14)
    assert metrics["score/share"].value == pytest.approx(np.mean([0.5, 0.625, 0.5]))
    low, high = metrics["score/n"].low, metrics["score/n"].high
    assert low is not None
    assert high is not None
    assert 0 < low < 8 / 14 < high
