"""Versions, commit and hardware of a run, for run.json and the model card."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("understudy", "torch", "transformers", "tokenizers", "datasets", "peft")


def installed() -> dict[str, str]:
    """Versions of Python and of the packages that compute; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit of this package's source, "-dirty" behind it where files were changed; None outside a checkout."""
    here = Path(__file__).parent
    asked = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--match=", "--exclude=*"]
    try:
        inside = subprocess.run(  # noqa: S603 (fixed arguments)
            ["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name],  # noqa: S607
            capture_output=True,
            timeout=10,
            check=False,
        )
        if inside.returncode != 0:
            return None
        found = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def hardware(device: torch.device) -> str:
    """The card, or the processor and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = platform.processor() or platform.machine()
    with suppress(OSError):  # Linux alone has it, and Python does not read it
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else platform.machine()
    return f"{processor}, {torch.get_num_threads()} of {os.cpu_count()} threads"
