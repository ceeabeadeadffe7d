"""Problems of several tasks in turn, each part with its own share, verifier and teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property

from understudy import config
from understudy.environments import Environment
from understudy.errors import DataError, check_range, nearest
from understudy.tasks.arithmetic import Arithmetic
from understudy.tasks.base import Split, Task
from understudy.tasks.calls import Calls
from understudy.tasks.choice import Choice
from understudy.tasks.code import Code
from understudy.tasks.customers import Customers
from understudy.tasks.hosted import OpenEnv, Verifiers
from understudy.tasks.in_memory import Rows
from understudy.tasks.instructions import Instructions
from understudy.tasks.lazy import LazyPrompts
from understudy.tasks.math import Mathematics
from understudy.tasks.qa import QuestionAnswering
from understudy.tasks.records import File, Hub
from understudy.tasks.vision import Visual
from understudy.types import Grade, Prompt

PARTS: dict[str, type[Task]] = {
    "arithmetic": Arithmetic,
    "math": Mathematics,
    "choice": Choice,
    "instructions": Instructions,
    "code": Code,
    "calls": Calls,
    "customers": Customers,
    "openenv": OpenEnv,
    "qa": QuestionAnswering,
    "verifiers": Verifiers,
    "vision": Visual,
    "file": File,
    "jsonl": File,
    "hub": Hub,
    "rows": Rows,
}
"""`type` of a task, or of a part of a mix -> its section."""
MAX_ROUND = 1000
"""Prompts after which the order of the parts repeats."""
SEPARATOR = "/"
"""Between the name of a part and the part's own id of a prompt."""


@dataclass(frozen=True, kw_only=True)
class PartSampling:
    """How the responses of one part end. Temperature, top_p, top_k and min_p are those of the run, whose loss reads them."""

    max_new_tokens: int | None = None
    """Tokens after which a response is cut off, at most those of the section sampling; null: as many."""
    stop: tuple[str, ...] = ()
    """A response also ends with the token that completes one of these strings."""

    def __post_init__(self) -> None:
        check_range(self, 1, "max_new_tokens")
        if not all(self.stop):
            raise ValueError("stop has an empty string, which would end every response")


_AS_THE_RUN = PartSampling()


