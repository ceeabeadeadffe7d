"""Instructions that a program can check, of IFBench: "every sentence ends with an emoji", "use only words of prime length".

Source: Pyatkin et al., "Generalizing Verifiable Instruction Following", arXiv 2507.02833. Its names of instructions and their
arguments are read as they stand in the data set `allenai/IFBench_test`, and decided as its checkers do; where one of those
passes a text that lacks what the instruction demands outright (bullet points, a sentence of each type), this one does not.
Sentences and words are told apart by punctuation, where its checkers call NLTK.
"""

from __future__ import annotations

import csv
import io
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from understudy.tasks.verifiers.sentences import bare_words, split_sentences

UNCHECKED: Mapping[str, str] = {
    "words:start_verb": "which words are verbs takes a tagger with a model of its own",
    "words:odd_even_syllables": "counting syllables takes a dictionary of English",
}
"""Kinds of IFBench that are not checked here -> why."""

_EDGES = string.punctuation + " "
_VOWELS, _CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"
_CONJUNCTIONS = {"and", "but", "for", "nor", "or", "so", "yet"}
_STOP_WORDS = (
    "i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it its "
    "itself they them their theirs themselves what which who whom this that these those am is are was were be been being "
    "have has had having do does did doing a an the and but if or because as until while of at by for with about against "
    "between into through during before after above below to from up down in out on off over under again further then once "
    "here there when where why how all any both each few more most other some such no nor not only own same so than too "
    "very s t can will just don should now d ll m o re ve y ain aren couldn didn doesn hadn hasn haven isn ma mightn mustn "
    "needn shan shouldn wasn weren won wouldn"
)
_PRONOUNS = (
    "i me we us you he him she her it they them my mine our ours your yours his hers its their theirs myself ourselves "
    "yourself yourselves himself herself itself themselves this that these those who whom whose which what whoever whomever "
    "whatever whichever anybody anyone anything everybody everyone everything nobody nothing somebody someone something "
    "each either neither both all some any none"
)
_NAMES = (
    "Emma Liam Sophia Jackson Olivia Noah Ava Lucas Isabella Mason Mia Ethan Charlotte Alexander Amelia Benjamin Harper Leo "
    "Zoe Daniel Chloe Samuel Lily Matthew Grace Owen Abigail Gabriel Ella Jacob Scarlett Nathan Victoria Elijah Layla "
    "Nicholas Audrey David Hannah Christopher Penelope Thomas Nora Andrew Aria Joseph Claire Ryan Stella Jonathan"
)
_CAPITALS = (
    "Reykjavik Helsinki Oslo Tallinn Stockholm Riga Moscow Copenhagen Vilnius Minsk Dublin Berlin Amsterdam Warsaw London "
    "Brussels Prague Luxembourg Paris Vienna Bratislava Budapest Vaduz Chisinau Bern Ljubljana Zagreb"
)
_PRIMES = {number for number in range(2, 100) if all(number % factor for factor in range(2, number))}
_EMOJI = re.compile(
    "[\u00a9\u00ae\u203c\u2049\u2122\u2139\u2190-\u21ff\u2300-\u27bf\u2900-\u2bff\u3030\u303d\u20e3\U0001f000-\U0001faff]"
)
_JAPANESE = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")
_MONTH_DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def _tokens(text: str) -> list[str]:
    """Words and marks, "don't" one word."""
    return re.findall(r"\w+(?:['\u2019-]\w+)*|[^\w\s]", text)


def _words(text: str) -> list[str]:
    return [token for token in _tokens(text) if any(letter.isalnum() for letter in token)]


def _whole(word: str, text: str) -> int:
    """How often a word occurs in the text as a whole word, in any letter case."""
    return len(re.findall(rf"\b{re.escape(word.strip())}\b", text, re.IGNORECASE))


