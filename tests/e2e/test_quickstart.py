"""The quickstart in a reduced form: through the command line, the student gets better by more than chance explains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from understudy.eval.estimators import paired_difference
from understudy.recipe import load_recipe

ROOT = Path(__file__).parents[2]
REDUCED = {
    "teacher": {
        "student": {"build": {"architecture": "llama", "hidden_size": 64, "num_layers": 2, "num_heads": 4}},
        "train": {"steps": 1200, "stop_at": 0.97},
    },
    "start": {
        "student": {"build": {"architecture": "llama", "hidden_size": 32, "num_layers": 2, "num_heads": 4}},
        "train": {"stop_at": 0.25, "prompts_per_step": 32, "steps": 2000},
        "task": {"num_solutions": 400},
    },
    "distil": {"train": {"steps": 120, "prompts_per_step": 64}, "eval": {"problems": 100, "samples_per_prompt": 2}},
}


def reduced(folder: Path, name: str) -> Path:
    """The recipe of the quickstart on two-digit additions, with all its paths in `folder`."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / "quickstart" / f"{name}.yaml").read_text())
    for section, changes in REDUCED[name].items():
        values[section] |= changes
    values["task"]["digits"] = 2
    text = yaml.safe_dump(values).replace("runs/quickstart", str(folder))
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def understudy(*arguments: object) -> str:
    """Standard output of the command line; fails with its error."""
    command = [sys.executable, "-m", "understudy", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def scores(run_dir: Path, step: int) -> list[float]:
    """Mean score of each problem, in order."""
    rows = [json.loads(line) for line in (run_dir / "eval" / f"step_{step:06d}.jsonl").read_text().splitlines()]
    problems: dict[str, list[float]] = {}
    for row in rows:
        problems.setdefault(row["prompt_id"], []).append(row["score"])
    return [sum(values) / len(values) for values in problems.values()]


@pytest.mark.slow
def test_distillation_improves_the_student_significantly(tmp_path: Path) -> None:
    for name in ("teacher", "start", "distil"):
        understudy("train", reduced(tmp_path, name))
    run_dir = tmp_path / "distil"
    found = paired_difference(scores(run_dir, 0), scores(run_dir, 120), "test")
    # the lower end of the 95 % interval, at 100 problems: a gain of at least ten points that is no accident
    assert found.low > 0.1, found
    assert "better" in (run_dir / "report.html").read_text()

    table = understudy("eval", run_dir, "eval.problems=20", "--out", tmp_path / "again")
    assert "avg@2" in table
    assert (tmp_path / "again" / "step_000000.jsonl").read_text().count("\n") == 40
    written = tmp_path / "samples.jsonl"
    understudy("sample", run_dir, "--num", 3, "--samples", 2, "--out", written)
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(rows) == 6
    assert all(row["prompt"].endswith(":") and "#" in row["response"] for row in rows)
    assert "12+34:" in understudy("sample", run_dir, "--prompt", "12+34:")
    assert str(run_dir / "report.html") in understudy("report", run_dir)


def test_the_quickstart_is_what_the_makefile_runs() -> None:
    """The recipes parse, and each one starts from what the one before leaves."""
    recipes = {name: load_recipe(ROOT / "recipes" / "quickstart" / f"{name}.yaml") for name in REDUCED}
    assert recipes["distil"].student.model == recipes["start"].run_dir + "/student"
    assert recipes["distil"].teacher is not None
    assert recipes["distil"].teacher.model == recipes["teacher"].run_dir + "/student"
