r"""How answers are written: one spelling for each, their units, and what an answer holds that the reference lacks.

math-verify judges mathematics. It passes over what it does not know (the base of `52_8`, a unit) and takes a word for a
product of its letters, so `objection` first reads an answer to its last character: what is not known here is refused.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from itertools import pairwise
from string import ascii_lowercase


def _radians(match: re.Match[str]) -> str:
    return f"{match[1]}(\\frac{{{match[2] or match[3] or match[4]}\\pi}}{{180}})"


def _table(text: str) -> dict[str, str]:
    """Every word of each part -> the first word of the part."""
    return {word: part.split()[0] for part in text.split(",") for word in part.split()}


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SYMBOLS = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-"),
    **dict.fromkeys("\u2044\u2215\u00f7", "/"),
    **dict.fromkeys("\u2018\u2019", "'"),
    **dict.fromkeys("\u201c\u201d", '"'),
    "\u2236": ":",
    "\u2261": r"\equiv ",
    "\u00d7": r"\times ",
    "\u00b7": r"\cdot ",
    "\u22c5": r"\cdot ",
    "\u00b1": r"\pm ",
    "\u221a": r"\sqrt ",
    "\u221e": r"\infty ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2208": r"\in ",
    "\u2205": r"\emptyset ",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u2260": r"\ne ",
    "\u2248": r"\approx ",
    "\u00a2": " cents",
}
_POWERS_OF_TEN = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_IN_BRACES = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
_SPELLINGS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    # around a whole answer only: in a part of one they may hide something
    (rf"^ ?\\(?:underline|(?:text)?color(?:box)? ?(?:\[\w+\])?\{{[\w.,]+\}}) ?{_IN_BRACES} ?$", r"\1"),
    (r"^ ?\{? ?\\color ?\{\w+\} ?([^{}\\ ][^{}\\]*?)\}? ?$", r"\1"),
    (r"\\(?:left|right|[bB]igg?[lrm]?|(?:display|text)style|[lL]arge|LARGE|[hH]uge|small|normalsize)(?![a-zA-Z.])", ""),
    (r",\s*\\!\s*|\{,\}", ","),
    (r"(?<!\\)\\!", ""),
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|(?<=\S)~|\s+", " "),
    (r"\\(?:text[a-z]*|mbox|math(?:rm|bf|it|sf)|boldsymbol|bm|pmb|operatorname)\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r" \1"),
    (r"\\(?:rm|bf|it|sf)(?![a-zA-Z])", ""),
    (r"\\(?:[dtcs]|nice)frac(?![a-zA-Z])", r"\\frac"),
    (r"\\frac ?(\d) (?=\d)", r"\\frac{\1}"),
    (r"\\sqrt ?(\[\w+\]) ?(\w)", r"\\sqrt\1{\2}"),
    (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
    (r"([\^_] ?)\{([^{}]+\\over(?![a-zA-Z])[^{}]+)\}", r"\1{{\2}}"),
    (r"(?:(?<!\\)\{|^)([^{}]+)\\over(?![a-zA-Z])([^{}]+)(?:\}|$)", r"\\frac{\1}{\2}"),
    (r"(?:(?<!\\)\{|^)([^{}]+)\\choose(?![a-zA-Z])([^{}]+)(?:\}|$)", r"\\binom{\1}{\2}"),
    (r"\\[lr]?vert(?![a-zA-Z])", "|"),
    (r"\\[lr]brace(?![a-zA-Z])", lambda match: r"\{" if match[0][1] == "l" else r"\}"),
    (r"\\([gl])t(?![a-zA-Z])", lambda match: ">" if match[1] == "g" else "<"),
    (r"(\.\d*?)(\d{1,3}?)\2{2,} ?(?:\.{3}|\\[lc]?dots(?![a-zA-Z]))", r"\1\\overline{\2}"),
    (r"\\(?:lor|vee)(?![a-zA-Z])", " or "),
    (r"\\&", " and "),
    (r"\\bigcup(?![a-zA-Z])|(?<=[)\]]) ?U ?(?=[(\[])", r"\\cup "),
    (r"\\pmod ?(\w+)|\( ?\\?b?mod ?(\w+) ?\)", r"\\pmod{\1\2}"),
    (r"(?<!\\)\{\} ?(?=\^)", ""),
    (r"(?<=\\\\) ?\[\d+(?:pt|ex|em|mm)\]", ""),
    (r"\\(le|ge)(?:q|qslant)(?![a-zA-Z])", r"\\\1 "),
    (r"\\neq(?![a-zA-Z])", r"\\ne "),
    (r"\\varnothing", r"\\emptyset"),
    (r"\\mathbb ([A-Z])|\\(R)(?![a-zA-Z])", r"\\mathbb{\1\2}"),
    (r"(?i)^ ?all real numbers\.?$", r"\\mathbb{R}"),
    (r"(?i)^ ?(?:no solutions?|(?:the )?empty set)\.?$", r"\\emptyset"),
    (r"(?i)(?<![\\a-zA-Z])per cent(?![a-zA-Z])", "percent"),
    (r"(?i)(?<![\\a-zA-Z])per mill?e?(?![a-zA-Z])", "permille"),
    (r"(?i)^ ?(?:the )?(?:final |correct )?answer(?: is ?:?| ?:) *(?=\S)", ""),
    (r"^ *(?:negative|minus) +(?=[\d\\(])", "-"),
    (r"(?<=[\dA-F)]) *base *(\d\d?|[a-z]+)(?![a-zA-Z])", r"_{\1}"),
    (r"\^\s*(?:\\(?:circ|degree)(?![a-zA-Z])|\{\s*\\(?:circ|degree)\s*\})|\\degree(?![a-zA-Z])", "\u00b0"),
    (r"\\log ?_ ?(?:e(?![a-zA-Z])|\{ ?e ?\})", r"\\ln "),
    (r"((?:begin|end) ?\{[pbBvV]?)small(?=matrix\})", r"\1"),
    (r"(?<![\w.\\])0(?:[xX][\da-fA-F]+|[bB][01]+|[oO][0-7]+)(?!\w)", lambda match: str(int(match[0], 0))),
    # ]2,5] as the French write (2,5]
    (r"(?:^|(?<=\\c[au]p )|(?<=\\in )) ?\]([^][()]*[,;][^][()]*)(?=[][])", r"(\1"),
    (r"([(\[][^][()]*[,;][^][(),;]*[^][(),; ] ?)\[(?= ?(?:$|\\c[au]p))", r"\1)"),
    (r"(?<![\d.:])([01]?\d|2[0-3]) ?h ?([0-5]\d)(?![\d.:]| ?[ms])", r"\1:\2"),
    (r"\\([$%])", r"\1"),
    (r"(?<![\\a-zA-Z])inf(?:inity|ty)?(?![a-zA-Z])", r"\\infty "),
    (r"(?<![\\a-zA-Z])(sqrt|pi|theta|alpha|beta|gamma|sin|cos|tan|arcsin|arccos|arctan|log|ln)(?![a-zA-Z])", r"\\\1 "),
    (
        r"(\\(?:sin|cos|tan|cot|sec|csc)(?: ?\^ ?\{?\d\}?)?) ?(?:\( ?([\d.]+)\u00b0 ?\)|\{ ?([\d.]+)\u00b0\}|([\d.]+)\u00b0)",
        _radians,
    ),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"<=", r"\\le "),
    (r"(?<!=)>=", r"\\ge "),
    (r"!=|/=", r"\\ne "),
    (r"(?<=[\w)])\s*\*\*\s*(?=[\w(])", "^"),
    (r"(?<=\d) ?(?::|\\colon(?![a-zA-Z])) ?(?=\d)", ":"),
    (r"(?<=\d) ?(?:st|nd|rd|th)(?![a-zA-Z])|(?<=\d) ?\^ ?\{? ?(?:st|nd|rd|th)(?![a-zA-Z])\}?", ""),
    # thousands; inside brackets a comma separates numbers: (100,200)
    (r"(?<![\d.,(\[{])(\d{1,3}(?:,\d{3})+)(?!\d|,\d)", lambda match: match[1].replace(",", "")),
    (r"(?<![\d.,(\[{])(\d{1,2}(?:,\d\d)+,\d{3})(?!\d|,\d)", lambda match: match[1].replace(",", "")),
    (r"(?<![\d.,])(\d{1,3}(?:([ '])\d{3})(?:\2\d{3})*)(?!\d|,\d)", lambda match: match[1].replace(match[2], "")),
    (
        r"(?<![\w.,^{])(\d+(?:\.\d+)?) *(hundred|thousand|million|billion|trillion)(?![a-zA-Z])",
        lambda match: f"{(Decimal(match[1]) * 10 ** _POWERS_OF_TEN[match[2]]).normalize():f}",
    ),
    (r"(?<![\d.,/^])(\d+) (\d+) ?/ ?(\d+)(?![\d.,/])", r"\1\\frac{\2}{\3}"),
    (r"\s+", " "),
]
"""Commands for spacing and fonts go, symbols with several names get one."""
_REWRITTEN = [(re.compile(pattern), replacement) for pattern, replacement in _SPELLINGS]
_BASE = re.compile(
    r"(?<![\w.}\\^])(?<!\d,)(?P<digits>\([\dA-F]*\d[\dA-F]*\)|[\dA-F]*\d[\dA-F]*"
    r"|(?:\([\da-f]*\d[\da-f]*\)|[\da-f]*\d[\da-f]*|[a-f]{2,}|[A-F]{2,})(?= ?_ ?\{ ?16 ?\})) ?_ ?"
    r"(?:(?P<base>\d)|\{ ?\(?(?:base )?(?P<named>\d\d?|[a-z]+)\)? ?\})"
)
_BASE_NAMES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "sixteen": 16}
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)(?:\\(?:overline|bar|dot) ?(?:\{(\d+)\}|(\d))|\((\d+)\))(?![\d\\])")
_NUMBER = re.compile(
    r"([-+]?(?:\d+\.?\d*|\.\d+))(?:[eE]([-+]?\d{1,4})| ?(?:\\times|\\cdot|\*) ?10 ?\^ ?(?:(\d)|\{ ?([-+]?\d{1,4}) ?\}))?"
)
_CHOICE = re.compile(r"(?i:option |choice |answer )?(?:\(([A-J])\)|([A-J])(?:[.:)](?=\s|$)|$))(.*)", re.DOTALL)
_TO_NINETEEN = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBER_WORDS = {word: value for value, word in enumerate(_TO_NINETEEN.split())}
_NUMBER_WORDS |= {
    f"{ten}-{word}" if one else ten: 10 * tens + one
    for tens, ten in enumerate(_TENS.split(), start=2)
    for word, one in list(_NUMBER_WORDS.items())[:10]
}
_TWICE = re.compile(r"(\d{1,2}) ?\(([a-zA-Z-]+)\)|([a-zA-Z-]+) ?\((\d{1,2})\)")

_UNITS = _table(
    """meter metre m, kilometer kilometre km, centimeter centimetre cm, millimeter millimetre mm, inch in inches, foot ft feet,
    yard yd, mile mi, mile/hour mph, kilometer/hour kmh kph kmph, acre, hectare, gram g gm, kilogram kg, milligram mg, ton,
    pound lb, ounce oz, liter litre l, milliliter millilitre ml, gallon, quart, pint, hour h hr, minute min, second s sec,
    millisecond ms, day, week, month, year yr, degree deg \u00b0, celsius \u00b0c, fahrenheit \u00b0f, radian rad,
    permille \u2030 permil promille,
    percent % percentage pct, dollar $ usd, cent, euro \u20ac eur, sterling \u00a3 gbp, rupee rs inr \u20b9,
    yen \u00a5, yuan, kwh, kw, kj, kpa, ev, kb, mb, gb, tb, mole mol, calorie cal, kcal, joule, newton, watt, volt, ampere,
    hertz hz, way, digit, point, person people, man men, woman women, child children, fish, sheep, unit"""
)
"""Every spelling of a unit -> its name. A plural in "s" need not be listed."""
_UNIT_START = re.compile("(?<![\\\\a-zA-Z])[a-zA-Z\u00b0%\u2030$\u20ac\u00a3\u00a5\u20b9]")
MAX_UNIT_CHARS = 60
SHARES = {"percent": 100, "permille": 1000}
_CAPITALS = {"N": "newton", "J": "joule", "W": "watt", "V": "volt", "A": "ampere"}
_POWERS_BEFORE = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_POWERS_AFTER = {"squared": 2, "cubed": 3}
_NOT_UNITS = _set(
    """times equals always sometimes perhaps does holds works seems appears becomes remains fails means says exceeds differs
    lies others powers squares cubes roots pairs dozens scores hundreds thousands millions billions trillions halves thirds
    quarters fourths fifths sixths sevenths eighths ninths tenths hundredths thousandths millionths mistakes errors wrongs
    negatives guesses contradicts"""
)
"""They look like a plural noun, and change or deny the number before them."""

_FUNCTIONS = _set("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp gcd lcm max min det mod")
_GREEK = _set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi "
    "varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
)
_COMMANDS = (
    _FUNCTIONS
    | _GREEK
    | _set(
        "infty frac sqrt cdot times div pm mp cup cap binom emptyset mathbb lfloor rfloor lceil rceil sum prod int "
        "bmod le ge ne in approx"
    )
)
_ENVIRONMENT = re.compile(r"\\begin ?\{array\} ?\{[clr|]+\}|\\(?:begin|end) ?\{(?:[a-z]*matrix|array)\}")
_PLAIN_CHARACTERS = frozenset(" +-*/^_(){}[],;.|!=<>\\&\u00b0")
_RELATION = re.compile(r"\\(?:le|ge|ne|in|approx)(?![a-zA-Z])|[<=>]")
_OPPOSITE = {">": "<", "\\ge": "\\le"}
_TURNED = _OPPOSITE | {"<": ">", "\\le": "\\ge"}
_SET_BUILDER = re.compile(
    r" ?\\\{ ?(?P<name>[a-zA-Z]) ?(?:\\in ?\\mathbb ?\{R\} ?)?(?:\\mid(?![a-zA-Z])|[|:]) ?(?P<condition>[^|:]+?) ?\\\} ?"
)
_NAME = (
    rf"(?:\\angle ?)?(?:\\(?:{'|'.join(_GREEK - {'pi'})})|(?P<name>[a-zA-Z]+))"
    r"(?: ?_ ?(?:\w|\{[^{}=<>]*\}))?(?:'*|\^ ?\{-1\})(?: ?\([^()=<>]*\))?"
)
_LEAD = re.compile(
    rf"(?:^|(?<=,)|(?<=;)) ?(?:{_NAME}|\(\w(?:, ?\w)+\)) ?(?:=|\\equiv(?=.*\\pmod)|\\in ?(?=[\[(]|\\\{{|\\mathbb|\\emptyset))"
)
"""A name and "=" or "is in"."""
_NOT_NAMES = _set("e i not no non never neither wrong false incorrect without except minus")
_MONTHS = _table(
    "01 january jan, 02 february feb, 03 march mar, 04 april apr, 05 may, 06 june jun, 07 july jul, 08 august aug, "
    "09 september sept sep, 10 october oct, 11 november nov, 12 december dec"
)
_MONTH = rf"({'|'.join(name for name in _MONTHS if name.isalpha())})\.?"
_DATE = re.compile(
    rf"\b(\d\d?)(?:st|nd|rd|th)? (?:of )?{_MONTH}(?:,? (\d{{4}}))?\b|\b{_MONTH} (?:the )?(\d\d?)(?:st|nd|rd|th)?\b"
    r"(?:,? (\d{4}))?"
)
_CLOCK = re.compile(r"\b(\d\d?)(?::(\d\d))? ?([ap])\.? ?m\b\.?|\b(\d):(?=\d\d\b)")
_ISO = re.compile(r"\b(\d{4})([-/])(\d\d?)\2(\d\d?)\b")
_NO_ARITHMETIC = re.compile(r"\d:\d|\d{4}-\d\d?-\d\d?\b|\d/\d+/\d|\b\d{3}0s\b")
"""Times, ratios, dates and decades in digits."""


@lru_cache(4096)
def plain(answer: str) -> str:
    r"""One spelling of what has several: `\dfrac`, unicode symbols and digits, `\text{...}`, thousands, bases, spacing."""
    if len(re.findall(r"(?<!\\)\$", answer)) % 2 == 0:
        answer = re.sub(r"(?<!\\)\$", " ", answer)  # they delimit; a lone one is a currency
    answer = re.sub("[\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+", lambda match: f"^{{{_compatible(match[0])}}}", answer)
    answer = re.sub("[\u2080-\u2089]+", lambda match: f"_{{{_compatible(match[0])}}}", answer)
    answer = re.sub("\u221a ?(\\d+)", r"\\sqrt{\1}", answer)
    answer = re.sub("[\u00bc-\u00be\u2150-\u215e]", lambda match: " " + _compatible(match[0]), answer)
    answer = "".join(map(_symbol, _compatible(answer.replace("\u211d", r"\R "))))
    for pattern, replacement in _REWRITTEN:
        answer = pattern.sub(replacement, answer)
    return _REPEATING.sub(_fraction, _BASE.sub(_decimal, answer)).strip()


def _compatible(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _symbol(char: str) -> str:
    if char.isascii() or char in _SYMBOLS:
        return _SYMBOLS.get(char, char)
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    kind, _, name = unicodedata.name(char, "").partition(" LETTER ")
    name = name.capitalize() if kind == "GREEK CAPITAL" else name.lower()
    return f"\\{name} " if kind.startswith("GREEK ") and name in _GREEK else char


def _decimal(match: re.Match[str]) -> str:
    r"""The value of `11_2` or `(A3)_{16}` in base ten; as it was where the base or a digit is none."""
    named = match["base"] or match["named"]
    base = int(named) if named.isdecimal() else _BASE_NAMES.get(named, 0)
    try:
        return str(int(match["digits"].strip("()"), base)) if 2 <= base <= 16 else match[0]
    except ValueError:
        return match[0]


def _fraction(match: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as a fraction."""
    whole, fixed, *groups = match.groups()
    repeated = next(group for group in groups if group)
    numerator = Decimal(whole + fixed + repeated) - Decimal(whole + fixed or 0)
    return f"\\frac{{{numerator}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}"


