"""Run tests under several CPU kernels, whose sums round differently, and print what passed, what failed and the time.

    python scripts/test_kernels.py                       laws, properties and trained methods under every kernel
    python scripts/test_kernels.py --kernel scalar       the same under one
    python scripts/test_kernels.py tests                 all tests; what is no option of ours goes to pytest

A test that passes under one kernel only depends on the last bit, or on the luck of one seed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["tests/laws", "tests/properties", "tests/e2e/test_methods.py"]
"""Other tests compare a run with itself, or ask browsers, networks and processes, which all kernels leave alike."""
KERNELS = {
    "native": {},
    "scalar": {"ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    # MKL's slowest path, the same on every processor
    "compatible": {"MKL_CBWR": "COMPATIBLE"},
}
CAPABILITY = "import torch; print(torch.backends.cpu.get_cpu_capability())"


def main() -> int:
    """Returns 1 where a test failed, or none passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="this kernel only; may be repeated")
    options, given = parser.parse_known_args()
    tests = given if any(not word.startswith("-") for word in given) else TESTS + given
    rows = [(name, *run(KERNELS[name], tests)) for name in options.kernel or KERNELS]
    print(f"\n{'kernel':12}{'vectors':>10}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for name, vectors, passed, failed, skipped, seconds in rows:
        print(f"{name:12}{vectors:>10}{passed:>8}{failed:>8}{skipped:>9}{seconds:>9.0f}")
    return int(any(failed or not passed for _, _, passed, failed, _, _ in rows))


def run(variables: dict[str, str], tests: list[str]) -> tuple[str, int, int, int, float]:
    """Returns the vector instructions that torch uses; how many passed, failed and were skipped; seconds."""
    others = {key: value for key, value in os.environ.items() if all(key not in each for each in KERNELS.values())}
    environment = others | variables
    question = [sys.executable, "-c", CAPABILITY]
    vectors = subprocess.check_output(question, env=environment, text=True).strip()  # noqa: S603 (fixed arguments)
    print("\n==", *(f"{key}={value}" for key, value in variables.items()), f"torch uses {vectors}", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        subprocess.run(command, cwd=ROOT, env=environment, check=False)  # noqa: S603 (the caller's own arguments)
        # there is none where pytest stopped before its first test
        suite = ElementTree.parse(report).getroot().find("testsuite") if report.exists() else None  # noqa: S314 (ours)
    count = {key: 0 if suite is None else int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed, skipped = count["failures"] + count["errors"], count["skipped"]
    return vectors, count["tests"] - failed - skipped, failed, skipped, time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
