"""The layout of a run directory."""

from __future__ import annotations

from pathlib import Path

from understudy.errors import RecipeError


class RunDir:
    """Paths under one run.

    recipe.yaml    the resolved recipe          metrics.jsonl  numbers of every step
    run.json       versions, device, ending     events.jsonl   warnings and skipped steps
    doctor.json    checks before the first step of the process that wrote it last
    report.html    student/  the final student, a Hugging Face directory
    eval/step_000100.json and .jsonl            samples/step_000100.jsonl
    checkpoints/step_000100/                    bad_batches/
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.facts = path / "run.json"
        self.doctor = path / "doctor.json"
        self.eval = path / "eval"
        self.samples = path / "samples"
        self.bad_batches = path / "bad_batches"
        self.checkpoints = path / "checkpoints"
        self.student = path / "student"

    def check_new(self) -> None:
        """Raises RecipeError where a run, or anything else but traces of engines that did not start, is there already."""

        def is_trace(path: Path) -> bool:
            if path.name == "weights" and path.is_dir():
                return not any(path.iterdir())
            return path.match("engine_*.log")

        if self.path.exists() and (not self.path.is_dir() or not all(map(is_trace, self.path.iterdir()))):
            raise RecipeError(
                f"run_dir {self.path} exists and is not empty; continue it with --resume, or choose another run_dir"
            )

    def check_started(self) -> None:
        """Raises RecipeError where there is no run to continue."""
        if not self.recipe.is_file():
            raise RecipeError(f"there is no run to resume in {self.path}: it has no recipe.yaml")

    def drop_after(self, step: int) -> None:
        """Removes evaluations and samples of later steps, which a resumed run writes again."""
        for folder in (self.eval, self.samples):
            for file in folder.glob("step_*.json*"):
                # a killed process may leave a file that it was writing aside
                if file.suffix == ".tmp" or int(file.stem.removeprefix("step_")) > step:
                    file.unlink()
