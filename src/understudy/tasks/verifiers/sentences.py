"""Sentences and words of a text, told apart by punctuation."""

from __future__ import annotations

import re
import string

_ABBREVIATION = re.compile(
    r"(?:^|[^\w.])(?:(?i:mr|mrs|ms|dr|prof|sr|jr|st|vs|fig|approx|e\.g|i\.e)|[A-HJ-Z])\.[\"')\]]*$"
)
"""An end that is none of a sentence: "Dr.", "e.g.", the initial of a name."""
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def split_sentences(text: str) -> list[str]:
    """The sentences, each with the marks and quotes at its end; what has no letter and no digit, as an emoji, is one too."""
    parts = re.split(r"(?<=[.!?])([\"')\]]*)\s+", text.strip())
    ends = [*parts[1::2], ""]
    found, is_open = list[str](), False
    for part in (said + end for said, end in zip(parts[::2], ends, strict=True)):
        if is_open:
            found[-1] = f"{found[-1]} {part}"
        elif part:
            found.append(part)
        is_open = _ABBREVIATION.search(part[-12:]) is not None
    return found


def bare_words(text: str) -> list[str]:
    """The words between white space, in small letters and without any punctuation of ASCII."""
    return text.lower().translate(_PUNCTUATION).split()
