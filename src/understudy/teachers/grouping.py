"""Splits items into requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


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
