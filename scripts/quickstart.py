"""The quickstart: four commands of the public command line, and the time that they took together."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

RUNS = Path("runs/quickstart")
STEPS = (
    ("1/4  a teacher, from scratch", ("train", "recipes/quickstart/teacher.yaml")),
    (
        "2/4  the teacher on held-out problems",
        ("eval", "runs/quickstart/teacher", "eval.split=test", "eval.problems=1000"),
    ),
    ("3/4  a small student, shown a few solutions", ("train", "recipes/quickstart/start.yaml")),
    (
        "4/4  on-policy distillation: the student's own attempts, judged by the teacher",
        ("train", "recipes/quickstart/distil.yaml"),
    ),
)


def main() -> int:
    """Stops at the first command that fails."""
    understudy = Path(sys.executable).with_name("understudy")
    started = time.perf_counter()
    for title, arguments in STEPS:
        print(f"\n{title}\n$ understudy {' '.join(arguments)}", flush=True)
        code = subprocess.run([understudy, *arguments], check=False).returncode  # noqa: S603 (fixed arguments)
        if code:
            return code
    print(f"\nquickstart: {time.perf_counter() - started:.0f} s. Open {RUNS / 'distil' / 'report.html'} in a browser.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