def number(text: str) -> Decimal | None:
    r"""The value of a decimal number, also `1e5` or `1 \times 10^5`, exactly; None for anything else.

    (`int` refuses more than 4,300 digits.)
    """
    if not (match := _NUMBER.fullmatch(text)):
        return None
    return Decimal(f"{match[1]}e{match[2] or match[3] or match[4] or 0}")


def split_unit(text: str) -> tuple[str, str]:
    """The value and the name of its unit, "" where there is none: "$5", "5 dollars", "20 square feet", "60 miles per hour"."""
    text = re.sub(
        r"^([-+]?) ?(?:US ?(?=\$))?([$\u20ac\u00a3\u00a5\u20b9]|(?:USD|EUR|GBP|INR|Rs)(?=[. \d]))\.? ?(.*?)(?= [a-zA-Z]|$)",
        r"\1\3 \2",
        text,
    )
    for match in _UNIT_START.finditer(text, max(0, len(text) - MAX_UNIT_CHARS)):
        value, tail = text[: match.start()], text[match.start() :]
        if not re.search(r"[\d)}\]!]$|(?<![a-zA-Z])[a-zA-Z]$|\\[a-z]+$", value.rstrip()):
            continue  # a unit follows a value
        if re.match("[a-zA-Z](?![a-zA-Z])", tail) and not value.endswith(" "):
            continue  # in "7m" the letter is a variable
        name = _unit(tail)
        if name is not None:
            return value.strip(), name
    return text, ""


