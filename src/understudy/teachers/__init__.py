"""Who judges the student's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from understudy.linear.head import LMHead
from understudy.types import Need, Sample, Scores

from .local import Local, LocalTeacher


class Teacher(Protocol):
    """Scores of responses, aligned to their token ids."""

    @property
    def name(self) -> str:
        """As prompts name it (`Prompt.teacher`)."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever scores may: what a cache of scores is keyed by."""
        ...

    @property
    def head(self) -> LMHead | None:
        """With `Scores.hidden` it gives whole rows; None where the teacher cannot."""
        ...

    def score(self, samples: Sequence[Sample], need: frozenset[Need], *, k: int | None = None) -> list[Scores]:
        """One for each sample, in order. Raises ScoreError for a need that this teacher cannot meet."""
        ...


TEACHERS: dict[str, type[Local]] = {"local": Local}
"""`teacher.type` in a recipe -> its section."""

__all__ = ["TEACHERS", "Local", "LocalTeacher", "Teacher"]