def _ascii(text: str) -> str:
    """The text with its letters' accents taken off, and without letters that ASCII does not have."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")


def _ends(text: str) -> Counter[str]:
    """How many sentences end with each mark."""
    return Counter(sentence.rstrip("\"')]")[-1:] for sentence in split_sentences(text))


def _growing(values: Sequence[int]) -> bool:
    return all(before < after for before, after in pairwise(values))


# counts and shares


def _stop_words(text: str, percentage: float) -> bool:
    words, stop_words = re.findall(r"\w+", text.lower()), {*_STOP_WORDS.split()}
    return bool(words) and 100 * sum(word in stop_words for word in words) <= percentage * len(words)


def _pronouns(text: str, N: int) -> bool:
    known = {*_PRONOUNS.split()}
    return sum(word in known for word in re.findall(r"[a-z]+", text.lower())) >= N


def _sentence_type(text: str) -> bool:
    ends = _ends(text)
    return ends["."] == 2 * ends["?"] > 0


def _sentence_balance(text: str) -> bool:
    ends = _ends(text)
    return ends["."] == ends["?"] == ends["!"] > 0


def _overlap(text: str, reference_text: str, percentage: float) -> bool:
    """The share of the text's trigrams that the reference has, within 2 points."""
    (found, known) = (
        set(zip(tokens, tokens[1:], tokens[2:], strict=False)) for tokens in (_tokens(text), _tokens(reference_text))
    )
    return bool(found) and abs(100 * len(found & known) / len(found) - percentage) <= 2


def _every_mark(text: str) -> bool:
    """All of . , ! ? ; : beside an interrobang."""
    mark = next((mark for mark in ("?!", "!?", "\u203d") if mark in text), None)
    return mark is not None and set(".,!?;:") <= set(text.replace(mark, "", 1))


def _keywords(text: str, **keywords: str) -> bool:
    wanted = zip((1, 2, 3, 5, 7), (keywords[f"keyword{number}"] for number in range(1, 6)), strict=True)
    return all(_whole(word, text) == times for times, word in wanted)


def _japanese(text: str, N: int) -> bool:
    words = [word.strip(_EDGES) for word in text.split()][int(N) - 1 :: int(N)]
    return all(_JAPANESE.search(word) for word in words if word and not word.isdigit())


# words


def _alphabet(text: str) -> bool:
    letters = [word[0] for word in bare_words(text)]
    if not letters or letters[0] not in string.ascii_lowercase:
        return False
    start = ord(letters[0]) - ord("a")
    return all(letter == string.ascii_lowercase[(start + place) % 26] for place, letter in enumerate(letters))


def _three_vowels(text: str) -> bool:
    return "\n" not in text.strip() and len(set(text.lower()) & set(_VOWELS)) <= 3


def _consonants(text: str) -> bool:
    return all(re.search(f"[{_CONSONANTS}]{{2}}", word) for word in text.lower().split())


def _palindromes(text: str) -> bool:
    return sum(len(word) >= 5 and word == word[::-1] for word in bare_words(text)) >= 10


def _last_first(text: str) -> bool:
    """The last word of each sentence is the first of the next."""
    sentences = [sentence.lower().strip(_EDGES).split() for sentence in split_sentences(text)]
    pairs = pairwise(sentences)
    return all(before and after and before[-1] == after[0] for before, after in pairs)


def _paragraphs_end_as_they_begin(text: str) -> bool:
    paragraphs = [line.lower().strip(_EDGES).split() for line in text.split("\n")]
    return all(words[0] == words[-1] for words in paragraphs if words)


def _no_letter_twice(text: str) -> bool:
    letters = [word[0] for word in bare_words(text)]
    return all(before != after for before, after in pairwise(letters))


def _at_place(text: str, keyword: str, n: int, m: int) -> bool:
    sentences = split_sentences(text)
    words = _words(sentences[int(n) - 1]) if len(sentences) >= n else []
    return len(words) >= m and words[int(m) - 1].lower() == keyword.strip().lower()


def _second_and_second_last(text: str, keyword: str) -> bool:
    words = [word.lower() for word in _words(text)]
    return len(words) > 1 and words[1] == words[-2] == keyword.strip().lower()


# sentences


