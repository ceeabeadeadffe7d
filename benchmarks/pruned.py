"""Distils a model into a copy of itself that lacks some of its layers, and draws the curve.

    python benchmarks/stories.py --only prepare
    python benchmarks/pruned.py runs/stories/teacher --drop 2 --recipe recipes/stories/pruned.yaml

Further arguments are overrides of the recipe, such as train.steps=40.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from understudy.models import drop_layers, load_causal_lm, load_tokenizer, save_hf
from understudy.recipe import load_recipe
from understudy.report import svg
from understudy.report.read import Series


def prune(teacher: str, drop: set[int], out: str) -> None:
    """Saves a copy of the teacher without these layers, counted from 0."""
    model = load_causal_lm(teacher, dtype="float32")
    drop_layers(model, drop)
    save_hf(model, load_tokenizer(teacher), Path(out))
    size = sum(weight.numel() for weight in model.parameters())
    print(f"{out}: {model.config.num_hidden_layers} layers, {size:,} parameters", flush=True)


def picture(run_dir: Path, path: Path) -> None:
    """The loss of every step as an SVG that stands alone."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = Series.of({row["step"]: row["loss"] for row in rows})
    svg.save(
        svg.Chart("KL(S || T)", "KL(S || T), nats a token of the student's own samples", [svg.Line("KL", losses)]), path
    )
    first, last = losses.values[:5].mean(), losses.values[-5:].mean()
    print(f"{path}: {first:.3f} nats a token in the first 5 steps, {last:.3f} in the last 5")


def main() -> None:
    """Cuts, trains and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("--drop", required=True, help="layers to leave out, such as 14,18,22,26")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--picture", type=Path, default=Path("docs/pruned.svg"))
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.overrides)
    if recipe.student.model is None:
        raise SystemExit(f"{args.recipe} must say under student.model where the pruned model goes")
    prune(args.teacher, {int(layer) for layer in args.drop.split(",")}, recipe.student.model)
    command = ["train", str(args.recipe), f"teacher.model={args.teacher}", *args.overrides]
    subprocess.run([sys.executable, "-m", "understudy", *command], check=True)
    picture(Path(recipe.run_dir), args.picture)


if __name__ == "__main__":
    main()
