"""The layout of a run directory, and how files come into it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.errors import CheckpointError, RecipeError


@dataclass(frozen=True)
class RunDir:
    """Paths under one run.

    recipe.yaml  run.json  metrics.jsonl  events.jsonl  report.html
    eval/step_000100.json  eval/step_000100.jsonl  samples/step_000100.jsonl
    checkpoints/step_000100/  student/  bad_batches/
    """

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def facts(self) -> Path:
        """What is known of the run beside its recipe: versions, device, sizes, how it ended."""
        return self.path / "run.json"

    @property
    def eval(self) -> Path:
        """Summaries and samples of evaluations."""
        return self.path / "eval"

    @property
    def checkpoints(self) -> Path:
        """One directory each."""
        return self.path / "checkpoints"

    @property
    def student(self) -> Path:
        """The final student, a Hugging Face directory."""
        return self.path / "student"

    def check_new(self) -> None:
        """Raises RecipeError where a run, or anything else, is there already."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RecipeError(
                f"run_dir {self.path} exists and is not empty; continue it with --resume, or choose another run_dir"
            )

    def check_started(self) -> None:
        """Raises RecipeError where there is no run to continue."""
        if not self.recipe.is_file():
            raise RecipeError(f"there is no run to resume in {self.path}: it has no recipe.yaml")

    def drop_after(self, step: int) -> None:
        """Removes evaluations and samples of later steps, which a resumed run writes again."""
        for folder in (self.eval, self.path / "samples"):
            for file in folder.glob("step_*.json*"):
                # a killed process may leave a file that it was writing aside
                if file.suffix == ".tmp" or int(file.stem.removeprefix("step_")) > step:
                    file.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Written aside, synced, renamed. Raises CheckpointError, naming the path, if it cannot be written."""
    aside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; free space or fix permissions"
        ) from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """`write_atomically` of JSON."""
    write_atomically(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: list[dict[str, object]]) -> None:
    """`write_atomically` of one object a line."""
    write_atomically(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
