"""Builds the site of the documentation: the pages, their search, and the report of a short run.

The pages are those of docs/, with README.md as the first, and CONTRIBUTING.md and CHANGELOG.md beside them.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages above docs/, and their names in the site."""
SHORT_RUN = (
    ("teacher", "student.build.hidden_size=64", "train.steps=400", "train.stop_at=0.97"),
    ("start", "student.build.hidden_size=32", "train.stop_at=0.2"),
    (
        "distil",
        "student.model=runs/docs/start/student",
        "teacher.model=runs/docs/teacher/student",
        "train.steps=100",
        "train.lr=4.0e-3",
    ),
)
"""The quickstart on two-digit additions: its recipes, and what differs from them."""


def short_run() -> Path:
    """Makes the short run and returns its report."""
    shutil.rmtree(ROOT / "runs" / "docs", ignore_errors=True)
    for name, *overrides in SHORT_RUN:
        arguments = (
            "train",
            f"recipes/quickstart/{name}.yaml",
            f"run_dir=runs/docs/{name}",
            "task.digits=2",
            *overrides,
        )
        command = [sys.executable, "-m", "understudy", *arguments]
        # models this small gain little from a second thread
        subprocess.run(command, check=True, cwd=ROOT, env={"OMP_NUM_THREADS": "1"} | os.environ)  # noqa: S603
    return ROOT / "runs" / "docs" / "distil" / "report.html"


def build(report: Path, out: Path) -> int:
    """Copies the pages to `out` with the links that hold there, and builds `out`/site; a warning is an error."""
    pages = out / "docs"
    for folder in (pages, out / "site"):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", pages)
    for name, page in ROOT_PAGES.items():
        shutil.copy(ROOT / name, pages / page)
    for path in pages.rglob("*.md"):
        text = path.read_text().replace("](docs/", "](")
        for name, page in ROOT_PAGES.items():
            # a page of docs/ goes up one folder less than in the repository
            text = re.sub(rf"\]\((?:((?:\.\./)*)\.\./)?{name}", rf"](\g<1>{page}", text)
        path.write_text(text)
    shutil.copy(report, pages / "run.html")
    shutil.copy(ROOT / "zensical.toml", out)
    # docstrings are read from the sources that lie here
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    zensical = Path(sys.executable).with_name("zensical")
    return subprocess.run([zensical, "build", "--strict", "--clean"], check=False, cwd=out, env=environment).returncode  # noqa: S603


def main() -> int:
    """Makes a short run unless a report is given, then builds the site."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, help="show this report in place of a short run's")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs", help="folder to build in")
    arguments = parser.parse_args()
    code = build(arguments.report or short_run(), arguments.out)
    if not code:
        print(f"open {arguments.out / 'site' / 'index.html'} in a browser; it needs no server")
    return code


if __name__ == "__main__":
    sys.exit(main())
