"""The order in which prompts are drawn: a function of (seed, position), the same for every number of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from understudy.errors import DataError
from understudy.tasks.lazy import Permutation
from understudy.types import Prompt, Request


@dataclass(frozen=True)
class Drawn:
    """Prompts drawn together, and where the next draw begins."""

    prompts: tuple[tuple[Prompt, Tensor], ...]
    """Each with its token ids."""
    next_position: int
    num_too_long: int
    """Prompts that were passed over because they are too long."""
    positions: tuple[int, ...] = ()
    """Of the prompts."""

    @property
    def names(self) -> list[str]:
        """Ids of the prompts; one that was drawn twice is there twice."""
        return [prompt.id for prompt, _ in self.prompts]

    def requests(self, num_samples: int, num_before: Mapping[str, int]) -> list[Request]:
        """Returns `num_samples` requests for each prompt, with indices that no other request for the prompt has.

        `num_before`: how often each prompt was drawn already. Randomness is keyed by the index, so a prompt that comes
        again must not have the same one.
        """
        drawn = Counter(num_before)
        made = []
        for prompt, ids in self.prompts:
            made += [Request(prompt, drawn[prompt.id] * num_samples + n, ids) for n in range(num_samples)]
            drawn[prompt.id] += 1
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
        """Returns the next `count` prompts that fit the token budget. Raises DataError when a whole epoch has none."""
        chosen: list[tuple[Prompt, Tensor]] = []
        positions: list[int] = []
        too_long_in_row = num_too_long = 0
        while len(chosen) < count:
            prompt = self[position]
            ids = self._encode(prompt)
            if len(ids) <= self._limit:
                chosen.append((prompt, ids))
                positions.append(position)
                too_long_in_row = 0
            else:
                num_too_long += 1
                too_long_in_row += 1
            position += 1
            # an epoch may end and the next begin with long ones; twice their number is only reached if all are long
            if too_long_in_row >= 2 * len(self._prompts):
                raise DataError(
                    f"all {len(self._prompts)} training prompts are longer than train.max_prompt_tokens ({self._limit})"
                )
        return Drawn(tuple(chosen), position, num_too_long, tuple(positions))