def _alliteration(text: str) -> bool:
    """More words beside one of the same first letter in each sentence than in the one before."""
    found = []
    for sentence in split_sentences(text):
        letters = [bare[0] for word in sentence.lower().split() if (bare := word.lstrip(_EDGES))]
        alike = [before == after for before, after in pairwise(letters)]
        # a run of n pairs is one of n + 1 words
        found.append(sum(alike) + sum(pair and not before for before, pair in pairwise([False, *alike])))
    return _growing(found)


def _increment(text: str, small_n: int) -> bool:
    counts = [len(bare_words(sentence)) for sentence in split_sentences(text)]
    return all(after == before + small_n for before, after in pairwise(counts))


def _in_sentence(text: str, word: str, N: int) -> bool:
    sentences = split_sentences(text)
    return len(sentences) >= N and _whole(word, sentences[int(N) - 1]) > 0


def _three_alike(text: str) -> bool:
    """Three sentences of as many characters, in which no word stands twice."""
    sentences, words = split_sentences(text), bare_words(text)
    return len(sentences) == 3 and len(set(map(len, sentences))) == 1 and len(set(words)) == len(words)


def _story_of_26(text: str) -> bool:
    begins = [sentence.lstrip(string.punctuation + string.whitespace)[:1].lower() for sentence in split_sentences(text)]
    return begins == [*string.ascii_lowercase]


# formats


def _nested_brackets(text: str) -> bool:
    """A bracket that is closed at least five levels deep."""
    pairs, levels = {")": "(", "]": "[", "}": "{"}, list[str]()
    for letter in text:
        if letter in "([{":
            levels.append(letter)
        elif letter in pairs:
            if not levels or levels[-1] != pairs[letter]:
                levels = []
                continue
            if len(levels) >= 5:
                return True
            levels.pop()
    return False


def _nested_quotes(text: str) -> bool:
    """Double and single quotes in each other, three levels of which are closed."""
    levels, deepest = list[str](), 0
    for letter in text:
        if levels and letter == levels[-1]:
            levels.pop()
            if deepest - len(levels) >= 3:
                return True
        elif letter in "\"'":
            levels.append(letter)
            deepest = max(deepest, len(levels))
    return False


def _one_option(text: str, options: str) -> bool:
    """Letters have to be spelled as they are; other options may have other capitals, and marks around them."""
    separator = "/" if "/" in options else r"\bor\b" if re.search(r"\bor\b", options) else ","
    known = [option.strip() for option in re.split(separator, options)]
    if re.match(r"\W*[aA]\W*[bB]\W*[cC]\W*", options):
        return text in known
    return text.strip(_EDGES).lower() in [option.strip(_EDGES).lower() for option in known]


def _words_on_lines(text: str) -> bool:
    return all(len(bare_words(line)) < 2 for line in text.split("\n"))


def _emoji_at_ends(text: str) -> bool:
    """Each sentence ends with an emoji, or the next begins with it: it may stand in front of the mark or behind it."""
    sentences = ["".join(letter for letter in part if letter not in _EDGES) for part in split_sentences(text)]
    following = [*sentences[1:], ""]
    # the last character may be a selector of a variant
    return all(
        part and (_EMOJI.search(part[-2:]) or _EMOJI.match(after))
        for part, after in zip(sentences, following, strict=True)
    )


def _stairs(text: str) -> bool:
    lines = [line for line in text.split("\n") if line.strip()]
    return _growing([len(line) - len(line.lstrip(" ")) for line in lines])


def _quotes_explained(text: str) -> bool:
    """No quote begins right after another, and none ends the text."""
    joined = "".join(re.sub("[\u201c\u201d]", '"', text).replace("'\"'", "").split())
    others = string.digits + string.punctuation.replace('"', "")
    return '""' not in joined and not joined.strip(others).endswith('"')


def _thesis(text: str) -> bool:
    """A statement in italics of HTML, and more behind it."""
    begin = next((place + len(tag) for tag in ("<i>", "<em>") if (place := text.find(tag)) >= 0), None)
    if begin is None:
        return False
    ends = [(place, tag) for tag in ("</i>", "</em>") if (place := text.find(tag, begin)) >= 0]
    return bool(ends) and bool(text[begin : ends[0][0]].strip()) and bool(text[ends[0][0] + len(ends[0][1]) :].strip())


