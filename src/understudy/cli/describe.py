"""The commands `methods`, which lists them, and `init`, which writes a recipe to begin with."""

from __future__ import annotations

import inspect
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_type_hints

import yaml

from understudy import config
from understudy.errors import RecipeError, nearest
from understudy.files import write_atomically
from understudy.methods import METHODS
from understudy.recipe import Recipe
from understudy.trainer.console import Console


def methods(name: str | None) -> None:
    """Prints the table of methods, or the keys of one with their defaults."""
    with Console() as console:
        if name is None:
            rows = []
            for key, kind in METHODS.items():
                summary = (inspect.getdoc(inspect.getmodule(kind)) or "").splitlines()[0].partition(": ")[2]
                has_default = all(item.default is not MISSING for item in fields(kind))
                needs = ", ".join(sorted(kind().needs)) if has_default else "what its parts ask for"
                rows.append([key, summary, needs])
            console.table("methods", ["type", "what it minimises", "asks the teacher for"], rows)
            return
        if name not in METHODS:
            raise RecipeError(f"there is no method {name!r}; {nearest(name, METHODS)}")
        kind = METHODS[name]
        console.note(inspect.getdoc(inspect.getmodule(kind)) or "")
        console.note("")
        console.note(inspect.getdoc(kind) or "")
        hints = get_type_hints(kind)
        rows = [
            [item.name, config.words(hints[item.name]), "required" if item.default is MISSING else str(item.default)]
            for item in fields(kind)
        ]
        if rows:
            console.table(f"method: {{type: {name}, ...}}", ["key", "values", "default"], rows)


def init(path: Path, student: str, teacher: str) -> str:
    """Writes the recipe and returns what to do next. Raises RecipeError where the file exists."""
    if path.exists():
        raise RecipeError(f"{path} exists; choose another file")
    text = TEMPLATE.format(student=json.dumps(student), teacher=json.dumps(teacher), name=path.stem)
    config.parse(Recipe, yaml.safe_load(text))
    write_atomically(path, text)
    return f"wrote {path}; check it with: understudy train {path} --dry-run"


TEMPLATE = """\
# A recipe of understudy. Check it:  understudy train THIS_FILE --dry-run
# Every key can also be set on the command line:  understudy train THIS_FILE train.lr=2e-6

run_dir: runs/{name}        # everything that the run writes
seed: 0                     # the same seed draws the same prompts and samples

student:
  model: {student}          # a directory or a hub name
  dtype: float32            # precision of the weights that are trained
  # template_kwargs: {{enable_thinking: false}}   # for the chat template
  # lora: {{rank: 16, alpha: 32}}                 # train adapters only

teacher:
  type: local
  model: {teacher}          # must share the student's tokenizer
  dtype: auto               # the checkpoint's own
  # offload: true           # in host memory between uses

task:                       # where prompts come from, and how answers are graded
  type: hub
  dataset: openai/gsm8k
  config: main
  split_train: train
  split_test: test
  prompt_field: question
  reference_field: answer
  reference_after: "####"   # the answer follows this mark
  template: "{{prompt}}\\nReason step by step and put the final answer in \\\\boxed{{}}."
  verifier: math

method:                     # see: understudy methods
  type: gkd
  beta: 1.0                 # 1: reverse KL, 0: forward KL

sampling:
  temperature: 1.0          # of student and teacher alike
  max_new_tokens: 1024

train:
  steps: 200
  prompts_per_step: 64
  samples_per_prompt: 1
  max_prompt_tokens: 512    # longer prompts are left out and counted
  lr: 1.0e-5
  warmup_steps: 10
  schedule: cosine
  final_lr_share: 0.1
  compute_dtype: bfloat16   # mixed precision
  micro_batch_tokens: 16384 # lower it when memory runs out
  gradient_checkpointing: true
  save_every: 50

eval:
  every: 50
  split: test
  problems: 200
  samples_per_prompt: 1

loggers: []                 # tensorboard, wandb, trackio; metrics.jsonl is always written
"""