def _unit(text: str) -> str | None:
    """The unit in one spelling, None for any other text. What is counted is a unit too: a plural noun."""
    text = re.sub(r" of [a-zA-Z]+$| (?:in total|each|old)$", "", text)
    text = re.sub(r"(?<![a-zA-Z])[NJWVA](?![a-zA-Z])", lambda match: _CAPITALS[match[0]], text).lower()
    text = re.sub(r" ?\^ ?\{? ?(-?\d) ?\}?", r" ^\1 ", text.replace("\\cdot", " ").replace("\u00b0 ", "\u00b0"))
    powers: dict[str, int] = {}
    last, sign, power = "", 1, 1
    for word in re.findall("\u00b0[cf](?![a-z])|\\^-?\\d|[a-z]+|[^a-z\\s.]|\\.(?!\\s|$)", text):
        name = _UNITS.get(word) or _UNITS.get(word.removesuffix("s")) or _UNITS.get(word.removesuffix("es"))
        if name is None and re.fullmatch(r"[a-z]{3,}(?<![sui])s", word) and word not in _NOT_UNITS:
            name = word
        if word in _POWERS_BEFORE:
            power = _POWERS_BEFORE[word]
        elif last and (word in _POWERS_AFTER or word[0] == "^"):
            powers[last] *= _POWERS_AFTER.get(word) or int(word[1:])
        elif last and word in ("per", "/", "a", "an"):
            last, sign = "", -1
        elif name is None:
            return None
        elif name != last:  # "$5 dollars"
            upper, _, lower = name.partition("/")
            powers[upper] = powers.get(upper, 0) + sign * power
            if lower:
                powers[lower] = powers.get(lower, 0) - sign
            last, power = lower or upper, 1
    if not last:
        return None
    named = sorted((-exponent, name) for name, exponent in powers.items() if exponent and name != "unit")
    return " ".join(name if exponent == -1 else f"{name}^{-exponent}" for exponent, name in named)


