"""The commands `tasks`, `tasks show` and `tasks check`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast, get_args

from understudy import config
from understudy.errors import RecipeError, nearest, written
from understudy.format import count
from understudy.recipe import load_recipe
from understudy.recipe.checks import Files
from understudy.tasks import DATASETS, TASKS, Renderer, Split, Task
from understudy.tasks.audit import KINDS, Audit, audit, cases
from understudy.trainer.checkpoint import RunDir
from understudy.trainer.console import Console
from understudy.types import Prompt

NUM_PROMPTS = 3
"""Prompts that are shown."""
MAX_LISTED = 20
"""Surprises of each kind that are listed."""
MAX_CHARS = 300
"""Characters of an answer or a response that are shown: tests of a program are long."""


def show_all() -> None:
    """Prints every data set with a name, and every type of task."""
    with Console() as console:
        rows = []
        for name, data in DATASETS.items():
            splits = ", ".join(
                f"{split} {data.sizes[split]:,}" if split in data.sizes else split for split in data.splits
            )
            kind = TASKS[data.task]
            verifier = str(getattr(kind, "graded_by", getattr(kind, "verifier", "")))
            rows.append([name, data.task, splits, verifier, data.licence, data.hub or "local files"])
        console.table("data sets", ["dataset", "type", "splits and rows", "verifier", "licence", "hub"], rows)
        names: dict[type[Task], list[str]] = {}
        for name, kind in TASKS.items():
            names.setdefault(kind, []).append(name)
        kinds = []
        for kind, known in names.items():
            # "The task `math`: GSM8K, MATH-500 and others. ..."
            said = (inspect.getdoc(kind) or "").replace("\n", " ").partition(". ")[0].partition(": ")[2]
            kinds.append([", ".join(known), said])
        console.table("types of tasks", ["type", "prompts"], kinds)


def show_one(name: str) -> None:
    """Prints all that is known of a data set. Raises RecipeError for an unknown name."""
    if name not in DATASETS:
        raise RecipeError(f"there is no data set {name!r}; {nearest(name, DATASETS)}")
    data = DATASETS[name]
    facts: dict[str, object] = {
        "task": f"{{type: {data.task}, dataset: {name}}}",
        "hub": f"https://huggingface.co/datasets/{data.hub}" if data.hub else "not there: path names a copy",
        "configurations": ", ".join(config or "the only one" for config in data.configs) if data.hub else "",
        "splits": ", ".join(
            f"{split}: {own}" + (f" ({data.sizes[split]:,} rows)" if split in data.sizes else "")
            for split, own in data.splits.items()
        ),
        **{key: written(list(value) if isinstance(value, tuple) else value) for key, value in data.keys.items()},
        "licence": data.licence,
        "source": data.source,
        "access": "the hub asks to accept terms first" if data.gated else "open",
        "known mistakes": "; ".join(f"{key}: {why}" for key, why in data.mistakes.items()) or "none",
    }
    with Console() as console:
        console.table(name, ["", ""], [[key, str(value)] for key, value in facts.items() if value != ""])


def check(
    source: str, overrides: Sequence[str], *, split: str | None, evaluation: bool, model: str | None, num: int
) -> bool:
    """Grades a task's own answers and shows prompts; returns whether all is as it should be. Raises RecipeError."""
    if split is not None and split not in get_args(Split):
        raise RecipeError(f"--split is {split!r}; it must be one of {', '.join(get_args(Split))}")
    task, renderer = _task(source, overrides, evaluation, model)
    chosen = cast(Split, split or ("test" if _has_test(task) else task.first_split))
    prompts = list(islice(task.prompts(chosen), num))
    with Console() as console:
        console.note(f"{task.name}, {chosen} split: {count(len(prompts), 'prompt')}")
        intake = task.intake(chosen)
        if intake is not None and intake.num_skipped:
            console.warn(f"rows_skipped: {intake.num_skipped:,} of {intake.num_rows:,} ({'; '.join(intake.skipped)})")
        for prompt in prompts[:NUM_PROMPTS]:
            console.note(
                f"\n--- {prompt.id}, answer {_cut(', '.join(prompt.reference or ('none',)))}\n{_shown(prompt, renderer)}"
            )
        known = list(cases(task, prompts))
        with console.progress("grade", len(known)) as advance:
            found = audit(task, known, advance)
        _show(console, found)
    return not found.failed


def _task(source: str, overrides: Sequence[str], evaluation: bool, model: str | None) -> tuple[Task, Renderer | None]:
    """The task of a data set's name or of a recipe, and the renderer of its student or of `model`, where one is known."""
    if source in DATASETS:
        values: Mapping[str, Any] = config.override({"dataset": source}, overrides)
        task: Task = config.parse(TASKS[DATASETS[source].task], values, "task")
        if model is None:
            return task, None
        from understudy.models import load_tokenizer, load_vision

        tokenizer = load_tokenizer(model)
        return task, Renderer(tokenizer, vision=load_vision(model, tokenizer) if task.has_images else None)
    path = Path(source)
    if not path.exists():
        raise RecipeError(f"there is no data set and no recipe {source!r}; {nearest(source, DATASETS)}")
    recipe = load_recipe(
        RunDir(path).recipe if path.is_dir() else path, [*overrides, *([f"student.model={model}"] if model else [])]
    )
    files = Files(recipe, training=False, fetch=False)
    return recipe.held_out if evaluation else recipe.task, files.renderer if files.knows_tokenizer else None


def _has_test(task: Task) -> bool:
    try:
        task.check_split("test")
    except RecipeError:
        return False
    return True


def _shown(prompt: Prompt, renderer: Renderer | None) -> str:
    """The prompt as the model reads it; without a tokenizer its messages."""
    if renderer is None:
        return prompt.conversation
    return str(renderer.tokenizer.decode(renderer.start(prompt), skip_special_tokens=False))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}..."


def _show(console: Console, found: Audit) -> None:
    rows = []
    for kind in KINDS:
        surprises = [one for one in found.surprises if one.case.kind == kind]
        known = sum(bool(one.mistake) for one in surprises)
        num = found.num_cases[kind]
        told = f"{num - len(surprises):,} of {num:,}" if num else "none is known"
        score = "1.0" if kind == "gold" else "0.0"
        rows.append([kind, score, told, f"{known} known" if known else ""])
    console.table("answers", ["response", "expected score", "as expected", "upstream mistakes"], rows)
    for kind in KINDS:
        listed = [one for one in found.surprises if one.case.kind == kind]
        for one in listed[:MAX_LISTED]:
            answers = _cut(", ".join(one.case.prompt.reference or ()))
            reason = f"known: {one.mistake}" if one.mistake else one.note
            console.warn(f"{one.case.prompt.id}: {kind} {_cut(one.case.response)!r} beside {answers!r} ({reason})")
        if len(listed) > MAX_LISTED:
            console.warn(f"and {len(listed) - MAX_LISTED:,} more of these")
