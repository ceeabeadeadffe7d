"""Law 10: the values of schedules at the start, in the middle, at the end and past it; no state between the steps."""

from __future__ import annotations

import pytest

from understudy.losses.schedules import cosine_decay, learning_rate, linear_decay


def test_decays() -> None:
    assert [cosine_decay(step, 10) for step in (0, 5, 10, 11)] == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-15)
    assert [linear_decay(step, 10) for step in (0, 5, 10, 11)] == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-15)
    assert cosine_decay(0, 0) == linear_decay(0, 0) == 0.0


@pytest.mark.parametrize(("shape", "middle"), [("constant", 2.0), ("linear", 1.1), ("cosine", 1.1)])
def test_learning_rate(shape: str, middle: float) -> None:
    def at(step: int) -> float:
        return learning_rate(step, peak=2.0, num_steps=25, warmup_steps=4, shape=shape, final_share=0.1)  # type: ignore[arg-type]

    assert [at(step) for step in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert at(4) == 2.0
    assert at(14) == pytest.approx(middle)
    last = 2.0 if shape == "constant" else 0.2
    assert at(24) == pytest.approx(last)
    assert at(1000) == pytest.approx(last)
