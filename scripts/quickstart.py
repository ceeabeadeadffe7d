"""The quickstart: four commands of the public command line, and the time that they took together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

RUNS = Path("runs/quickstart")
STEPS = (
    ("1/4  a teacher, from scratch", ("train", "recipes/quickstart/teacher.yaml"), 46),
    ("2/4  a small student, shown a few solutions", ("train", "recipes/quickstart/start.yaml"), 19),
    (
        "3/4  on-policy distillation: the student's own attempts, judged by the teacher",
        ("train", "recipes/quickstart/distil.yaml"),
        28,
    ),
    (
        "4/4  the student on 1,000 test problems, which played no part so far",
        ("eval", "runs/quickstart/distil", "eval.split=test", "eval.problems=1000"),
        7,
    ),
)
"""Title, command, and its share of the time in percent, from which the time left is told."""


def main() -> int:
    """Stops at the first command that fails."""
    understudy = Path(sys.executable).with_name("understudy")
    # models this small gain little from a second thread, and on busy cores two threads wait for each other
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    started = time.perf_counter()
    done = 0
    for title, arguments, share in STEPS:
        passed = time.perf_counter() - started
        left = f"  ({passed:.0f} s so far, about {passed / done * (100 - done):.0f} s left)" if done else ""
        print(f"\n{title}{left}\n$ understudy {' '.join(arguments)}", flush=True)
        command = [understudy, *arguments]
        code = subprocess.run(command, check=False, env=environment).returncode  # noqa: S603 (fixed arguments)
        if code:
            return code
        done += share
    print(f"\nquickstart: {time.perf_counter() - started:.0f} s. Open {RUNS / 'distil' / 'report.html'} in a browser.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
