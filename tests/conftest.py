"""Fixtures that every test may use."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import hypothesis
import pytest
import torch

# Triton's own functions are interpreted where this is set when they are first imported, and torch.compile imports them too
os.environ["TRITON_INTERPRET"] = "1"
with suppress(ImportError):
    import triton.language  # noqa: F401
del os.environ["TRITON_INTERPRET"]

# tiny models gain nothing from a second thread, and on shared cores two threads wait for each other
torch.set_num_threads(1)
# a test asserts no wall time: on shared cores any example may take a second
hypothesis.settings.register_profile("understudy", deadline=None)
hypothesis.settings.load_profile("understudy")


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data sets, tokenizers and weights that may lie beside the project."""
    path = Path(os.environ.get("UNDERSTUDY_SHARED", Path(__file__).parents[2] / "shared"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set UNDERSTUDY_SHARED to run this")
    return path
