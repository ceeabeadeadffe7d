"""Instructions that a program can check: those of IFEval ("no commas", "answer in JSON"), and of IFBench beside them.

Source: Zhou et al., "Instruction-Following Evaluation for Large Language Models", arXiv 2311.07911. Its names of instructions
and their arguments are read as they stand in the data set `google/IFEval`. Sentences and words are told apart by punctuation,
where its checkers call NLTK, so that a count may differ by one at an unusual abbreviation. The language of a response is
told by langdetect, as there, with a fixed seed; text in capital or small letters may be of any language.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from threading import Lock
from typing import Any

from understudy.errors import RecipeError
from understudy.tasks.verifiers.ifbench import IFBENCH
from understudy.tasks.verifiers.math import without_thoughts
from understudy.tasks.verifiers.references import several
from understudy.tasks.verifiers.sentences import split_sentences
from understudy.types import Grade

_CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_ORDINARY_MARKERS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}


def _compared(number: int, relation: str, bound: int) -> bool:
    """Raises ValueError for a relation that IFEval does not have."""
    if relation not in ("at least", "less than"):
        raise ValueError(f"the relation is {relation!r}; it must be 'at least' or 'less than'")
    return number >= bound if relation == "at least" else number < bound


def _sentences(text: str) -> int:
    return sum(re.search(r"\w", sentence) is not None for sentence in split_sentences(text))


def _bracketed(text: str, opening: str, closing: str) -> Iterator[str]:
    """The contents of brackets that close on their own line, each from its first opening on."""
    for line in text.splitlines():
        start = line.find(opening)
        while start >= 0 and (end := line.find(closing, start + len(opening))) >= 0:
            yield line[start + len(opening) : end]
            start = line.find(opening, end + len(closing))


_detecting = Lock()


def is_of_language(text: str, language: str) -> bool:
    """Whether langdetect finds the text to be of that language (ISO 639-1, "zh-cn"); text without letters is of none.

    Raises RecipeError where the package is missing.
    """
    check_detector()
    from langdetect import DetectorFactory, LangDetectException, detect

    with _detecting:
        # it draws at random, and loads its tables at the first call
        DetectorFactory.seed = 0
        try:
            return bool(detect(text) == language)
        except LangDetectException:
            return False


def check_detector() -> None:
    """Raises RecipeError where langdetect is not installed."""
    if find_spec("langdetect") is None:
        raise RecipeError(
            "the instruction 'language:response_language' needs the package langdetect; run: "
            "pip install 'understudy[instructions]'"
        )


def _found(word: str, text: str) -> int:
    return len(re.findall(re.escape(word), text, re.IGNORECASE))


def _highlights(text: str) -> int:
    single = [part for part in re.findall(r"\*[^\n*]*\*", text) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*[^\n*]*\*\*", text) if part.strip("*").strip()]
    return len(single) + len(double)


def _starred_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs with *** between them; an empty one may stand at either end."""
    first, *middle = re.split(r"\s?\*\*\*\s?", text)
    last = [middle.pop()] if middle else []
    outer = sum(bool(part.strip()) for part in (first, *last))
    return all(part.strip() for part in middle) and outer + len(middle) == num_paragraphs


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    if len(paragraphs) != num_paragraphs or not 0 < nth_paragraph <= len(paragraphs):
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'\"")
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def _postscript(text: str, postscript_marker: str) -> bool:
    marker = _ORDINARY_MARKERS.get(postscript_marker, re.escape(postscript_marker.lower()))
    return re.search(marker, text.lower()) is not None


def _is_json(text: str) -> bool:
    bare = re.sub(r"^```(?:json)?", "", text.strip(), flags=re.IGNORECASE).removesuffix("```")
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


def _two_responses(text: str) -> bool:
    parts = text.split("******")
    inner = [part.strip() for index, part in enumerate(parts) if part.strip() or 0 < index < len(parts) - 1]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


