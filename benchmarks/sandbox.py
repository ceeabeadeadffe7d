"""Cost of a sandbox: programs per second, and processor time of each, beside a bare `python -c pass`.

python benchmarks/sandbox.py --programs 200
python benchmarks/sandbox.py --data ../shared/data/humaneval/HumanEval.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from understudy.sandbox import Bubblewrap, Process, Program
from understudy.tasks.verifiers.code_tests import humaneval_tests

TESTS = "assert square(3) == 9\nassert square(-2) == 4"
SQUARE = "def square(n):\n    return n * n\n"


def busy_s() -> float:
    """Processor time of the whole machine; that of ended namespaces is nobody's."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    user, nice, system, _, _, irq, softirq, *_ = ticks
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure(name: str, workers: int, run: Callable[[], Sequence[object]]) -> None:
    """Prints a line. Processor time is that of the machine, so that it should do nothing else."""
    begin, busy = time.perf_counter(), busy_s()
    num = len(run())
    seconds, busy = time.perf_counter() - begin, busy_s() - busy
    each = f"{1e3 * seconds * workers / num:7.1f} ms each, {1e3 * busy / num:7.1f} ms of processor time"
    print(f"{name:42} {num / seconds:7.1f} programs/s {each}", flush=True)


def main() -> None:
    """Measures floor and sandboxes in one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data", type=Path, help="HumanEval: its solutions are graded")
    given = parser.parse_args()
    box = Bubblewrap(workers=given.workers)
    print(box.check())

    def bare(*options: str) -> list[object]:
        command = [sys.executable, *options, "-c", "pass"]
        with ThreadPoolExecutor(given.workers) as pool:
            return list(pool.map(lambda _: subprocess.run(command, check=True), range(given.programs)))

    short = [Program("pass")] * given.programs
    graded = [Program(SQUARE, tests=TESTS, names=("square",))] * given.programs
    process = Process(unsafe=True, workers=given.workers)
    measure("python -c pass", given.workers, bare)
    measure("python -I -S -c pass", given.workers, lambda: bare("-I", "-S"))
    measure("process, unsafe: a program", given.workers, lambda: process.run_many(short))
    measure("bubblewrap: a program", given.workers, lambda: box.run_many(short))
    measure("bubblewrap: a program with its tests", given.workers, lambda: box.run_many(graded))
    if given.data is not None:
        rows = [json.loads(line) for line in given.data.read_text().splitlines()]
        found = [(row, humaneval_tests(row)) for row in rows]
        solved = [
            Program(row["prompt"] + row["canonical_solution"], tests=test.tests, names=test.names)
            for row, test in found
        ]
        measure("bubblewrap: solutions of HumanEval", given.workers, lambda: box.run_many(solved))
        print(f"{sum(result.passed for result in box.run_many(solved))} of {len(solved)} pass")


if __name__ == "__main__":
    main()
