"""The order in which prompts are drawn: a function of (seed, position), the same for every number of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from understudy.errors import DataError
from understudy.tasks.lazy import Permutation
from understudy.types import Prompt, Request


@dataclass(frozen=True)
class Drawn:
    """The prompts of one step, where the next step begins, and how many were left out as too long."""

    prompts: tuple[tuple[Prompt, Tensor], ...]
    """Each with its token ids."""
    next_position: int
    num_too_long: int
    positions: tuple[int, ...] = ()
    """Of the prompts."""

    @property
    def names(self) -> list[str]:
        """Ids of the prompts, each once."""
        return list(dict.fromkeys(prompt.id for prompt, _ in self.prompts))

    def requests(self, samples_per_prompt: int, seen: Counter[str] | None = None) -> list[Request]:
        """`samples_per_prompt` requests for each prompt; one that was drawn before goes on counting its index in `seen`."""
        seen = Counter() if seen is None else seen
        made = []
        for prompt, ids in self.prompts:
            made += [Request(prompt, seen[prompt.id] + n, ids) for n in range(samples_per_prompt)]
            seen[prompt.id] += samples_per_prompt
        return made


class PromptStream:
    """Prompts in a new random order every epoch. A position, the number of prompts passed, is its whole state."""

    def __init__(
        self, prompts: Sequence[Prompt], encode: Callable[[Prompt], Tensor], *, seed: int, max_prompt_tokens: int
    ) -> None:
        if not prompts:
            raise DataError("there are no training prompts")
        self._prompts = prompts
        self._encode = encode
        self._seed = seed
        self._limit = max_prompt_tokens

    def __getitem__(self, position: int) -> Prompt:
        """The prompt at a position; positions go on over epochs."""
        epoch, place = divmod(position, len(self._prompts))
        return self._prompts[Permutation(len(self._prompts), f"{self._seed}/order/{epoch}")(place)]

    def draw(self, position: int, count: int) -> Drawn:
        """The next `count` prompts that fit the token budget. Raises DataError when a whole epoch has none."""
        found: list[tuple[Prompt, Tensor]] = []
        places: list[int] = []
        too_long_in_row = num_too_long = 0
        while len(found) < count:
            prompt = self[position]
            ids = self._encode(prompt)
            position += 1
            if len(ids) <= self._limit:
                found.append((prompt, ids))
                places.append(position - 1)
                too_long_in_row = 0
                continue
            num_too_long += 1
            too_long_in_row += 1
            # an epoch may end and the next begin with long ones; twice their number is only reached if all are long
            if too_long_in_row >= 2 * len(self._prompts):
                raise DataError(
                    f"all {len(self._prompts)} training prompts are longer than train.max_prompt_tokens ({self._limit})"
                )
        return Drawn(tuple(found), position, num_too_long, tuple(places))
