"""The simulation behind docs/scaling.md: exact where nothing is random, and near what was measured."""

from __future__ import annotations

import importlib.util
import sys
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scaling() -> Any:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "scripts" / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules["scaling"] = module
    spec.loader.exec_module(module)
    return module


def speeds(scaling: Any, **changes: Any) -> Any:
    plain = {
        "samples": 8,
        "engines": 2,
        "rows": 4,
        "token_s": 0.01,
        "row_s": 0.0,
        "teachers": 1,
        "request_s": lambda: 0.0,
        "score_s": 0.001,
        "request_tokens": 1e9,
        "update_s": 0.5,
        "push_s": 0.25,
    }
    return scaling.Speeds(**plain | changes)


def test_one_after_the_other_the_phases_add_up(scaling: Any) -> None:
    step_s, *_ = scaling.simulate(speeds(scaling), repeat(100.0), None)
    # 100 tokens, a request with 800, update, push
    assert step_s == pytest.approx(1.0 + 0.8 + 0.5 + 0.25)
    # twice the turns where engines have room for half of the samples, and slower where each sample adds time
    step_s, *_ = scaling.simulate(speeds(scaling, rows=2), repeat(100.0), None)
    assert step_s == pytest.approx(2 * 1.0 + 0.8 + 0.75)
    step_s, *_ = scaling.simulate(speeds(scaling, row_s=0.005), repeat(100.0), None)
    assert step_s == pytest.approx(100 * (0.01 + 4 * 0.005) + 0.8 + 0.75)


def test_overlapped_a_step_takes_as_long_as_its_slowest_part(scaling: Any) -> None:
    slow_update = speeds(scaling, update_s=5.0, push_s=0.0)
    for staleness in (1, 2):
        step_s, _, _, trainer = scaling.simulate(slow_update, repeat(100.0), staleness)
        assert step_s == pytest.approx(5.0)
        assert 0.9 < trainer <= 1.0
    # engines whose rows are all taken write as fast as they can
    slow_engines = speeds(scaling, update_s=0.1, score_s=1e-5, push_s=0.0)
    step_s, engines, *_ = scaling.simulate(slow_engines, repeat(100.0), 2)
    assert step_s == pytest.approx(1.0)
    assert engines > 0.9


def test_it_agrees_with_the_measurement_as_the_page_says(scaling: Any) -> None:
    worst = []
    for name, (_, generate, rest, ratios) in scaling.MEASURED.items():
        found = [one / max(generate, rest) for one in scaling.measured_case(name)]
        worst += [abs(made / real - 1) for made, real in zip(found, ratios, strict=True)]
    assert sum(one <= 0.105 for one in worst) >= 9
    assert max(worst) < 0.22
    assert scaling.checked_table() in scaling.PAGE.read_text()
