"""Instructions that a program can check, of IFEval: "no commas", "at least three bullet points", "answer in JSON".

Source: Zhou et al., "Instruction-Following Evaluation for Large Language Models", arXiv 2311.07911. Its names of instructions
and their arguments are read as they stand in the data set `google/IFEval`. Where its checkers call libraries, these do not:
sentences and words are told apart by punctuation, so that a count may differ by one at an abbreviation, and the language of a
response (`language:response_language`) is not checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from understudy.tasks.verifiers.references import several
from understudy.types import Grade

_CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_ORDINARY_MARKERS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}


def _compared(number: int, relation: str, bound: int) -> bool:
    """Raises ValueError for a relation that IFEval does not have."""
    if relation not in ("at least", "less than"):
        raise ValueError(f"the relation is {relation!r}; it must be 'at least' or 'less than'")
    return number >= bound if relation == "at least" else number < bound


def _sentences(text: str) -> int:
    return len([part for part in re.split(r"(?<=[.!?])[\"')\]]*\s+", text.strip()) if re.search(r"\w", part)])


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
    bare = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


def _two_responses(text: str) -> bool:
    parts = text.split("******")
    inner = [part.strip() for index, part in enumerate(parts) if part.strip() or 0 < index < len(parts) - 1]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


INSTRUCTIONS: Mapping[str, Callable[..., bool]] = {
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
        len(re.findall(r"\[.*?\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": lambda text: any(choice in text for choice in _CHOICES),
    "detectable_format:json_format": _is_json,
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections: (
        len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections
    ),
    "detectable_format:number_bullet_lists": lambda text, num_bullets: (
        len(re.findall(r"^\s*(?:\*[^*]|-).*$", text, re.MULTILINE)) == num_bullets
    ),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: _highlights(text) >= num_highlights,
    "detectable_format:title": lambda text: any(title.strip() for title in re.findall(r"<<([^\n]+)>>", text)),
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
"""The name of an instruction -> whether a text follows it, given the arguments."""


@several
def grade_instructions(text: str, reference: str) -> Grade:
    """1.0 where every instruction is followed. The reference is JSON: `{"instruction_id_list": [...], "kwargs": [...]}`.

    Arguments that are null, as columnar files have them, are left out. Raises ValueError for an instruction that is not in
    `INSTRUCTIONS`, and for arguments that it does not take.
    """
    asked = json.loads(reference)
    missed = []
    for name, given in zip(asked["instruction_id_list"], asked["kwargs"], strict=True):
        if name not in INSTRUCTIONS:
            raise ValueError(f"the instruction {name!r} cannot be checked; known: {', '.join(INSTRUCTIONS)}")
        arguments: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        try:
            followed = bool(text.strip()) and INSTRUCTIONS[name](text, **arguments)
        except TypeError as error:
            raise ValueError(f"the instruction {name!r} does not take {sorted(arguments)}: {error}") from error
        if not followed:
            missed.append(name)
    if not missed:
        return Grade(1.0)
    return Grade(0.0, note=f"not followed: {', '.join(missed)}")
