"""Runs that fail in typical ways, and what their alarms say: recipes/debugging and the models for it, a minute or less each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from understudy.format import interval
from understudy.report.read import read_run
from understudy.report.verdict import main_metric

RUNS = Path("runs/debugging")
FAILURES = ("healthy", "template", "temperature", "eos", "high-rate", "low-rate", "old-weights")
TEMPERATURE = 3.0


def main() -> int:
    """Makes what is not there yet; prints accuracy before and after, and every alarm."""
    for name in ("teacher", "start"):
        train(name)
    change_teacher("flat", flatten)
    change_teacher("endless", end_otherwise)
    for name in sys.argv[1:] or FAILURES:
        train(name)
        print(f"\n{name}: {describe(RUNS / name)}")
    return 0


def train(name: str) -> None:
    """Runs a recipe unless it has ended."""
    if (RUNS / name / "report.html").is_file():
        return
    shutil.rmtree(RUNS / name, ignore_errors=True)
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    command = [sys.executable, "-m", "understudy", "train", f"recipes/debugging/{name}.yaml"]
    subprocess.run(command, check=True, env=environment)  # noqa: S603


def change_teacher(name: str, change: Callable[[Tensor, Any], Tensor]) -> None:
    """Writes a copy of the teacher whose head [V, H] is changed."""
    source, out = RUNS / "teacher" / "student", RUNS / name / "student"
    shutil.copytree(source, out, dirs_exist_ok=True)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = change(weights["lm_head.weight"], AutoTokenizer.from_pretrained(source))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def flatten(head: Tensor, tokenizer: Any) -> Tensor:
    """Logits as a server gives them that divides by a temperature of its own."""
    return head / TEMPERATURE


def end_otherwise(head: Tensor, tokenizer: Any) -> Tensor:
    """A teacher that ends its turn with "+" in place of EOS."""
    rows = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("+")]
    changed = head.clone()
    changed[rows] = head[rows[::-1]]
    return changed


def describe(run_dir: Path) -> str:
    """Accuracy before and after, log-ratios, and the alarms with their steps."""
    run = read_run(run_dir)
    name = main_metric(run.evals[-1]) or ""
    before, after = (interval(name, record.metrics[name]) for record in (run.evals[0], run.evals[-1]))
    ratio = run.series["log_ratio"].values
    lines = [f"accuracy {before} to {after}, log-ratio {ratio[0]:.3f} to {ratio[-1]:.3f}"]
    for alarm in run.alarms:
        end = "" if alarm.last is None else f" to {alarm.last}"
        lines.append(f"  {alarm.name} from step {alarm.first}{end}: {alarm.measured}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
