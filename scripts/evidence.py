"""The evidence: a teacher, two students to start from, and the grid of every method. Goes on where it stopped."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

RUNS, RECIPES = Path("runs/evidence"), Path("recipes/evidence")
MODELS = ("teacher", "medium", "weak")
GRID = ("compare", f"{RECIPES}/distil.yaml", "--grid", f"{RECIPES}/grid.yaml", "--jobs", "2")


def is_finished(run_dir: Path) -> bool:
    """Whether there is a final student."""
    facts = run_dir / "run.json"
    return facts.is_file() and json.loads(facts.read_text())["status"] in ("finished", "good enough")


def understudy(*arguments: str) -> int:
    """Exit code of one command of the public command line."""
    print(f"\n$ understudy {' '.join(arguments)}", flush=True)
    command = [Path(sys.executable).with_name("understudy"), *arguments]
    return subprocess.run(command, check=False).returncode  # noqa: S603 (fixed arguments)


def main() -> int:
    """Stops at the first command that fails."""
    started = time.perf_counter()
    for name in MODELS:
        run_dir = RUNS / name
        if is_finished(run_dir):
            continue
        resume = ("--resume",) if (run_dir / "recipe.yaml").is_file() else ()
        code = understudy("train", f"{RECIPES}/{name}.yaml", *resume)
        if code:
            return code
    code = understudy(*GRID)
    print(f"\nevidence: {(time.perf_counter() - started) / 60:.0f} min. The table is {RUNS}/distil-compare/table.md")
    return code


if __name__ == "__main__":
    sys.exit(main())