def _sub_bullets(text: str) -> bool:
    _, *bullets = text.split("*")
    return bool(bullets) and all("-" in bullet for bullet in bullets)


def _sentences_then_bullets(text: str) -> bool:
    """At least two sentences, then at least two lines with * in front, and nothing behind them."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    said = next((place for place, line in enumerate(lines) if line.startswith("*")), len(lines))
    bullets = lines[said:]
    return (
        sum(len(split_sentences(line)) for line in lines[:said]) >= 2
        and len(bullets) >= 2
        and all(line.startswith("*") for line in bullets)
    )


def _title_case(text: str) -> bool:
    """No word begins with a small letter and goes on in letters of one case."""
    words = [word for word in _words(text) if word[0].isalpha()]
    return not any(word[0].islower() and (len(word) == 1 or word[1:].islower() or word[1:].isupper()) for word in words)


# one request each


def _four_questions(text: str) -> bool:
    """Four questions with five options each, each longer than the one before, and nothing in front of them."""
    if not text.startswith("Question"):
        return False
    questions = [part.strip() for part in re.split(r"Question \d+[.|):;]?\s*", text) if part.strip()]
    lengths = []
    for question in questions:
        lines = [line.strip() for line in question.split("\n")]
        options = [place for place, line in enumerate(lines) if re.match(r"[A-Ea-e][.|)]\s*\w", line)]
        if len(options) != 5:
            return False
        lengths.append(len(" ".join(lines[: options[0]]).strip()))
    return len(questions) == 4 and _growing(lengths)


def _africa(text: str) -> bool:
    """From Zimbabwe on at least 52 lines, each behind the next in the alphabet."""
    lines = [bare for line in text.split("\n") if (bare := line.strip(_EDGES))]
    start = next((place for place, line in enumerate(lines) if "Zimbabwe" in line), len(lines))
    found = list(map(_ascii, lines[start:]))
    return len(found) >= 52 and found == sorted(found, reverse=True)


def _table(text: str, names: Sequence[str], num_rows: int, delimiter: str = ",") -> list[list[str]]:
    """The rows of a table without its header, quotes included in their fields; empty where it has another form."""
    # tripled quotes stand for themselves
    try:
        header, *rows = csv.reader(io.StringIO(text.replace('"', '"""')), delimiter=delimiter)
    except (csv.Error, ValueError):
        return []
    named = [field.strip(" \t\r").strip('"') for field in header] == [*names]
    return rows if named and len(rows) == num_rows and all(len(row) == len(names) for row in rows) else []


def _city_table(text: str) -> bool:
    names = ["ID", "Country", "City", "Year", "Count"]
    try:
        rows = list(csv.reader(io.StringIO(text)))
    except csv.Error:
        return False
    return len(rows) == 8 and rows[0] == names and all(len(row) == 5 for row in rows)


def _special_table(text: str) -> bool:
    rows = _table(text, ("ProductID", "Category", "Brand", "Price", "Stock"), 14)
    fields = [field for row in rows for field in row]
    return any(field[:1] == field[-1:] == '"' and re.search(r"[^\w\s]", field[1:-1]) for field in fields)


def _quoted_table(text: str) -> bool:
    rows = _table(text, ("StudentID", "Subject", "Grade", "Semester", "Score"), 3, "\t")
    # the header's as well
    fields = [field.strip() for row in [text.split("\n", 1)[0].split("\t"), *rows] for field in row]
    return bool(rows) and all(len(field) > 1 and field[0] == field[-1] == '"' for field in fields)


def _napoleon(text: str) -> bool:
    """Dates YYYY-MM-DD from 1769 to 1821 with commas between them."""
    for date in text.split(","):
        match = re.fullmatch(r"([0-9]{4})-([0-9]{2})-([0-9]{2})", date.strip())
        if match is None:
            return False
        year, month, day = map(int, match.groups())
        if not (1769 <= year <= 1821 and 1 <= month <= 12 and 1 <= day <= _MONTH_DAYS[month - 1]):
            return False
    return True


