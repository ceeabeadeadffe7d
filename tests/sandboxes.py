"""The sandbox of tests: where it cannot be had, tests are skipped, and say so loudly."""

from __future__ import annotations

import sys
import warnings

import pytest

from understudy.errors import RecipeError
from understudy.sandbox import Bubblewrap


def need_sandbox() -> Bubblewrap:
    """Bubblewrap with short limits; skips the test without it."""
    try:
        Bubblewrap().check()
    except RecipeError as error:
        banner = "*" * 70
        print(f"\n{banner}\n* NO SANDBOX: hostile programs were not tried. {error}\n{banner}", file=sys.__stderr__)
        warnings.warn(f"NO SANDBOX: {error}", stacklevel=2)
        pytest.skip(f"no sandbox: {error}")
    return Bubblewrap(cpu_s=2, wall_s=30, memory_mb=256, output_kb=64)