def tight(text: str) -> str:
    """Without the spaces that mean nothing in mathematics: those between two digits stay."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def latex(text: str) -> str:
    """For math-verify, which knows `i` by the word boundaries around it, and rounds powers with a decimal exponent."""
    text = re.sub(r"\^ ?(?:\{ ?(-?\d*\.\d{1,4}) ?\}|(\d+\.\d{1,4})(?!\d))", _exponent, text)
    text = re.sub(r"\\sqrt ?\{ ?- ?(\d+) ?\}", r"\\sqrt{\1} i ", text)
    return re.sub(r"(?<=\d)i(?![a-zA-Z])", " i", text).replace("\u00b0", r"^\circ ").replace(";", ",")


def _exponent(match: re.Match[str]) -> str:
    numerator, denominator = Decimal(match[1] or match[2]).as_integer_ratio()
    return f"^{{\\frac{{{numerator}}}{{{denominator}}}}}"


def items(text: str) -> str:
    """Alternatives and conjunctions as a list: "5 or 6" is `5, 6`."""
    return re.sub(r"(?:,| )? ?(?<![\\a-zA-Z])(?:and|or)(?![a-zA-Z]) ?", ", ", text)


def set_condition(text: str) -> str:
    r"""The condition of a set, `x \le 3` of `\{x \mid x \le 3\}`; any other text as it is."""
    match = _SET_BUILDER.fullmatch(text)
    return match["condition"] if match else text


def set_interval(text: str) -> str:
    r"""The interval that a set is, `(-\infty,3]` for `\{x \mid x \le 3\}`; any other text as it is."""
    if (match := _SET_BUILDER.fullmatch(text)) is None:
        return text
    parts = re.split(r" ?(<|>|\\[lg]e(?![a-zA-Z])) ?", match["condition"])
    if parts[-1] == match["name"] or (len(parts) == 5 and parts[1] in (">", "\\ge")):
        parts = [_TURNED.get(part, part) for part in reversed(parts)]
    if len(parts) == 3 and parts[1] in (">", "\\ge"):
        parts = [parts[2], _TURNED[parts[1]], parts[0], "<", "\\infty"]
    elif len(parts) == 3:
        parts = ["-\\infty", "<", *parts]
    if len(parts) != 5 or parts[2] != match["name"] or not {parts[1], parts[3]} <= {"<", "\\le"}:
        return text
    return f"{'[' if parts[1] != '<' else '('}{parts[0]},{parts[4]}{']' if parts[3] != '<' else ')'}"


def choice(text: str) -> str:
    """The letter of a multiple choice in "C", "(C) Paris", "C. Paris" or "Option C"; "" where more than one is named."""
    match = _CHOICE.fullmatch(text)
    if match is None:
        return ""
    letter = match[1] or match[2]
    others = re.search(
        rf"^ ?(?:(?:or|and|nor|but|is|wrong|false)\b|not \(?[A-J]\b|[,;/])|\((?!{letter})[A-J]\)|(?<!\w)(?!{letter})[A-J]$",
        match[3],
    )
    return "" if others and not re.match(r"(?i) ?(?:both|neither|either)\b", match[3]) else letter


def decimal_comma(text: str) -> str:
    """The text with a decimal point where it is one number with a decimal comma: "0,5", "1.234,5"."""
    match = re.fullmatch(r"([-+]?(?:\d+|\d{1,3}(?:\.\d{3})+)),(\d+)", text)
    return f"{match[1].replace('.', '')}.{match[2]}" if match else text


def digits(text: str) -> str:
    """The text with a number word at its start in digits: "twelve apples" and "12 (twelve) apples" are "12 apples"."""
    if (match := _TWICE.match(text)) and _NUMBER_WORDS.get((match[2] or match[3]).lower()) == int(match[1] or match[4]):
        return f"{match[1] or match[4]}{text[match.end() :]}"
    match = re.match(r"[a-zA-Z]+(?:-[a-zA-Z]+)?(?![-a-zA-Z])", text)
    value = _NUMBER_WORDS.get(match[0].lower()) if match else None
    return text if match is None or value is None else f"{value}{text[match.end() :]}"


def is_text(reference: str, value: str) -> bool:
    r"""Whether a reference (as given, and its value) is words, a date or a time, which have no arithmetic.

    A word of up to three letters that is not in `\text{...}` is a product ("ab"), except "yes" and "no".
    """
    found = set(re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]+", _ENVIRONMENT.sub("", value))) - _FUNCTIONS
    return (
        any(pattern.search(value.lower()) for pattern in (_NO_ARITHMETIC, _DATE, _CLOCK))
        or any(len(word) > 3 or word.lower() in ("yes", "no") for word in found)
        or any(char.isalpha() and not char.isascii() for char in value)
        or re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{2,} [a-zA-Z]{2,}|[a-zA-Z]\.[a-zA-Z]", value) is not None
        or (bool(found) and re.search(r"\\(?:text|mbox)", reference) is not None)
    )


def is_short_word(text: str) -> bool:
    """Whether the text is a word of three letters ("dog"), not a product ("abc", "mgh"): one with a vowel, no alphabet."""
    return (
        len(text) == 3
        and text.isalpha()
        and text.lower() not in ascii_lowercase
        and not {*"aeiou"}.isdisjoint(text.lower())
    )


def words(text: str) -> str:
    """SQuAD's normalisation: lower case, no articles, no punctuation but between digits; dates and times in ISO form."""

    def date(match: re.Match[str]) -> str:
        day, month, year = (match[1], match[2], match[3]) if match[1] else (match[5], match[4], match[6])
        return f"{year}-{_MONTHS[month]}-{int(day):02d}" if year else f"{_MONTHS[month]}-{int(day):02d}"

    def clock(match: re.Match[str]) -> str:
        if match[4]:
            return f"0{match[4]}:"
        return f"{int(match[1]) % 12 + 12 * (match[3] == 'p'):02d}:{match[2] or '00'}"

    def duration(match: re.Match[str]) -> str:
        return f" {_UNITS[match[1].removesuffix('s')]} "

    text = _ISO.sub(lambda match: f"{match[1]}-{int(match[3]):02d}-{int(match[4]):02d}", text.lower())
    text = re.sub(r"\b(\d\d:\d\d|\d:\d\d(?=:00 ?[ap])):00\b", r"\1", text)
    text = _CLOCK.sub(clock, _DATE.sub(date, text))
    text = re.sub(r"\b(?:on |(?:mon|tues|wednes|thurs|fri|satur|sun)day,? )+(?=\d{2,4}-\d)", "", text)
    text = re.sub(r"\bmidnight\b", "00:00", re.sub(r"\b(?:12(?::00)? )?noon\b", "12:00", text))
    text = re.sub(r"(?<=\d) to (?=\d)", ":", text).replace("&", " and ")
    text = re.sub(r"(?<=\d) ?(hours?|hrs?|h|minutes?|mins?|seconds?|secs?)(?![a-z])(?:,? and (?=\d))?", duration, text)
    text = "".join(" " if not char.isascii() and unicodedata.category(char)[0] == "P" else char for char in text)
    text = re.sub(r"(?<!\d)[.,:;/]|[.,:;/](?!\d)|[?'\"()\[\]{}*_$\\]|!(?=\s|$)|(?<=[^\W\d])-(?=[^\W\d])", " ", text)
    # "U.S." and "US", "J.K." and "J. K."
    text = re.sub(r"(?<!\S)([^\W\d]) (?=[^\W\d](?!\S))", r"\1", " ".join(text.split()))
    kept = [word for word in text.split() if word not in ("a", "an", "the")] or text.split()
    return " ".join(kept)


