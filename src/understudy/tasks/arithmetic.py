"""Built-in problems with worked solutions, for models so small that a CPU trains them in seconds.

Three families, each with its own alphabet:

    addition   946+089:          690=15;481=13;901=10#1035
               per digit, least significant first: digit, digit, carry, "=", their sum in two digits; after "#" the sum
               with `ways`: the two digits in either order, and ";" or ":" between steps, as in 960=15:841=13;901=10#1035
    chain      7+5*3-8:          7+5=2;2*3=6;6-8=8#8
               from left to right, modulo 10
    words      tom has 24 pens . tom buys 7 more . tom loses 5 . how many pens does tom have ?
                                 24 + 7 = 31 ; 31 - 5 = 26 # 26
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from understudy.errors import check_range
from understudy.randomness import mix64
from understudy.tasks.base import Split, Task
from understudy.tasks.lazy import LazyPrompts, Permutation
from understudy.tasks.verifiers import grade_exact
from understudy.types import Grade, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Family = Literal["addition", "chain", "words"]

HELD_OUT_SHARE = 20
"""One problem in twenty is for validation and one in twenty for the test."""
PAD, EOS = "<pad>", "<eos>"

NAMES = ("tom", "ann", "ben", "eva", "sam", "mia", "leo", "zoe")
ITEMS = ("pens", "coins", "cards", "books", "shells", "stamps", "apples", "marbles")
GAINS = ("buys {} more", "finds {}", "gets {} from a friend")
LOSSES = ("loses {}", "sells {}", "gives {} to a friend")
DOUBLING = "doubles them"
AMOUNTS = range(1, 10)
STARTS = range(20, 40)
"""From here two losses stay above zero and a gain and a doubling below a hundred."""


@dataclass(frozen=True)
class Arithmetic(Task):
    """The task `arithmetic`: sums and chains of operations, computed.

    Every problem of a split is distinct, and which split it is in depends on the problem alone, not on the seed: what one
    run trains on no other run evaluates on. `seed` orders the training problems.

    Raises ValueError for values out of range and for a setting that the family does not have.
    """

    family: Family = "addition"
    """The kind of problems."""
    digits: int = 3
    """Digits of each summand (addition)."""
    ways: bool = False
    """A solution takes one of two right ways at two places of every step, as often the one as the other (addition)."""
    operations: int = 4
    """Operations in a row (chain)."""
    num_solutions: int | None = None
    """The most training problems, each with its solution; None: all that there are."""
    seed: int = 0
    """Orders the training problems."""
    alphabet: Family | None = None
    """Family whose tokens the tokenizer has; None: its own. For students of several families."""

    def __post_init__(self) -> None:
        if self.family not in _FAMILIES:
            raise ValueError(f"family is {self.family!r}; known: {', '.join(_FAMILIES)}")
        if not 1 <= self.digits <= 9 or not 1 <= self.operations <= 9:
            raise ValueError("digits and operations go from 1 to 9")
        if self.family != "addition" and self.digits != 3:
            raise ValueError(f"digits is a setting of the family addition, not of {self.family}")
        if self.family != "addition" and self.ways:
            raise ValueError(f"ways is a setting of the family addition, not of {self.family}")
        if self.family != "chain" and self.operations != 4:
            raise ValueError(f"operations is a setting of the family chain, not of {self.family}")
        if not set(_FAMILIES[self.family]) <= set(_FAMILIES[self.alphabet or self.family]):
            raise ValueError(f"the alphabet of {self.alphabet} lacks tokens that {self.family} is written in")
        check_range(self, 1, "num_solutions", off="null takes all problems")

    @property
    def name(self) -> str:
        return f"arithmetic/{self.family}"

    @property
    def num_tokens(self) -> int:
        return len(_FAMILIES[self.alphabet or self.family])

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token for each character or word of the alphabet."""
        return build_tokenizer(self.alphabet or self.family)

    @property
    def num_problems(self) -> int:
        """All problems of the family, over the three splits."""
        if self.family == "addition":
            return int(100**self.digits)
        if self.family == "chain":
            return int(10 * 30**self.operations)
        return len(NAMES) * len(ITEMS) * len(STARTS) * len(_steps(1)) * len(_steps(2))

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """A lazy sequence of prompts with reference and solution; held-out splits do not depend on the seed."""
        held_out = max(1, self.num_problems // HELD_OUT_SHARE)
        spread = Permutation(self.num_problems, f"{self.name}/split")
        if split != "train":
            first = 0 if split == "test" else held_out
            return LazyPrompts(lambda i: self.problem(spread(first + i)), range(held_out))
        num_train = self.num_problems - 2 * held_out
        order = Permutation(num_train, f"{self.name}/train/{self.seed}")
        size = num_train if self.num_solutions is None else min(num_train, self.num_solutions)
        return LazyPrompts(lambda i: self.problem(spread(2 * held_out + order(i))), range(size))

    def problem(self, code: int) -> Prompt:
        """The problem of that number, from 0 to `num_problems` - 1."""
        if self.family == "addition":
            text, solution = _addition(code, self.digits, self.ways)
        elif self.family == "chain":
            text, solution = _chain(code, self.operations)
        else:
            text, solution = _words(code)
        answer = solution.rpartition("#")[2].strip()
        return Prompt(f"{self.name}/{text}", text=text, reference=(answer,), solution=solution)

    def grade(self, prompt: Prompt, text: str) -> Grade:
        """1.0 if what follows the last '#' is the answer."""
        if prompt.reference is None:
            raise ValueError(f"prompt {prompt.id} has no reference; it does not come from this task")
        return grade_exact(text, prompt.reference[0], after="#")


def _addition(code: int, digits: int, ways: bool) -> tuple[str, str]:
    a, b = divmod(code, 10**digits)
    solution, carry = "", 0
    choices = mix64(code) if ways else 0
    for place in range(digits):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        swapped, colon = choices >> 2 * place & 1, choices >> 2 * place & 2
        first, second = (y, x) if swapped else (x, y)
        end = "#" if place == digits - 1 else ":" if colon else ";"
        solution += f"{first}{second}{carry}={total:02d}{end}"
        carry = total // 10
    return f"{a:0{digits}d}+{b:0{digits}d}:", f"{solution}{a + b}"


def _chain(code: int, operations: int) -> tuple[str, str]:
    code, value = divmod(code, 10)
    text, steps = str(value), []
    for _ in range(operations):
        code, choice = divmod(code, 30)
        sign, operand = "+-*"[choice // 10], choice % 10
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % 10
        steps.append(f"{value}{sign}{operand}={result}")
        text += f"{sign}{operand}"
        value = result
    return f"{text}:", f"{';'.join(steps)}#{value}"


def _steps(number: int) -> list[tuple[str, str, int]]:
    """The events of step 1 or 2, each a phrase, a sign and an amount. Only the second may double."""
    steps = [(phrase.format(n), "+", n) for phrase in GAINS for n in AMOUNTS]
    steps += [(phrase.format(n), "-", n) for phrase in LOSSES for n in AMOUNTS]
    return [*steps, (DOUBLING, "*", 2)] if number == 2 else steps


def _words(code: int) -> tuple[str, str]:
    code, who = divmod(code, len(NAMES))
    code, what = divmod(code, len(ITEMS))
    code, start = divmod(code, len(STARTS))
    name, item, value = NAMES[who], ITEMS[what], STARTS[start]
    sentences, lines = [f"{name} has {value} {item} ."], []
    for number in (1, 2):
        options = _steps(number)
        code, choice = divmod(code, len(options))
        phrase, sign, amount = options[choice]
        result = {"+": value + amount, "-": value - amount, "*": value * amount}[sign]
        sentences.append(f"{name} {phrase} .")
        lines.append(f"{value} {sign} {amount} = {result}")
        value = result
    sentences.append(f"how many {item} does {name} have ?")
    return " ".join(sentences), f"{' ; '.join(lines)} # {value}"


_PHRASES = " ".join([*NAMES, *ITEMS, *GAINS, *LOSSES, DOUBLING, "has . how many does have ?", "+ - * = ; #"])
_FAMILIES: dict[str, list[str]] = {
    "addition": list("0123456789+=;:#"),
    "chain": list("0123456789+-*=;:#"),
    "words": [*map(str, range(100)), *sorted({*_PHRASES.replace("{}", "").split()})],
}
"""The tokens of each family, without the two special ones."""


def build_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """One token per character, or per word for `words`; `<pad>` is 0, `<eos>` is 1, nothing is added by itself.

    Any text of the family (words: with single spaces) survives encoding and decoding; another character raises, because
    there is no token for the unknown.
    """
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *_FAMILIES[family]])}
    tokenizer = Tokenizer(WordLevel(vocabulary))
    if family == "words":
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
