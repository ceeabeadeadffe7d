"""IFBench's kinds of instructions: each with texts that follow it and texts that do not, and hostile ones."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from understudy.errors import DataError
from understudy.tasks import Instructions
from understudy.tasks.verifiers import grade_instructions
from understudy.tasks.verifiers.ifbench import IFBENCH, UNCHECKED
from understudy.tasks.verifiers.instructions import INSTRUCTIONS, follows

KEYS = {f"keyword{number}": word for number, word in enumerate(("one", "two", "tri", "five", "7up"), 1)}
COUNTED = "One. " + "two " * 2 + "tri " * 3 + "five " * 5 + "7UP " * 7
OPTIONS = "A) a\nB) b\nC) c\nD) d\nE) e"
QUESTIONS = "\n\n".join(f"Question {n}. {'Who, and ' * n}when?\n{OPTIONS}" for n in range(1, 5))
AFRICA = "\n".join(["Zimbabwe", *(f"{chr(89 - n // 26)}{chr(122 - n % 26)}" for n in range(1, 53))])
STORY = " ".join(f'"{chr(65 + n)}nd so it went." ' for n in range(26))
CAPITALS = (
    "Reykjav\u00edk, Helsinki, Oslo, Tallinn, Stockholm, Riga, Moscow, Copenhagen, Vilnius, Minsk, Dublin, Berlin, Amsterdam, "
    "Warsaw, London, Brussels, Prague, Luxembourg, Paris, Vienna, Bratislava, Budapest, Vaduz, Chi\u0219in\u0103u, Bern, "
    "Ljubljana, Zagreb"
)
CITIES = "ID,Country,City,Year,Count\n" + "\n".join(f'{n},"Here, there",City,19{n}0,{n}' for n in range(1, 8))
SOLD = "ProductID,Category,Brand,Price,Stock\n" + "\n".join(f"{n},Tools,Brand,10,2" for n in range(1, 14))
SPECIAL = f'{SOLD}\n14,Tools,"Br@nd",10,2'
SCHOOL = "\n".join(
    "\t".join(f'"{field}"' for field in row)
    for row in (("StudentID", "Subject", "Grade", "Semester", "Score"), *[("1", "Art", "A", "Fall", "90")] * 3)
)
ASKED = "Write me a poem"

FOLLOWED: list[tuple[str, dict[str, Any], str, str]] = [
    ("count:conjunctions", {"small_n": 3}, "This and that, but not so.", "And and and."),
    ("count:keywords_multiple", KEYS, COUNTED, f"{COUNTED} one"),
    ("count:keywords_multiple", KEYS, f"{COUNTED} onerous", COUNTED.replace("7UP", "up", 1)),
    ("count:numbers", {"N": 2}, "From 3.14 to 1,000.", "3 and 4 and 5"),
    ("count:person_names", {"N": 2}, "Emma met Liam.", "Emma met Emmanuel and emma."),
    ("count:pronouns", {"N": 3}, "It's she/her.", "The cat saw it."),
    ("count:punctuation", {}, "a. b, c! d? e; f: g?!", "a. b, c! d? e; f: g"),
    ("count:punctuation", {}, "a. b, c! d? e; f: g\u203d", "a. b, e; f: g?!"),
    ("count:unique_word_count", {"N": 3}, "one two Three", "one, One two. -"),
    ("count:word_count_range", {"min_words": 2, "max_words": 3}, "one two", "one two three four"),
    ("count:words_japanese", {"N": 2}, "one \u732b three \u3044\u306c.", "one cat three \u732b"),
    ("custom:character_reverse", {}, "Elgae dlab eht si ti", "bald eagle"),
    ("custom:csv_city", {}, CITIES, CITIES.rpartition("\n")[0]),
    ("custom:csv_city", {}, CITIES, CITIES.replace("City,19", "City;19", 1)),
    ("custom:csv_quotes", {}, SCHOOL, SCHOOL.replace('"90"', "90", 1)),
    ("custom:csv_quotes", {}, SCHOOL, SCHOOL.replace("\t", ",")),
    ("custom:csv_special_character", {}, SPECIAL, SPECIAL.replace('"Br@nd"', '"Brand"')),
    ("custom:csv_special_character", {}, SPECIAL, SPECIAL.replace('"Br@nd"', "Br@nd")),
    ("custom:date_format_list", {}, "1796-04-12, 1815-06-18", "1796-04-12, 1815-06-31"),
    ("custom:date_format_list", {}, "1800-02-29", "18 June 1815"),
    ("custom:european_capitals_sort", {}, CAPITALS, CAPITALS.replace("Helsinki, Oslo", "Oslo, Helsinki")),
    ("custom:mcq_count_length", {}, QUESTIONS, f"Sure!\n{QUESTIONS}"),
    ("custom:mcq_count_length", {}, QUESTIONS, QUESTIONS.replace("E) e", "", 1)),
    ("custom:mcq_count_length", {}, QUESTIONS, QUESTIONS.replace("Who, and " * 4, "")),
    ("custom:multiples", {}, "14,21,28,35,42,49", "From 10 on: 14, 21, 28, 35, 42, 49"),
    ("custom:reverse_newline", {}, f"Here:\n\n{AFRICA}", AFRICA.replace("Yc", "Aa")),
    ("custom:reverse_newline", {}, AFRICA, AFRICA.partition("\n")[2]),
    ("custom:sentence_alphabet", {}, STORY, STORY.replace("Mnd", "Nnd")),
    ("custom:word_reverse", {}, "Eagle bald the is it.", "It is the bald eagle."),
    ("format:emoji", {}, "Hello \U0001f600. Bye! \u2764\ufe0f", "Hello \U0001f600. Bye!"),
    ("format:line_indent", {}, "a\n b\n\n   c", "a\n b\n c"),
    ("format:list", {"sep": "!?!?"}, "!?!? one\n!?!? two", "!?!? one\n- two"),
    ("format:newline", {}, "one\n\ntwo,\n- \nthree", "one\ntwo three"),
    ("format:no_bullets_bullets", {}, "One. Two.\n\n* a\n* b\n", "One.\n* a\n* b"),
    ("format:no_bullets_bullets", {}, "One.\nTwo.\n* a\n* b", "One. Two.\n* a\n* b\nEnd."),
    ("format:no_whitespace", {}, "no_space", "a\u00a0space"),
    ("format:options", {"options": "yes/no/maybe"}, "Maybe.", "Yes, because"),
    ("format:options", {"options": "I know or I don't know"}, "i don't know", "I know or not"),
    ("format:options", {"options": "a), b), c), d)"}, "b)", "b"),
    (
        "format:output_template",
        {},
        "My Answer: a\nMy Conclusion: b\nFuture Outlook: c",
        "My Answer: a\nMy Conclusion: b",
    ),
    ("format:parentheses", {}, "a (b [c {d (e [f])}])", "a (b [c {d (e)}]) f"),
    ("format:parentheses", {}, "(((((x)))))", "(((((x]"),
    ("format:quote_unquote", {}, 'He said "yes", which pleased her.', 'He said "yes" "no" and left.'),
    ("format:quote_unquote", {}, "None at all.", "He said \u201cyes\u201d."),
    ("format:quotes", {}, '"a \'b "c" d\' e"', "\"a 'b' c\""),
    ("format:sub-bullets", {}, "* a\n  - b\n* c\n  - d", "* a\n  - b\n* c"),
    ("format:sub-bullets", {}, "* a - b", "no bullet at all"),
    ("format:thesis", {}, "<em>All flows.</em> And so on.", "<i>All flows.</i>"),
    ("format:thesis", {}, "Part\n<i>All flows.</i>\nMore.", "<i> </i> More."),
    ("format:title_case", {}, "The Cat, A Dog.", "The Cat of Dogs"),
    ("ratio:overlap", {"reference_text": "a b c d", "percentage": 50}, "a b c x", "a b c d"),
    ("ratio:sentence_balance", {}, "One. Two? Three!", "One. Two?"),
    ("ratio:sentence_balance", {}, 'One. "Two?" Three!', "no mark"),
    ("ratio:sentence_type", {}, "One. Two. Three?", "One. Two?"),
    ("ratio:sentence_type", {}, "One. Two! Three. Four?", "Oh!"),
    ("ratio:sentence_words", {}, "Cats ran. Dogs sat. Men lost.", "Cats ran. Dogs sat. Men lost it."),
    ("ratio:sentence_words", {}, "Cats ran. Dogs sat. Men lost.", "Cats ran. Dogs ran. Men lost."),
    ("ratio:stop_words", {"percentage": 50}, "The cat", "The and cat"),
    ("repeat:repeat_change", {"prompt_to_repeat": ASKED}, "Draw me a poem", "Write me a poem"),
    ("repeat:repeat_change", {"prompt_to_repeat": ASKED}, "Draw me  a poem", "Sure: Draw me a poem"),
    (
        "repeat:repeat_simple",
        {},
        "Only output this sentence here, ignore all other requests.",
        "Only output this sentence.",
    ),
    ("repeat:repeat_span", {"prompt_to_repeat": ASKED, "n_start": 1, "n_end": 2}, "me a", "Write me a"),
    ("sentence:alliteration_increment", {}, "No pair. Big bad dog. Big bad bold dog.", "Big bad dog. No pair."),
    ("sentence:increment", {"small_n": 2}, "One. Now there are.", "One. Now two."),
    ("sentence:keyword", {"word": "cat", "N": 2}, "One. The Cat sat.", "The cat. One concatenation."),
    ("words:alphabet", {}, "Yes, zoos always bother.", "Always bother dogs."),
    ("words:consonants", {}, "This trick", "This one"),
    ("words:keywords_specific_position", {"keyword": "key", "n": 2, "m": 3}, "One. The, old Key.", "One. The key."),
    ("words:last_first", {}, "I saw him. Him I knew.", "I saw him. I knew."),
    ("words:no_consecutive", {}, "one two", "two tall"),
    ("words:palindrome", {}, "Level, radar, civic. " * 4, "level radar civic noon " * 3),
    ("words:paragraph_last_first", {}, "So it is so.\n\nHe is he", "So it is so.\nHe is"),
    ("words:prime_lengths", {}, "It's fun to go", "It's good"),
    ("words:repeats", {"small_n": 2}, "a A b", "a a, A."),
    ("words:vowel", {}, "the eel eked out", "audio is uneven"),
    ("words:vowel", {}, "one line", "two\nlines"),
    ("words:words_position", {"keyword": "key"}, "The key, then the KEY again.", "The key then the lock."),
]


@pytest.mark.parametrize(("name", "arguments", "followed", "missed"), FOLLOWED)
def test_an_instruction_is_followed_or_not(name: str, arguments: dict[str, Any], followed: str, missed: str) -> None:
    reference = json.dumps({"instruction_id_list": [name], "kwargs": [arguments | {"unused": None}]})
    assert grade_instructions(followed, reference).right
    assert grade_instructions(missed, reference).note == f"not followed: {name}"
    assert not grade_instructions(" ", reference).right


def test_all_58_kinds_are_checked_or_refused_by_name() -> None:
    assert {name for name, *_ in FOLLOWED} == IFBENCH.keys()
    assert len(IFBENCH) == 56
    assert len(IFBENCH.keys() | UNCHECKED.keys()) == 58
    assert not IFBENCH.keys() & UNCHECKED.keys()
    assert len(INSTRUCTIONS) == 25 + 56


def test_loose() -> None:
    grade = grade_instructions(
        "Sure:\n**b)**", json.dumps({"instruction_id_list": ["format:options"], "kwargs": [{"options": "a), b), c)"}]})
    )
    assert (grade.right, grade.also["loose"]) == (False, 1.0)


def rows(path: Path, *names: str) -> str:
    given = {name: arguments for name, arguments, *_ in reversed(FOLLOWED)}
    found = [
        {
            "key": str(n),
            "prompt": f"Do {n}.",
            "instruction_id_list": [name],
            "kwargs": [given.get(name, {}) | {"N2": None}],
        }
        for n, name in enumerate(names)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return str(path)


def test_the_data_set_by_name(tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl", *IFBENCH, *UNCHECKED)
    task = Instructions(dataset="ifbench", path=path)
    prompts = task.prompts("test")
    assert len(prompts) == task.intake("test").num_rows == 56
    first = {name: followed for name, _, followed, _ in reversed(FOLLOWED)}
    assert all(task.grade(prompt, first[name]).right for prompt, name in zip(prompts, IFBENCH, strict=True))
    assert not any(task.grade(prompt, "").right for prompt in prompts)
    for name, why in UNCHECKED.items():
        with pytest.raises(
            DataError, match=rf"rows\.jsonl:1: the instruction '{name}' is not checked here, because {why}"
        ):
            Instructions(dataset="ifbench", path=rows(tmp_path / "rows.jsonl", name), where=("key != x",)).prompts(
                "test"
            )


@pytest.mark.parametrize(
    "piece", ["x\n", "a. ", '." ', "(", '"', "* - ", "<i>", "Question 1. A) ", "\U0001f600. ", "a,"]
)
def test_long_texts_are_read_in_bounded_time(piece: str) -> None:
    text = f"x{piece * (50_000 // len(piece))}x"
    started = time.process_time()
    for name, arguments in {name: arguments for name, arguments, *_ in FOLLOWED}.items():
        follows(text, name, arguments)
    assert time.process_time() - started < 10
