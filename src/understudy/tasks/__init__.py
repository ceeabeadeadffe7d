"""Tasks: where prompts come from and how a response is graded. A task is its own section of the recipe."""

from __future__ import annotations

from collections.abc import Mapping

from understudy.tasks.arithmetic import Arithmetic, build_tokenizer
from understudy.tasks.base import Intake, Split, Task
from understudy.tasks.calls import Calls
from understudy.tasks.choice import Choice
from understudy.tasks.code import Code
from understudy.tasks.customers import Customers
from understudy.tasks.datasets import DATASETS, DataSet, Named
from understudy.tasks.hosted import OpenEnv, Verifiers
from understudy.tasks.in_memory import Rows
from understudy.tasks.instructions import Instructions
from understudy.tasks.math import Mathematics
from understudy.tasks.mix import PARTS, Mix
from understudy.tasks.overlap import num_repeated, overlap, overlap_message
from understudy.tasks.qa import QuestionAnswering
from understudy.tasks.records import File, Hub, Jsonl
from understudy.tasks.renderer import Renderer
from understudy.tasks.vision import Visual

TASKS: Mapping[str, type[Task]] = PARTS | {"mix": Mix}
"""`task.type` in a recipe -> its section."""

__all__ = [
    "DATASETS",
    "TASKS",
    "Arithmetic",
    "Calls",
    "Choice",
    "Code",
    "Customers",
    "DataSet",
    "File",
    "Hub",
    "Instructions",
    "Intake",
    "Jsonl",
    "Mathematics",
    "Mix",
    "Named",
    "OpenEnv",
    "QuestionAnswering",
    "Renderer",
    "Rows",
    "Split",
    "Task",
    "Verifiers",
    "Visual",
    "build_tokenizer",
    "num_repeated",
    "overlap",
    "overlap_message",
]
