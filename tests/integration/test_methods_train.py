"""Every method trains: from a recipe, cut and resumed, on several ranks, in other micro-batches, in several updates."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import (
    SHORT,
    assert_close_run,
    assert_same_run,
    distillation,
    grade_by_length,
    metric_rows,
    save_tiny_model,
    train,
    train_in_two,
    weights,
    write_recipe,
)
from understudy.methods import METHODS
from understudy.tasks import Arithmetic

GROUPS = {"prompts_per_step": 4, "samples_per_prompt": 2}
SOLUTIONS = {"type": "solutions"}
EXTRA: dict[str, dict[str, Any]] = {
    "topk": {"method": {"k": 4}},
    "eopd": {"method": {"k": 4}},
    "aopd": {"method": {"k": 4}},
    "tropd": {"method": {"k": 4, "anneal_steps": 6}, "responses": SOLUTIONS},
    "ovd": {"method": {"threshold": 5}, "responses": SOLUTIONS, "judge": True, "train": GROUPS},
    "grpo": {"teacher": None, "train": GROUPS},
    "dr_grpo": {"teacher": None, "train": GROUPS},
    "dapo": {"teacher": None, "train": GROUPS},
    "kdrl": {"method": {"beta": 0.1}, "train": GROUPS},
    "sft": {"teacher": None},
    "phases": {
        "method": {"parts": [{"until": 0.5, "type": "tropd", "k": 4, "anneal_steps": 2}, {"type": "opd"}]},
        "responses": SOLUTIONS,
    },
}
"""What a method needs beside a teacher that is loaded here."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tropd_replace": ("tropd", {"method": {"guided": "replace"}, "train": GROUPS}),
    "tropd_scalar": ("tropd", {"method": {"outlier": "scalar", "also_positive": True}}),
    "opd_discount": ("opd", {"method": {"discount": 0.9}}),
    "opd_baseline": ("opd", {"method": {"baseline": True}}),
    "gopd_full": ("gopd", {"method": {"form": "full"}}),
    "topk_student": ("topk", {"method": {"support": "student"}}),
    "grpo_distil_kl": ("grpo", {"teacher": "keep", "method": {"distil_coef": 0.5, "kl_coef": 0.1}}),
    "dapo_overlong": ("dapo", {"method": {"overlong_buffer": 8}}),
    "ovd_verbal_resample": ("ovd", {"method": {"reward": "verbal", "on_reject": "resample", "score": "expectation"}}),
    "kdrl_anneal": ("kdrl", {"method": {"anneal_to": 0.0}}),
    "gkd_off_policy": ("gkd", {"method": {"on_policy_share": 0.5}, "responses": SOLUTIONS}),
    "opd_tis": ("opd", {"method": {"correction": "tis"}}),
}


def recipe_of(folder: Path, name: str, *, steps: int = 4, **train_changes: Any) -> dict[str, Any]:
    """Changes of the tiny recipe for a method, or one of `VARIANTS`."""
    method, more = VARIANTS.get(name, (name, {}))
    extra = EXTRA.get(method, {})
    changes = distillation(folder)
    changes["method"] = {"type": method} | extra.get("method", {}) | more.get("method", {})
    changes["train"] = {"steps": steps} | extra.get("train", {}) | more.get("train", {}) | train_changes
    if extra.get("judge"):
        changes["teacher"] = SHORT | {"model": save_tiny_model(folder / "judge", seed=9, sharp=50.0)}
    if "teacher" in extra and more.get("teacher") != "keep":
        changes["teacher"] = None
    if "responses" in extra | more:
        changes["responses"] = (extra | more)["responses"]
    return changes


@pytest.fixture(autouse=True)
def _graded_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Arithmetic, "grade", grade_by_length)


@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_four_steps_are_two_and_two_more(tmp_path: Path, name: str) -> None:
    """Bit-equal; and every step has a finite loss and moves the weights."""
    changes = recipe_of(tmp_path, name)
    whole = train(tmp_path / "whole", **changes)
    assert_same_run(whole, train_in_two(tmp_path / "cut", 2, **changes))
    rows = metric_rows(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
