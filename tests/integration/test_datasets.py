"""Tasks by the names of their data sets, read from local copies; the hub's own layout is imitated by files of its fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs import tiny_recipe
from understudy import config
from understudy.errors import DataError, RecipeError
from understudy.recipe import Recipe
from understudy.recipe.checks import check
from understudy.tasks import DATASETS, TASKS, File, Mathematics
from understudy.tasks.records import Records

LOCAL: dict[str, tuple[dict[str, str], int]] = {
    "gsm8k": ({"path": "gsm8k/train.jsonl", "test_path": "gsm8k/test.jsonl"}, 1319),
    "math500": ({"path": "math500/test.jsonl"}, 500),
    "aime24": ({"path": "aime_2024/test.jsonl"}, 30),
    "aime25": ({"path": "aime_2025/test.jsonl"}, 30),
    "amc23": ({"path": "amc_2023/test.jsonl", "prompt_field": "problem"}, 40),
}
"""Data set -> the keys by which its copy is read, and the prompts of its test split."""


def local(shared: Path, name: str, **changes: Any) -> Records:
    keys = {
        key: str(shared / "data" / value) if key.endswith("path") else value for key, value in LOCAL[name][0].items()
    }
    return TASKS[DATASETS[name].task](dataset=name, **keys, **changes)  # type: ignore[return-value]


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", LOCAL)
def test_a_local_copy_is_read_with_the_fields_of_the_data_set(shared: Path, name: str) -> None:
    task = local(shared, name)
    task.check_files()
    prompts = task.prompts("test")
    assert len(prompts) == LOCAL[name][1]
    assert all(prompt.id.startswith(f"{name}/") and prompt.reference for prompt in prompts)
    said = prompts[0].messages[-1]["content"]  # type: ignore[index]
    assert said.endswith("Please reason step by step, and put your final answer within \\boxed{}.")
    assert task.grade(prompts[0], f"\\boxed{{{prompts[0].reference[0]}}}").right  # type: ignore[index]
    assert (task.first_split == "train") == (name == "gsm8k")


def test_the_answer_of_gsm8k_follows_its_mark(shared: Path) -> None:
    prompt = local(shared, "gsm8k").prompts("test")[0]
    assert prompt.reference == ("18",)
    assert prompt.solution is not None
    assert prompt.solution.endswith("#### 18")


@pytest.mark.parametrize("name", [name for name, data in DATASETS.items() if data.hub])
def test_every_data_set_is_a_section_that_is_written_and_read_again(tmp_path: Path, name: str) -> None:
    data = DATASETS[name]
    # what is built from scratch reads no images
    student = {"model": "org/name", "build": None} if data.task == "vision" else {}
    # a sandbox that every machine has
    sandbox = {"sandbox": {"type": "process", "unsafe": True}} if data.task == "code" else {}
    section = {"type": data.task, "dataset": name, **sandbox}
    recipe = config.parse(Recipe, tiny_recipe(tmp_path, task=section, student=student))
    assert config.parse(Recipe, config.dump(recipe)) == recipe
    task = recipe.task
    assert task.name == name
    assert not task.is_local
    assert set(data.sizes) <= set(data.splits)
    task.check_files()
    for split in data.splits:
        task.check_split(split)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give dataset, a name that `understudy tasks` lists, or path"),
        ({"dataset": "gms8k"}, "there is no data set 'gms8k' of type math; did you mean 'gsm8k'"),
        ({"path": "x.jsonl"}, "prompt_field is missing"),
        ({"dataset": "gsm8k", "path": "x.jsonl", "revision": "main"}, "local files have none"),
        ({"dataset": "math500", "validation_share": 0.1}, "a share of the training rows, of which math500 has none"),
    ],
)
def test_settings_that_have_no_meaning(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mathematics(**settings)


def test_rows_are_chosen_by_conditions(tmp_path: Path) -> None:
    rows = [
        {"question": f"{level}?", "final_answer": str(level), "r1_solution_1": "s", "difficulty": level, "kind": kind}
        for level, kind in ((5.5, "a"), (6.0, "a"), (7, "b"), (8, "c"), (None, "a"))
    ]
    path = write(tmp_path / "rows.jsonl", *rows)
    hard = Mathematics(dataset="deepmath-103k", path=path)
    assert [prompt.reference for prompt in hard.prompts("train")] == [("6.0",), ("7",), ("8",)]
    assert hard.intake("train").num_rows == 3
    assert len(Mathematics(dataset="deepmath-103k", path=path, where=("difficulty >= 0",)).prompts("train")) == 4
    for where, num in ((("kind = a",), 3), (("kind != a",), 2), (("kind in b, c", "difficulty <= 7"), 1)):
        assert len(File(path=path, prompt_field="question", where=where).prompts("train")) == num
    with pytest.raises(DataError, match="at least one row that meets kind = z"):
        File(path=path, prompt_field="question", where=("kind = z",)).prompts("train")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no field 'knd'.*did you mean 'kind'"):
        File(path=path, prompt_field="question", where=("knd = a",)).check_files()
    with pytest.raises(DataError, match=r"field 'kind' is 'a'; where needs a number"):
        File(path=path, prompt_field="question", where=("kind >= 1",)).check_files()
    for where in ("difficulty", "difficulty >= hard", "= 3"):
        with pytest.raises(ValueError, match="where has"):
            File(path=path, prompt_field="question", where=(where,))


def test_references_that_are_lists_in_a_string(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": '["2", "two"]'}}
    task = Mathematics(dataset="skywork-or1", path=write(tmp_path / "rows.jsonl", row))
    assert task.prompts("train")[0].reference == ("2", "two")
    row["reward_model"] = {"ground_truth": "2 or two"}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: field 'reward_model\.ground_truth' is '2 or two'"):
        Mathematics(dataset="skywork-or1", path=write(tmp_path / "rows.jsonl", row), seed=1).prompts("train")


def test_a_data_set_for_measuring_only_is_evaluated_and_not_trained_on(shared: Path, tmp_path: Path) -> None:
    task = {"type": "math", "dataset": "aime25", "path": str(shared / "data/aime_2025/test.jsonl"), "chat": False}
    student = {"build": None, "model": str(tmp_path / "none")}
    values = tiny_recipe(tmp_path, task=task, eval={"split": "test"}, student=student, method={"type": "opd"})
    values["teacher"] = {"type": "local", "model": "none"}
    with pytest.raises(RecipeError, match="task: aime25 has no train split, so path alone is its test split"):
        check(config.parse(Recipe, values))
    with pytest.raises(RecipeError, match="none"):
        # the model is missing, the split is not
        check(config.parse(Recipe, values), training=False)


def test_an_unknown_field_is_told_with_its_key(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"problem": "1+1?", "answers": "2"})
    with pytest.raises(
        DataError, match=r"no field 'question'; fields: problem, answers; set prompt_field to the field"
    ):
        Mathematics(dataset="amc23", path=path).check_files()
    with pytest.raises(DataError, match=r"no field 'answer'.*did you mean 'answers'\?\); set reference_field to"):
        Mathematics(dataset="amc23", path=path, prompt_field="problem").prompts("test")


def test_another_file_is_read_with_the_same_keys(shared: Path, tmp_path: Path) -> None:
    other = local(shared, "gsm8k").on_file(write(tmp_path / "other.jsonl", {"question": "2+2?", "answer": "so #### 4"}))
    (prompt,) = other.prompts("test")
    assert prompt.reference == ("4",)
    assert prompt.messages is not None
    assert "boxed" in prompt.messages[0]["content"]