def without_names(answer: str, reference: str) -> str:
    r"""The answer without "x =" or "x \in" before its parts, where the reference is no equation."""
    names = [match["name"] or "" for match in _LEAD.finditer(answer)]
    # "y = 1, x = 2" must not become (1, 2)
    if (
        re.search(r"=|\\equiv", reference)
        or names != sorted(names)
        or any(name.lower() in _NOT_NAMES for name in names)
    ):
        return answer
    return _LEAD.sub(" ", answer).strip()


def assigned(text: str) -> dict[str, str]:
    """Name -> value in "x = 3, y = 4"; nothing for a text of another form, or where a name has two values."""
    parts = [part.split("=") for part in split_list(text)[1]]
    if len(parts) < 2 or any(len(part) != 2 or not re.fullmatch(_NAME, part[0].strip()) for part in parts):
        return {}
    values = {name.strip(): value.strip() for name, value in parts}
    return values if len(values) == len(parts) else {}


def objection(answer: str, reference: str) -> str:
    """Why an answer cannot be accepted for the reference, whatever its value; "" if there is no objection.

    Unread characters, commands and words; a relation, chain or negation; numbers side by side; another number of parts,
    another kind of brackets, another order.
    """
    known = _PLAIN_CHARACTERS | set(reference)
    for char in answer:
        if char not in known and not (char.isascii() and char.isalnum()):
            return f"{char!r} in the answer is not read"
    rest = _ENVIRONMENT.sub(" ", answer)
    for command in re.findall(r"\\(?:[a-zA-Z]+|[^a-zA-Z])", rest):
        is_known = command[1:] in _COMMANDS or command in ("\\{", "\\}") or (command == "\\\\" and rest != answer)
        if not is_known and command not in reference:
            return f"{command} in the answer is not read"
    letters = set("".join(re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]+", reference)))
    for word in re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}", rest):
        if word not in _FUNCTIONS and not set(word) <= letters:
            return f"{word!r} in the answer is not read"
    relations = [
        Counter(_OPPOSITE.get(sign, sign) for sign in _RELATION.findall(re.sub(r"_ ?\{[^{}]*\}", "", text)))
        for text in (answer, reference)
    ]
    if too_many := relations[0] - relations[1]:
        sign = next(sign for sign in _RELATION.findall(answer) if _OPPOSITE.get(sign, sign) in too_many)
        return f"the answer is a relation ({sign}) that the reference lacks"
    if re.search(r"(?<!_)\d [\d.]|(?<!frac)(?<!frac )(?<![\^_])\d ?\{|\d ?_|[)}\]] ?_ ?\{? ?\d", answer):
        return "numbers stand side by side in the answer"
    if re.search(r"^ ?[,;!]|[,;] ?[,;]|[,;] ?$|(?<![\w)}\]!|]) ?!|\.(?!\d)", answer) or answer.count("|") % 2:
        return "the punctuation of the answer is not read"
    return "" if relations[1] else _other_parts(answer, reference)


