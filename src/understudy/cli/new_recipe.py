"""The recipe that `understudy init` writes: a commented template, with what a method and its data need filled in."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from understudy import config
from understudy.errors import RecipeError, nearest
from understudy.methods import METHODS
from understudy.models import config_on_disk, positions_of
from understudy.recipe import Recipe
from understudy.tasks import DATASETS, TASKS, Hub
from understudy.tasks.rows import read_rows

PROMPTS = ("messages", "prompt", "question", "problem", "instruction", "query", "conversations")
ANSWERS = (
    "reference",
    "answer",
    "final_answer",
    "ground_truth",
    "label",
    "target",
    "solution",
    "reward_model.ground_truth",
)
RESPONSES = ("solution", "response", "completion", "output", "answer")
"""Usual names of fields, the most likely first."""
ROW_TASKS = ("file", "jsonl", "hub")
"""Tasks that read rows."""
MARK = "####"
"""Stands before the final answer in GSM8K and data like it."""


def new_recipe(name: str, student: str, teacher: str, method: str, data: str | None, task: str | None) -> str:
    """The text of the recipe. Raises RecipeError for a method or data that need what only the user knows."""
    if method not in METHODS:
        raise RecipeError(f"there is no method {method!r}; {nearest(method, METHODS)}")
    try:
        chosen = METHODS[method]()
    except TypeError as error:
        raise RecipeError(
            f"the method {method} needs what only you can say; take another for init, and see: understudy methods {method}"
        ) from error
    uses = chosen.uses(1)
    text = (files("understudy") / "cli" / "recipe.yaml").read_text(encoding="utf-8")
    named = {"NAME": name, "STUDENT": json.dumps(student), "TEACHER": json.dumps(teacher)}
    text = re.sub(r"\b(NAME|STUDENT|TEACHER)\b", lambda found: named[found[0]], text)
    asked = chosen.needs - {"none", "reference"}
    if not asked:
        text = _replaced(text, "teacher", "")
    said = f"method:                     # see: understudy methods\n  type: {method}\n"
    if "verbal" in asked:
        text = text.replace("  type: local\n", "  type: verbal\n", 1)
        text = text.replace("# must share the student's tokenizer", "# may have another tokenizer than the student", 1)
        said += "  on_reject: drop           # or teacher, with `responses: {type: teacher}`\n"
    elif uses.prefixes or uses.fills_slots:
        said += "\nresponses: {type: teacher}  # prefixes or replacements of student samples\n"
    text = _replaced(text, "method", said)
    if uses.rewards:
        # the samples of a prompt are compared with each other
        text = text.replace("prompts_per_step: 64\n", "prompts_per_step: 16\n")
        text = text.replace("samples_per_prompt: 1\n", "samples_per_prompt: 8\n", 1)
    if data is not None or task is not None:
        section = _task(data, task)
        text = _replaced(text, "task", yaml.safe_dump({"task": section}, sort_keys=False, allow_unicode=True))
        if "validation_share" in section:
            text = text.replace("  split: test\n", "  split: validation\n")
    elif uses.given_responses:
        text = text.replace("  reference_field: answer\n", "  reference_field: answer\n  solution_field: answer\n")
    text = _fitted(text, Path(student).expanduser())
    recipe = config.parse(Recipe, config.load(text, "the recipe"))
    if data is not None:
        usual: dict[str, tuple[str, ...]] = {"reference": ANSWERS} if "outcome" in recipe.uses.rewards else {}
        if recipe.uses.given_responses and recipe.responses is None:
            usual["solution"] = RESPONSES
        for what, names in usual.items():
            if what not in recipe.task.carries:
                raise RecipeError(
                    f"the method {method} needs a {what} for each prompt, and {data} has no field of a usual name "
                    f"({', '.join(names)}); write the recipe without --data, and name it as task.{what}_field, or take "
                    "another --method"
                )
    return text


def _fitted(text: str, student: Path) -> str:
    """The text for a student on this machine, which may have few positions and no chat template."""
    positions = positions_of(config_on_disk(str(student)))
    if positions is not None:
        room = min(1024, max(1, positions // 2))
        text = text.replace("max_new_tokens: 1024\n", f"max_new_tokens: {room}\n")
    if (file := student / "tokenizer_config.json").is_file():
        has_template = (student / "chat_template.jinja").is_file() or '"chat_template"' in file.read_text(
            encoding="utf-8"
        )
        if not has_template and "\n  prompt_field:" in text:
            text = text.replace("\n  prompt_field:", "\n  chat: false\n  prompt_field:", 1)
    return text


def _replaced(text: str, section: str, new: str) -> str:
    """The text with another section of that name, up to the next empty line."""
    return re.sub(rf"^{section}:.*?\n\n", lambda _: f"{new}\n" if new else "", text, flags=re.MULTILINE | re.DOTALL)


def _task(data: str | None, task: str | None) -> dict[str, Any]:
    """The section of a task by its type, or of a file or a data set of the hub by the names of its fields."""
    if data is None:
        if task is None or task not in TASKS:
            raise RecipeError(f"there is no task {task!r}; {nearest(str(task), TASKS)}")
        if task not in ROW_TASKS:
            try:
                TASKS[task]()
            except (TypeError, ValueError) as error:
                raise RecipeError(
                    f"--task {task} needs what only you can say; write the recipe without it, and edit its section task"
                ) from error
            return {"type": task}
        raise RecipeError(f"--task {task} needs --data: a file, or a data set of the hub")
    path = Path(data).expanduser()
    if data in DATASETS and not path.exists() and task in (None, DATASETS[data].task):
        named = DATASETS[data]
        share = {} if "test" in named.splits else {"validation_share": 0.1}
        return {"type": named.task, "dataset": data} | share
    if task not in (None, *ROW_TASKS):
        raise RecipeError(f"--task {task} reads no --data; give one of them")
    if task == "hub" or (task is None and not path.exists() and not path.suffix and data.count("/") == 1):
        section = {"type": "hub", "dataset": data}
        rows = Hub(dataset=data, prompt_field="").rows("train")
    else:
        section = {"type": "file", "path": data}
        rows = read_rows(data)
    _, row = next(iter(rows), ("", {}))
    if not row:
        raise RecipeError(f"{data} has no rows")
    row = {**row, **config.flatten(row)}
    fields = {"prompt_field": PROMPTS, "reference_field": ANSWERS, "solution_field": RESPONSES}
    found = {key: name for key, usual in fields.items() if (name := _first(usual, row)) is not None}
    if "prompt_field" not in found:
        raise RecipeError(
            f"{data} has the fields {', '.join(map(str, row))}, none of which is usual for prompts "
            f"({', '.join(PROMPTS)}); write the recipe without --data, and name them in its section task"
        )
    if MARK in str(row.get(found.get("reference_field", ""))):
        found["reference_after"] = MARK
    return section | found | {"validation_share": 0.1}


def _first(usual: Sequence[str], row: Any) -> str | None:
    return next((name for name in usual if name in row), None)
