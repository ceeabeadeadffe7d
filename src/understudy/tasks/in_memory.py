"""Rows that a run is given from Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from understudy import given
from understudy.errors import RecipeError
from understudy.tasks.records import Records
from understudy.tasks.rows import Row, padded


@dataclass(frozen=True, kw_only=True)
class Rows(Records):
    """The task `rows`: rows of a Python program. A recipe has only names with a hash of them; `distil` gives the rows."""

    train: str
    """Name of the rows that are trained on."""
    validation: str | None = None
    """Name of the rows of the split `validation`."""
    test: str | None = None
    """Name of the rows of the split `test`."""

    @property
    def name(self) -> str:
        return "rows"

    def sources(self) -> Mapping[str, str]:
        names = {"train": self.train, "validation": self.validation, "test": self.test}
        return {split: name for split, name in names.items() if name is not None}

    def rows(self, source: str) -> Iterator[Row]:
        found = given.find(source)
        if found is None:
            raise RecipeError(f"task of type rows: {source!r} names no rows; give them from Python (understudy.distil)")
        for number, row in enumerate(found):
            # a datasets.Dataset is columnar
            yield (
                f"{source.removeprefix(given.PREFIX)}, row {number}",
                padded(row, found.features.arrow_schema) if hasattr(found, "features") else row,
            )