@dataclass(frozen=True)
class Mix(Task):
    """The task `mix`: several tasks in turn, `parts: {addition: {type: arithmetic, ...}, chain: {...}}`.

    Prompts of the parts alternate, as often as `weights` say, until one of them has no more for a whole round. In the splits
    that are measured on, the rest of the others follows. The name of a part names the teacher that judges its samples, unless
    the part's own data do.
    """

    parts: Mapping[str, Task] = config.choices(PARTS)
    """Tasks by a name of your choice."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Shares of the parts, such as {math: 3, code: 1}; empty: each as often as any other."""
    sampling: Mapping[str, PartSampling] = field(default_factory=dict)
    """How responses of a part end, by its name: {math: {max_new_tokens: 8192}, code: {stop: ["```"]}}."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts is empty; name at least one task")
        if unknown := self.sampling.keys() - self.parts.keys():
            raise ValueError(
                f"sampling is for {sorted(unknown)[0]!r}, which is no part; {nearest(min(unknown), self.parts)}"
            )
        if self.weights:
            if self.weights.keys() != self.parts.keys():
                raise ValueError(
                    f"weights are for {sorted(self.weights)}, but the parts are {sorted(self.parts)}; give each a weight"
                )
            if not all(0 < weight < math.inf for weight in self.weights.values()):
                raise ValueError("weights must be above 0; leave a part out that is not to be used")
            if sum(self._counts) > MAX_ROUND:
                raise ValueError(
                    f"weights {dict(self.weights)} make a round of {sum(self._counts):,} prompts, at most {MAX_ROUND:,}; give "
                    "simpler ones, such as 3 and 1"
                )
        for name in self.parts:
            if SEPARATOR in name:
                raise ValueError(
                    f"a part is named {name!r}; names have no {SEPARATOR!r}, which ends them in a prompt's id"
                )

    @property
    def name(self) -> str:
        return "mix/" + "+".join(self.parts)

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        """Prompts of each part in one round: the smallest whole numbers in the proportion of the weights."""
        shares = [Fraction(str(self.weights[name])) if self.weights else Fraction(1) for name in self.parts]
        common = math.lcm(*(share.denominator for share in shares))
        counts = [int(share * common) for share in shares]
        return tuple(count // math.gcd(*counts) for count in counts)

    @cached_property
    def _round(self) -> tuple[tuple[int, int], ...]:
        """Part of each place of a round, always the one that is furthest behind, and how many of it came before."""
        used = [0] * len(self._counts)
        order = []
        for _ in range(sum(self._counts)):
            which = min(range(len(used)), key=lambda part: ((2 * used[part] + 1) / self._counts[part], part))
            order.append((which, used[which]))
            used[which] += 1
        return tuple(order)

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Lazy: rounds of prompts, then what is left of each part where it is measured on.

        Raises as the parts do, and DataError for a part that has too few for one round of training.
        """
        found = [(name, part.prompts(split)) for name, part in self.parts.items()]
        sizes = [len(prompts) for _, prompts in found]
        rounds = min(size // count for size, count in zip(sizes, self._counts, strict=True))
        in_rounds = rounds * len(self._round)
        if not rounds and split == "train":
            short = next(i for i, size in enumerate(sizes) if size < self._counts[i])
            raise DataError(
                f"the part {found[short][0]} has {sizes[short]} prompts, of which one round of the mix takes "
                f"{self._counts[short]}; give simpler weights, or more prompts"
            )
        left = [size - rounds * count for size, count in zip(sizes, self._counts, strict=True)]

        def prompt(index: int) -> Prompt:
            if index < in_rounds:
                number, place = divmod(index, len(self._round))
                which, before = self._round[place]
                place = number * self._counts[which] + before
            else:
                place, which = index - in_rounds, 0
                while place >= left[which]:
                    place, which = place - left[which], which + 1
                place += rounds * self._counts[which]
            name, prompts = found[which]
            chosen, own = prompts[place], self.sampling.get(name, _AS_THE_RUN)
            return replace(
                chosen,
                id=f"{name}{SEPARATOR}{chosen.id}",
                teacher=chosen.teacher or name,
                max_new_tokens=own.max_new_tokens,
                stop=own.stop,
            )

        return LazyPrompts(prompt, range(in_rounds + (0 if split == "train" else sum(left))))

    def part_of(self, prompt: Prompt) -> str | None:
        return prompt.id.partition(SEPARATOR)[0]

    def grade(self, prompt: Prompt, text: str) -> Grade:
        """The verdict of the part that the prompt comes from."""
        return self._part(prompt).grade(prompt, text)

    def reward(self, prompt: Prompt, text: str) -> Grade | None:
        """The reward of the part that the prompt comes from."""
        return self._part(prompt).reward(prompt, text)

    def same_answer(self, prompt: Prompt, one: str, other: str) -> bool:
        """As the prompt's part says."""
        return self._part(prompt).same_answer(prompt, one, other)

    def gold(self, prompt: Prompt) -> Sequence[str]:
        """The right responses that the prompt's part knows."""
        return self._part(prompt).gold(prompt)

    def grade_episode(self, prompt: Prompt, text: str) -> Grade:
        """As the prompt's part says."""
        return self._part(prompt).grade_episode(prompt, text)

    @property
    def mistakes(self) -> Mapping[str, str]:
        return {key: why for part in self.parts.values() for key, why in part.mistakes.items()}

    def environment(self, prompt: Prompt) -> Environment:
        """The environment of the prompt's part."""
        return self._part(prompt).environment(prompt)

    @property
    def graders(self) -> int:
        # a function of the user's is called by one thread
        return 1 if any(part.rewards for part in self.parts.values()) else max(p.graders for p in self.parts.values())

    def _part(self, prompt: Prompt) -> Task:
        part = self.parts.get(prompt.id.partition(SEPARATOR)[0])
        if part is None:
            raise DataError(f"prompt {prompt.id} is of none of the parts {', '.join(self.parts)}")
        return part

    def check_files(self) -> None:
        for part in self.parts.values():
            part.check_files()

    def places(self, section: str = "task") -> Mapping[str, Task]:
        return {f"{section}.parts.{name}": part for name, part in self.parts.items()}

    @property
    def first_split(self) -> Split:
        return next(iter(self.parts.values())).first_split

    @property
    def is_local(self) -> bool:
        return all(part.is_local for part in self.parts.values())

    @property
    def longest(self) -> int | None:
        return max((own.max_new_tokens for own in self.sampling.values() if own.max_new_tokens), default=None)

    @property
    def has_images(self) -> bool:
        return any(part.has_images for part in self.parts.values())

    @property
    def computed(self) -> bool:
        return all(part.computed for part in self.parts.values())