def _span(text: str, prompt_to_repeat: str, n_start: int, n_end: int) -> bool:
    wanted = " ".join(prompt_to_repeat.split()[int(n_start) : int(n_end) + 1])
    return text.strip().lower() == wanted.lower()


IFBENCH: Mapping[str, Callable[..., bool]] = {
    "count:conjunctions": lambda text, small_n: (
        len({word.strip(_EDGES).lower() for word in text.split()} & _CONJUNCTIONS) >= small_n
    ),
    "count:keywords_multiple": _keywords,
    "count:numbers": lambda text, N: len(re.findall(r"\d+", " ".join(bare_words(text)))) == N,
    "count:person_names": lambda text, N: (
        sum(re.search(rf"\b{name}\b", text) is not None for name in _NAMES.split()) >= N
    ),
    "count:pronouns": _pronouns,
    "count:punctuation": _every_mark,
    "count:unique_word_count": lambda text, N: len({word.strip(_EDGES) for word in text.lower().split()} - {""}) >= N,
    "count:word_count_range": lambda text, min_words, max_words: (
        min_words <= len(re.findall(r"\w+", text)) <= max_words
    ),
    "count:words_japanese": _japanese,
    "custom:character_reverse": lambda text: "elgae dlab" in text.lower(),
    "custom:csv_city": _city_table,
    "custom:csv_quotes": _quoted_table,
    "custom:csv_special_character": _special_table,
    "custom:date_format_list": _napoleon,
    "custom:european_capitals_sort": lambda text: (
        [capital.strip() for capital in _ascii(text).split(",") if capital.strip()] == _CAPITALS.split()
    ),
    "custom:mcq_count_length": _four_questions,
    "custom:multiples": lambda text: re.findall(r"[0-9]+", text) == [str(number) for number in range(14, 50, 7)],
    "custom:reverse_newline": _africa,
    "custom:sentence_alphabet": _story_of_26,
    "custom:word_reverse": lambda text: "bald eagle" in " ".join(bare_words(text)[::-1]),
    "format:emoji": _emoji_at_ends,
    "format:line_indent": _stairs,
    "format:list": lambda text, sep: text.count(sep) >= 2,
    "format:newline": _words_on_lines,
    "format:no_bullets_bullets": _sentences_then_bullets,
    "format:no_whitespace": lambda text: re.search(r"\s", text) is None,
    "format:options": _one_option,
    "format:output_template": lambda text: all(
        label in text for label in ("My Answer:", "My Conclusion:", "Future Outlook:")
    ),
    "format:parentheses": _nested_brackets,
    "format:quote_unquote": _quotes_explained,
    "format:quotes": _nested_quotes,
    "format:sub-bullets": _sub_bullets,
    "format:thesis": _thesis,
    "format:title_case": _title_case,
    "ratio:overlap": _overlap,
    "ratio:sentence_balance": _sentence_balance,
    "ratio:sentence_type": _sentence_type,
    "ratio:sentence_words": _three_alike,
    "ratio:stop_words": _stop_words,
    "repeat:repeat_change": lambda text, prompt_to_repeat: (
        text != prompt_to_repeat and text.split()[1:] == prompt_to_repeat.split()[1:]
    ),
    "repeat:repeat_simple": lambda text: (
        text.strip().lower() == "only output this sentence here, ignore all other requests."
    ),
    "repeat:repeat_span": _span,
    "sentence:alliteration_increment": _alliteration,
    "sentence:increment": _increment,
    "sentence:keyword": _in_sentence,
    "words:alphabet": _alphabet,
    "words:consonants": _consonants,
    "words:keywords_specific_position": _at_place,
    "words:last_first": _last_first,
    "words:no_consecutive": _no_letter_twice,
    "words:palindrome": _palindromes,
    "words:paragraph_last_first": _paragraphs_end_as_they_begin,
    "words:prime_lengths": lambda text: all(len(word) in _PRIMES for word in bare_words(text)),
    "words:repeats": lambda text, small_n: all(times <= small_n for times in Counter(bare_words(text)).values()),
    "words:vowel": _three_vowels,
    "words:words_position": _second_and_second_last,
}
"""The name of an instruction -> whether a text follows it, given the arguments."""
