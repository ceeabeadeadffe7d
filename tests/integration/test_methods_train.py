"""Every method trains: from a recipe, cut and resumed, on several ranks, in other micro-batches, in several updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.processes import run_ranks
from tests.runs import (
    SHORT,
    assert_close_run,
    assert_same_run,
    distillation,
    grade_by_length,
    judge_by_length,
    metric_rows,
    save_tiny_model,
    train,
    train_all,
    train_in_two,
    write_recipe,
)
from understudy.methods import METHODS
from understudy.tasks import Arithmetic
from understudy.teachers.judges.verbal import VerbalTeacher
from understudy.trainer import loop
from understudy.types import Sample

pytestmark = pytest.mark.slow

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
    "ovd_resample": (
        "ovd",
        {"method": {"reward": "verbal", "on_reject": "resample", "score": "expectation"}, "responses": None},
    ),
    "ovd_continue": (
        "ovd",
        {
            "method": {"on_reject": "continue", "steps": True},
            "responses": {"type": "teacher", "continue_template": "{problem}{steps}"},
        },
    ),
    "kdrl_anneal": ("kdrl", {"method": {"anneal_to": 0.0}}),
    "gkd_off_policy": ("gkd", {"method": {"on_policy_share": 0.5}, "responses": SOLUTIONS}),
    "grpo_updates": ("grpo", {"train": {"minibatches": 2, "passes": 2}}),
    "reopold_updates": ("reopold", {"train": {"prompts_per_step": 3, "minibatches": 2}}),
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
        changes["teacher"] = SHORT | {"model": save_tiny_model(folder / "judge", seed=9)}
    if "teacher" in extra and more.get("teacher") != "keep":
        changes["teacher"] = None
    given = (extra | more).get("responses")
    if given is not None:
        # the store looks at all of them when it is opened
        changes |= {"responses": given, "task": {"num_solutions": 100}}
    return changes


@pytest.fixture(autouse=True)
def _judged_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Arithmetic, "grade", grade_by_length)
    monkeypatch.setattr(VerbalTeacher, "judge", judge_by_length)


@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_four_steps_are_two_and_two_more(tmp_path: Path, name: str) -> None:
    """Bit-equal; and every step has a finite loss and moves the weights."""
    changes = recipe_of(tmp_path, name)
    whole = train(tmp_path / "whole", **changes)
    assert_same_run(whole, train_in_two(tmp_path / "cut", 2, **changes))
    rows = metric_rows(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize(("guided", "at"), [("beside", 1), ("beside", 3), ("replace", 1), ("replace", 3)])
def test_prefixes_fade_on_after_a_resume(tmp_path: Path, guided: str, at: int) -> None:
    """Cut while prefixes fade (4 steps), and at the last of them."""
    changes = recipe_of(tmp_path, "tropd", steps=5, **GROUPS)
    changes["method"] |= {"anneal_steps": 4, "guided": guided}
    whole = train(tmp_path / "whole", **changes)
    assert_same_run(whole, train_in_two(tmp_path / "cut", at, **changes))
    assert ["prefix_tokens" in row for row in metric_rows(whole)] == [True, True, True, True, False]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_phases_go_on_after_a_resume(tmp_path: Path, at: int) -> None:
    """Cut before the last step of the first phase, at the boundary, and after the first step of the second."""
    changes = recipe_of(tmp_path, "phases")
    whole = train(tmp_path / "whole", **changes)
    assert_same_run(whole, train_in_two(tmp_path / "cut", at, **changes))
    assert [row["phase"] for row in metric_rows(whole)] == [0.0, 0.0, 1.0, 1.0]
    assert ["trusted" in row for row in metric_rows(whole)] == [True, True, False, False]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_moving_teacher_goes_on_after_a_resume(tmp_path: Path, dtype: str) -> None:
    """It is the average of the student, whose state is in the checkpoint."""
    changes = recipe_of(tmp_path, "gkd")
    teacher = {"type": "privileged", "ema": 0.5, "template": "{solution};{prompt}", "dtype": dtype}
    changes |= {"teacher": teacher, "sampling": {"max_new_tokens": 12}}
    whole = train(tmp_path / "whole", **changes)
    assert_same_run(whole, train_in_two(tmp_path / "cut", 2, **changes))
    started = train(tmp_path / "still", **changes | {"teacher": teacher | {"ema": None}})
    assert metric_rows(whole)[1]["loss"] != metric_rows(started)[1]["loss"]


RANKED = {
    "tropd": {},
    "reopold": {"method": {"switch_step": 1, "top_share": 0.3}},
    "grpo": {"train": {"prompts_per_step": 3, "samples_per_prompt": 3}},
    "gopd": {},
    "grpo_updates": {},
    "reopold_updates": {"method": {"switch_step": 0, "top_share": 0.5}},
    "dapo": {"train": {"prompts_per_step": 3, "samples_per_prompt": 3}},
    "ovd": {},
    "ovd_continue": {},
}
"""What is drawn for each token, cut over the step, compared in groups that lie on both ranks, divided over several updates
(of which one has no sample on the second rank), or drawn anew."""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each run of `RANKED`, trained by two processes."""
    folders = {}
    for name, more in RANKED.items():
        folder = folders[name] = tmp_path_factory.mktemp(name)
        write_recipe(folder, **_merged(recipe_of(folder, name, steps=3), more))
    run_ranks(train_all, *folders.values(), folder=tmp_path_factory.mktemp("ranks"))
    return folders


def _merged(changes: dict[str, Any], more: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return changes | {name: changes.get(name, {}) | section for name, section in more.items()}


@pytest.mark.parametrize("name", RANKED)
def test_two_ranks_are_one(tmp_path: Path, name: str, two_ranks: dict[str, Path]) -> None:
    """Gradients are sums in another order. Adam divides them by their size, so a rounding moves a weight by up to lr where
    the gradient is itself one; elsewhere by much less."""
    folder = two_ranks[name]
    changes = _merged(recipe_of(folder, name, steps=3), RANKED[name])
    alone = train(tmp_path, **changes)
    assert_close_run(alone, folder / "run", atol=5e-5)


@pytest.mark.parametrize("name", ["reopold", "tropd", "grpo", "dr_grpo", "opd_discount", "ovd", "aopd"])
def test_neither_the_cut_nor_the_order_changes_a_run(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Denominators, quantiles and draws are those of the step. Tolerances: sums in another order, divided by Adam."""
    changes = recipe_of(tmp_path, name, steps=3)
    if name == "reopold":
        changes["method"] |= {"switch_step": 1}
    whole = train(tmp_path / "whole", **changes)
    cut = train(tmp_path / "cut", **_merged(changes, {"train": {"micro_batch_tokens": 40}}))
    assert_close_run(whole, cut, atol=5e-5)
    plain = loop.prepare

    def backwards(student: Any, method: Any, samples: Sequence[Sample], **options: Any) -> Any:
        return plain(student, method, samples[::-1], **options)

    monkeypatch.setattr(loop, "prepare", backwards)
    assert_close_run(whole, train(tmp_path / "backwards", **changes), atol=5e-5)
