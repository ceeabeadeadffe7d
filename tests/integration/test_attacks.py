"""A sample of the attacks of `make attacks`, which carries out hundreds of each kind."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def attacks() -> Any:
    path = Path(__file__).parents[2] / "scripts" / "attacks.py"
    spec = importlib.util.spec_from_file_location("attacks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("kind", "num"), [("recipes", 25), ("teacher", 12), ("texts", 12), ("secrets", 23)])
def test_attacks_hold(attacks: Any, kind: str, num: int) -> None:
    assert attacks.attack(kind, num, seed=0) == []
