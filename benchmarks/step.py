"""Whole optimizer steps (generate, score, update), ours beside TRL's DistillationTrainer, in one run.

Both distil the same student (0.14 M parameters) from the same teacher (0.8 M) with the same objective (full-vocabulary
reverse KL at temperature 1), batch 128, 32 new tokens, AdamW at 1e-3, and no logging or saving between. They take turns,
each in a process of its own; the medians over all steps after the first ten are compared.

    understudy train recipes/evidence/addition/sure.yaml
    understudy train recipes/evidence/addition/medium.yaml
    python benchmarks/step.py            # needs pip install understudy[bench]
    python benchmarks/step.py --turns 5 --json step.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

BATCH, NEW_TOKENS, LR, WARM_UP = 128, 32, 1e-3, 10
SAMPLES_PER_STEP = float(BATCH)


def run_ours(student: str, teacher: str, steps: int, folder: str) -> list[dict[str, float]]:
    """Seconds by phase of each step, from the metrics.jsonl of a run that is started as users start it."""
    import yaml

    recipe = {
        "run_dir": f"{folder}/run",
        "student": {"model": student},
        "teacher": {"type": "local", "model": teacher},
        "task": {"type": "arithmetic", "family": "addition"},
        "method": {"type": "gkd", "beta": 1.0},
        "sampling": {"max_new_tokens": NEW_TOKENS},
        "train": {"steps": steps, "prompts_per_step": BATCH, "lr": LR, "save_samples_every": 0},
    }
    path = Path(folder) / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    subprocess.run([sys.executable, "-m", "understudy", "train", str(path)], check=True)
    rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    # time_s is the clock of the run: a step is what lies between two lines
    return [
        {"step": row["time_s"] - before["time_s"]}
        | {name: row[f"{name}_s"] for name in ("generate", "score", "update")}
        for before, row in pairwise(rows)
    ]


def run_trl(student: str, teacher: str, steps: int, folder: str) -> list[dict[str, float]]:
    """Seconds of each step by the trainer's callbacks; generation is timed around its own method."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    from understudy.tasks import Arithmetic

    rows: list[dict[str, float]] = []
    generate_s = [0.0]

    class Timed(DistillationTrainer):  # type: ignore[misc]
        """Times generation."""

        def _generate(self, prompts: list[object]) -> object:
            begun = time.perf_counter()
            found = super()._generate(prompts)
            generate_s[0] = time.perf_counter() - begun
            return found

    class Clock(TrainerCallback):  # type: ignore[misc]
        """From the end of a step to the end of the next."""

        last = None

        def on_step_end(self, *_: object, **__: object) -> None:
            now = time.perf_counter()
            if self.last is not None:
                rows.append({"step": now - self.last, "generate": generate_s[0]})
            self.last = now

    prompts = [prompt.text for prompt in Arithmetic().prompts("train")[: BATCH * steps]]
    arguments = DistillationConfig(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        max_steps=steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_completion_length=NEW_TOKENS,
        temperature=1.0,
        beta=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
        teacher_model_init_kwargs={"dtype": "float32"},
    )
    trainer = Timed(
        model=student,
        teacher_model=teacher,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(student),
        callbacks=[Clock()],
    )
    trainer.train()
    return rows


def measure(which: str, student: str, teacher: str, steps: int) -> list[dict[str, float]]:
    """One turn in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--only", which, "--student", student, "--teacher", teacher]
        command += ["--steps", str(steps), "--json", str(out), "--folder", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{which} failed:\n{done.stderr[-3000:]}")
        rows: list[dict[str, float]] = json.loads(out.read_text())
        return rows[WARM_UP:]


def main() -> None:
    """Takes turns, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="runs/evidence/addition/medium/student")
    parser.add_argument("--teacher", default="runs/evidence/addition/sure/student")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        run = run_ours if args.only == "ours" else run_trl
        args.json.write_text(json.dumps(run(args.student, args.teacher, args.steps, args.folder)))
        return
    rows: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
    for turn in range(args.turns):
        for which, found in rows.items():
            found += measure(which, args.student, args.teacher, args.steps)
            print(f"turn {turn + 1}, {which}: {1e3 * statistics.median(row['step'] for row in found):.0f} ms a step")
    rates = {}
    for which, found in rows.items():
        median = {name: statistics.median(row[name] for row in found) for name in found[0]}
        rates[which] = SAMPLES_PER_STEP / median["step"]
        phases = ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in median.items())
        print(f"{which:5} {rates[which]:6.0f} samples/s   {phases}")
    print(f"ours / TRL: {rates['ours'] / rates['trl']:.2f} x the samples per second")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
