"""Suites: evaluations on several tasks, each with its own number of samples and its own sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy import config
from understudy.errors import RecipeError, brief, nearest
from understudy.tasks import TASKS, Split, Task
from understudy.types import Sampling

_REASONING = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 32768}
"""As the model cards of Qwen3 and of DeepSeek-R1's distilled models have it."""
SUITES: Mapping[str, Mapping[str, Any]] = {
    "reasoning": {
        "sampling": _REASONING,
        "tasks": {
            **{
                name: {"task": {"type": "math", "dataset": name}, "samples_per_prompt": 32}
                for name in ("aime24", "aime25", "hmmt25", "amc23")
            },
            "math500": {"task": {"type": "math", "dataset": "math500"}, "samples_per_prompt": 4},
            "gsm8k": {"task": {"type": "math", "dataset": "gsm8k"}},
        },
    },
    "science": {
        "sampling": _REASONING,
        "tasks": {
            "gpqa-diamond": {"task": {"type": "choice", "dataset": "gpqa-diamond"}, "samples_per_prompt": 8},
            "mmlu-redux": {"task": {"type": "choice", "dataset": "mmlu-redux"}},
            "arc-challenge": {"task": {"type": "choice", "dataset": "arc-challenge"}},
        },
    },
    "instructions": {
        "sampling": {"temperature": 0.0, "max_new_tokens": 4096},
        "tasks": {name: {"task": {"type": "instructions", "dataset": name}} for name in ("ifeval", "ifbench")},
    },
    "code": {
        "sampling": _REASONING,
        "tasks": {
            "humaneval-plus": {"task": {"type": "code", "dataset": "humaneval-plus"}},
            "mbpp-plus": {"task": {"type": "code", "dataset": "mbpp-plus"}},
            "livecodebench-v6": {"task": {"type": "code", "dataset": "livecodebench-v6"}, "samples_per_prompt": 4},
        },
    },
}
"""Suites by their names, as a file would have them."""


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """A task of a suite."""

    task: Task = config.choice(TASKS)
    split: Split = "test"
    """The split of the task."""
    problems: int | None = None
    """Number of problems, the first of the split; None: all."""
    samples_per_prompt: int = 1
    """Responses to each prompt."""
    sampling: Sampling = Sampling()
    """Keys that are not set are those of the suite."""


def read_suite(name: str, overrides: Sequence[str] = ()) -> dict[str, SuiteTask]:
    """The tasks of a suite that has a name, or of a YAML file: `{sampling: {...}, tasks: {NAME: {task: {...}, ...}}}`.

    `overrides` are its keys, as in "tasks.gsm8k.samples_per_prompt=4". Raises RecipeError.
    """
    path = Path(name)
    if name not in SUITES and not path.is_file():
        raise RecipeError(f"there is no suite and no file {name!r}; {nearest(name, SUITES)}")
    values = config.override(SUITES[name] if name in SUITES else config.read_yaml(path), overrides)
    if unknown := values.keys() - {"sampling", "tasks"}:
        raise RecipeError(f"suite {name}: unknown key {sorted(unknown)[0]!r}; a suite has sampling and tasks")
    common, tasks = values.get("sampling") or {}, values.get("tasks")
    if not isinstance(common, Mapping) or not isinstance(tasks, Mapping) or not tasks:
        raise RecipeError(
            f"suite {name}: tasks is {brief(tasks)}; it must name at least one task, and sampling be a mapping"
        )
    found = {}
    for label, section in tasks.items():
        place = f"suite.tasks.{label}"
        if not isinstance(section, Mapping):
            raise RecipeError(f"{place} is {brief(section)}; it must be a mapping with a section task")
        own = section.get("sampling") or {}
        merged = {**section, "sampling": {**common, **own} if isinstance(own, Mapping) else own}
        found[str(label)] = config.parse(SuiteTask, merged, place)
    return found
