"""How samples are grouped into requests and forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from understudy.types import Sample

Item = TypeVar("Item")


def by_prompt(samples: Sequence[Sample]) -> list[list[int]]:
    """Returns indices of samples with the same prompt tokens, in the order of their first."""
    groups: dict[bytes, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.token_ids[: sample.prompt_length].numpy().tobytes(), []).append(index)
    return list(groups.values())


def chunks(
    items: Iterable[Item], size: Callable[[Item], int], most: int, max_items: int | None = None
) -> list[list[Item]]:
    """Cuts items, in their order, into lists whose sizes add up to at most `most`, or of one item."""
    found: list[list[Item]] = []
    room = 0
    for item in items:
        if not found or size(item) > room or len(found[-1]) == max_items:
            found.append([])
            room = most
        found[-1].append(item)
        room -= size(item)
    return found