IFEVAL: Mapping[str, Callable[..., bool]] = {
    "change_case:capital_word_frequency": lambda text, capital_frequency, capital_relation: _compared(
        sum(word.isupper() for word in re.findall(r"[\w'-]+", text)), capital_relation, capital_frequency
    ),
    "change_case:english_capital": lambda text: text.isupper(),
    "change_case:english_lowercase": lambda text: text.islower(),
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "combination:two_responses": _two_responses,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        sum(1 for _ in _bracketed(text, "[", "]")) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": lambda text: any(choice in text for choice in _CHOICES),
    "detectable_format:json_format": _is_json,
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections: (
        len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections
    ),
    "detectable_format:number_bullet_lists": lambda text, num_bullets: (
        len(re.findall(r"^[^\S\n]*(?:\*[^*]|-).*$", text, re.MULTILINE)) == num_bullets
    ),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: _highlights(text) >= num_highlights,
    "detectable_format:title": lambda text: any(map(str.strip, _bracketed(text, "<<", ">>"))),
    "keywords:existence": lambda text, keywords: all(_found(word, text) for word in keywords),
    "keywords:forbidden_words": lambda text, forbidden_words: (
        not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)
    ),
    "keywords:frequency": lambda text, keyword, frequency, relation: _compared(
        _found(keyword, text), relation, frequency
    ),
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation: _compared(
        text.lower().count(letter.lower()), let_relation, let_frequency
    ),
    "language:response_language": is_of_language,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "length_constraints:number_paragraphs": _starred_paragraphs,
    "length_constraints:number_sentences": lambda text, num_sentences, relation: _compared(
        _sentences(text), relation, num_sentences
    ),
    "length_constraints:number_words": lambda text, num_words, relation: _compared(
        len(re.findall(r"\w+", text)), relation, num_words
    ),
    "punctuation:no_comma": lambda text: "," not in text,
    "startend:end_checker": lambda text, end_phrase: (
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": lambda text: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
}
INSTRUCTIONS: Mapping[str, Callable[..., bool]] = {**IFEVAL, **IFBENCH}
"""The name of an instruction -> whether a text follows it, given the arguments."""


def _loosened(text: str) -> list[str]:
    """The text, and without its first line, its last line and both; each with and without asterisks."""
    lines = text.split("\n")
    parts = [lines, lines[1:], lines[:-1], lines[1:-1]]
    cut = ["\n".join(part).strip() for part in parts]
    return list(dict.fromkeys([text, *cut, *(part.replace("*", "") for part in [text, *cut])]))


def follows(text: str, name: str, given: Mapping[str, Any]) -> bool:
    """Whether a text follows an instruction; an empty one follows none. Arguments that are null are left out.

    Raises ValueError for an instruction that is not in `INSTRUCTIONS`, and for arguments that it does not take.
    """
    if name not in INSTRUCTIONS:
        raise ValueError(f"the instruction {name!r} cannot be checked; known: {', '.join(INSTRUCTIONS)}")
    arguments: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    try:
        return bool(text.strip()) and INSTRUCTIONS[name](text, **arguments)
    except TypeError as error:
        raise ValueError(f"the instruction {name!r} does not take {sorted(arguments)}: {error}") from error


@several
def grade_instructions(text: str, reference: str) -> Grade:
    """1.0 where every instruction is followed. The reference is JSON: `{"instruction_id_list": [...], "kwargs": [...]}`.

    `also` has `loose`, whether each is followed by some loosened form of the text, and by instruction, so many of so many,
    `instructions` and `instructions_loose`. Thoughts, `<think>` to `</think>`, are not read. Raises as `follows`.
    """
    asked = json.loads(reference)
    text = without_thoughts(text)
    pairs = list(zip(asked["instruction_id_list"], asked["kwargs"], strict=True))
    strict = [follows(text, name, given) for name, given in pairs]
    loose = [
        found or any(follows(form, name, given) for form in _loosened(text))
        for found, (name, given) in zip(strict, pairs, strict=True)
    ]
    also: dict[str, float | tuple[int, int]] = {
        "loose": float(all(loose)),
        "instructions": (sum(strict), len(pairs)),
        "instructions_loose": (sum(loose), len(pairs)),
    }
    missed = [name for found, (name, _) in zip(strict, pairs, strict=True) if not found]
    return Grade(float(not missed), note=f"not followed: {', '.join(missed)}" if missed else "", also=also)