def _other_parts(answer: str, reference: str) -> str:
    (kind, parts), (wanted_kind, wanted) = split_list(answer), split_list(reference)
    if len(wanted) > 1 and kind and wanted_kind and kind != wanted_kind:
        return f"the answer is in {kind}, the reference in {wanted_kind}"
    if re.search(r"\\(?:pm|mp|mathbb)", answer + reference):
        return ""  # two values in one part; an interval for a set
    if len(parts) != len(wanted):
        return f"the answer has {len(parts)} part(s), the reference {len(wanted)}"
    values, wanted_values = [number(part) for part in parts], [number(part) for part in wanted]
    numbers = [value for value in wanted_values if value is not None]
    # Who lists a set lists it upwards or as found. From greatest to least is an order that was asked for.
    ordered = not wanted_kind and 2 < len(numbers) == len(wanted) and all(a > b for a, b in pairwise(numbers))
    if ordered and None not in values and values != wanted_values:
        return "the order of the parts differs"
    return ""


def split_list(text: str) -> tuple[str, list[str]]:
    """The kind of brackets around a list, "" for none, and its parts."""
    text = text.replace("\\{", "{").replace("\\}", "}")
    depth, cuts, wrapped = 0, [-1], len(text) > 1
    for index, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        wrapped = wrapped and (depth > 0 or index == len(text) - 1)
        if char in ",;" and depth == 0:
            cuts.append(index)
    if wrapped and text[-1] in ")]}":
        return text[0] + text[-1], split_list(text[1:-1])[1]
    return "", [text[start + 1 : end].strip() for start, end in pairwise([*cuts, len(text)])]
