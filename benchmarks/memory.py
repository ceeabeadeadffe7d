"""Peak memory of small runs on a CPU beside what `understudy plan` and the doctor say of them, and of ranks with shards.

Measured is the largest resident memory of a run less that of the same run with a model of a few thousand weights, which is the
program itself; of several ranks that of the first one. Responses never end early, so that every sample has its full length.

The C library returns each tensor's memory at once here, so that tensors alone are measured. By default a heap keeps what was
freed, between what is used: with checkpointing, where layers come and go, that doubles a small run.

    python benchmarks/memory.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from shapes import save_model, words

from understudy import config
from understudy.recipe import Recipe
from understudy.recipe.checks.room import Needs, amount, memory_items, peak, size_on_disk
from understudy.recipe.plan import Layout, machine_of, shapes_of, trainer_memory
from understudy.tasks import Arithmetic

NEW_TOKENS, PROMPT_TOKENS = 120, 8
SHORT = 30
"""Tokens of a response in a large vocabulary, whose logits fit into one chunk."""
CASES: dict[str, dict[str, Any]] = {
    "activations": {"hidden": 256, "layers": 8},
    "activations, computed twice": {"hidden": 256, "layers": 8, "train": {"gradient_checkpointing": True}},
    "weights": {"hidden": 768, "layers": 6, "train": {"micro_batch_tokens": 256}},
    "weights, LoRA": {"hidden": 768, "layers": 6, "lora": True, "train": {"micro_batch_tokens": 256}},
}
ALONE = {"UNDERSTUDY_STARTED": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""No settings of the program's own for the C library, and no heap for what is larger."""
TINY: dict[str, Any] = {"hidden": 32, "layers": 1}
RANKS = (1, 2, 4)
"""Ranks that hold a student in shards between them, and its teacher."""
VOCABULARY = 65_536
HEAD: dict[str, Any] = {"hidden": 512, "layers": 1, "vocabulary": VOCABULARY}
"""A student whose embedding and output layer are nearly all of it, trained by `sft`, so that no rank gathers it to write."""
IN_SHARDS: dict[str, dict[str, Any]] = {
    "weights and teacher": CASES["weights"] | {"shards": {"teachers": True}},
    "output layer, gathered": HEAD | {"shards": {}},
    "output layer, in slices": HEAD | {"shards": {"vocabulary": True}},
}


def save_models(folder: Path, hidden: int, layers: int, vocabulary: int | None) -> None:
    """A student and a teacher of one size that never end a response, and responses to train on in a large vocabulary."""
    tokenizer = Arithmetic(family="addition").tokenizer() if vocabulary is None else words(vocabulary)
    if vocabulary is not None:
        row = {"prompt": "t1 t2", "solution": " ".join(f"t{number}" for number in range(3, 3 + SHORT))}
        (folder / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 64))
    for seed, name in enumerate(("student", "teacher")):
        shape = {"hidden_size": hidden, "num_layers": layers, "num_heads": 8}
        save_model(folder / name, shape, tokenizer, seed=seed)


def recipe_of(
    folder: Path,
    *,
    lora: bool = False,
    train: dict[str, Any] | None = None,
    ranks: int = 1,
    shards: dict[str, Any] | None = None,
    vocabulary: int | None = None,
    **_: Any,
) -> dict[str, Any]:
    student: dict[str, Any] = {"model": str(folder / "student"), "dtype": "float32"}
    if lora:
        student["lora"] = {"rank": 8}
    sections: dict[str, Any] = {
        "teacher": {"type": "local", "model": str(folder / "teacher"), "dtype": "float32"},
        "task": {"type": "arithmetic", "family": "addition"},
        "method": {"type": "gkd", "beta": 1.0},
    }
    if vocabulary is not None:
        task = {"type": "jsonl", "path": str(folder / "rows.jsonl"), "prompt_field": "prompt", "chat": False}
        sections = {"task": task | {"solution_field": "solution"}, "method": {"type": "sft"}}
    if ranks > 1:
        sections["parallel"] = {"shard": ranks} | (shards or {})
    if shards is not None:
        train = {"compute_dtype": "float32"} | (train or {})
    return {
        **sections,
        "run_dir": str(folder / "run"),
        "student": student,
        "sampling": {"max_new_tokens": NEW_TOKENS if vocabulary is None else SHORT},
        "train": {"steps": 2, "prompts_per_step": 16, "max_prompt_tokens": PROMPT_TOKENS, "save_samples_every": 0}
        | (train or {}),
    }


def measure(case: dict[str, Any]) -> tuple[int, int]:
    """Bytes at the peak of a run, and those that are predicted for its models."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_models(folder, case["hidden"], case["layers"], case.get("vocabulary"))
        recipe = recipe_of(folder, **case)
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        command = [sys.executable, "-m", "understudy", "train", str(path), "--no-doctor"]
        if "ranks" in case:
            ranks = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(case["ranks"])]
            command[2:2] = [*ranks, "-m"]
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | ALONE
        )
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        measured = max(json.loads(line)["peak_memory_gib"] for line in lines) * 2**30
        parsed = config.parse(Recipe, recipe)
        if "ranks" in case:
            layout = Layout(
                shard=case["ranks"], vocabulary=bool(case["shards"].get("vocabulary") and case["ranks"] > 1)
            )
            one = machine_of(parsed, case["ranks"])
            return int(measured), peak(trainer_memory(parsed, shapes_of(parsed), one, layout))
        cpu = torch.device("cpu")
        student, teacher = (size_on_disk(str(folder / one), "float32", cpu) for one in ("student", "teacher"))
        assert student is not None
        assert teacher is not None
        if case.get("lora"):
            student = shapes_of(parsed)["student"].size
        needs = Needs(recipe=parsed, device=cpu, student=student, others={"teacher": teacher}, vocab_size=17)
        return int(measured), peak(memory_items(needs))


def main() -> None:
    """Prints a table."""
    program, _ = measure(TINY)
    print(f"the program itself: {amount(program)}")
    print(f"{'case':32} {'measured':>10} {'predicted':>10} {'predicted / measured':>21}")
    for name, case in CASES.items():
        measured, predicted = measure(case)
        own = measured - program
        print(f"{name:32} {amount(own):>10} {amount(predicted):>10} {predicted / own:>21.2f}", flush=True)
    for name, case in IN_SHARDS.items():
        for ranks in RANKS:
            program, _ = measure(TINY | {"shards": {}, "ranks": ranks})
            measured, predicted = measure(case | {"ranks": ranks})
            own = measured - program
            label = f"{name}, {ranks} rank{'s' * (ranks > 1)}"
            print(f"{label:32} {amount(own):>10} {amount(predicted):>10} {predicted / own:>21.2f}", flush=True)


if __name__ == "__main__":
    main()
