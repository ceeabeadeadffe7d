"""`understudy tasks`: the list, and what a verifier says of gold, empty and foreign answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs import write_recipe
from understudy.cli import tasks
from understudy.errors import RecipeError
from understudy.tasks import DATASETS, TASKS, Arithmetic, File, Mathematics, Mix
from understudy.tasks.audit import audit, cases
from understudy.tasks.overlap import problem_key


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def command(source: str, *overrides: str, **options: Any) -> bool:
    settings: dict[str, Any] = {"split": None, "evaluation": False, "model": None, "num": 100_000}
    return tasks.check(source, overrides, **settings | options)


ROWS = [{"question": f"{n}+1?", "answer": f"so #### {n + 1}"} for n in range(5)]


def test_gold_empty_and_foreign_answers(tmp_path: Path) -> None:
    task = Mathematics(dataset="gsm8k", path=write(tmp_path / "rows.jsonl", *ROWS))
    found = audit(task, list(cases(task, task.prompts("train"))))
    assert found.num_cases == {"gold": 5, "empty": 5, "of another problem": 5}
    assert found.surprises == ()
    assert not found.failed


def test_every_accepted_answer_is_gold_and_no_own_one_is_foreign(tmp_path: Path) -> None:
    rows = [{"q": "a", "a": ["1", "one"]}, {"q": "b", "a": "1"}, {"q": "c", "a": "3"}]
    task = File(path=write(tmp_path / "rows.jsonl", *rows), prompt_field="q", reference_field="a", verifier="exact")
    found = audit(task, list(cases(task, task.prompts("train"))))
    assert found.num_cases == {"gold": 4, "empty": 3, "of another problem": 3}
    assert found.surprises == ()


def test_a_wrong_gold_answer_fails_unless_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the verifier does not read an answer of more than a thousand characters
    row = {"question": "x?", "answer": "#### " + "1+" * 600 + "1"}
    task = Mathematics(dataset="gsm8k", path=write(tmp_path / "rows.jsonl", *ROWS, row))
    prompts = task.prompts("train")
    found = audit(task, list(cases(task, prompts)))
    (one,) = (one for one in found.surprises if one.case.kind == "gold")
    assert one.case.prompt.id == prompts[-1].id
    assert "longer than" in one.note
    assert found.failed
    monkeypatch.setitem(DATASETS["gsm8k"].mistakes, problem_key(prompts[-1]), "no final answer")  # type: ignore[arg-type]
    found = audit(task, list(cases(task, prompts)))
    assert [one.mistake for one in found.surprises if one.case.kind == "gold"] == ["no final answer"]
    assert not found.failed


def test_programs_are_graded_by_their_solution_and_shown_in_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"text": "Add.", "test_list": [f"assert f(1) == 2, {'x' * 1000!r}"], "code": "def f(n):\n    return n + 1"},
        {"text": "Endless.", "test_list": ["while True: pass\nassert f(1)"], "code": "def f(n):\n    return n + 1"},
        {"text": "Wrong.", "test_list": ["assert f(1) == 3"], "code": "def f(n):\n    return n + 1"},
    ]
    path = write(tmp_path / "rows.jsonl", *rows)
    assert not command("mbpp", f"path={path}", "sandbox={type: process, unsafe: true, cpu_s: 1, wall_s: 2}")
    shown = capsys.readouterr()
    assert "gold                 1.0              1 of 3" in shown.out
    assert "grade: 9/9 in" in shown.out
    assert "timed out" in shown.out + shown.err
    assert all(len(line) < 400 for line in shown.out.splitlines() if line.startswith("--- "))


def test_answers_that_are_equal_in_mathematics_are_shown_and_fail_nothing(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "#### 1/2"}, {"question": "b", "answer": "#### 0.5"}]
    task = Mathematics(dataset="gsm8k", path=write(tmp_path / "rows.jsonl", *rows))
    found = audit(task, list(cases(task, task.prompts("train"))))
    assert {one.case.kind for one in found.surprises} == {"of another problem"}
    assert not found.failed


def test_solutions_of_computed_tasks_and_parts_of_a_mix() -> None:
    task = Mix(parts={"sums": Arithmetic(digits=1), "chain": Arithmetic(family="chain", operations=1)})
    found = audit(task, list(cases(task, list(task.prompts("train"))[:20])))
    assert found.num_cases["gold"] == 20
    assert [one for one in found.surprises if one.case.kind != "of another problem"] == []


@pytest.mark.parametrize(
    ("name", "path", "num"),
    [
        ("gsm8k", "gsm8k/test.jsonl", 60),
        ("aime24", "aime_2024/test.jsonl", 30),
        ("mmlu-stem", "mmlu_stem/test.jsonl", 60),
        ("ifeval", "ifeval/input_data.jsonl", 60),
    ],
)
def test_real_data_pass(
    shared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, path: str, num: int
) -> None:
    monkeypatch.setattr("understudy.tasks.verifiers.instructions.find_spec", lambda name: True)
    assert command(name, f"path={shared / 'data' / path}", num=60)
    shown = capsys.readouterr().out
    assert shown.count(f"--- {name}/") == 3
    assert f"{num} of {num}" in shown


def test_prompts_are_shown_as_the_model_reads_them(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(shared / "tokenizers/qwen")
    assert command("aime25", f"path={shared / 'data/aime_2025/test.jsonl'}", model=model, num=3)
    assert "boxed{}.<|im_end|>\n<|im_start|>assistant" in capsys.readouterr().out


def test_the_tasks_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = {"type": "math", "dataset": "gsm8k", "path": write(tmp_path / "rows.jsonl", *ROWS), "chat": False}
    recipe = str(write_recipe(tmp_path, eval={"split": "train"}, eval_task=held_out))
    assert command(recipe, num=10)
    assert "arithmetic/addition, test split: 10 prompts" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="no test split"):
        command(recipe, evaluation=True, split="test")


def test_the_list_and_one_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    tasks.show_all()
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*DATASETS, *TASKS))
    tasks.show_one("deepmath-103k")
    assert "difficulty >= 6" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="'aime23'; did you mean 'aime2"):
        tasks.show_one("aime23")
    with pytest.raises(RecipeError, match="no data set and no recipe 'gms8k'; did you mean 'gsm8k'"):
        command("gms8k")
    with pytest.raises(RecipeError, match="--split is 'dev'"):
        command("gsm8k", split="dev")
