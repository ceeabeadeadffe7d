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

import torch

from understudy.models import load_causal_lm, load_tokenizer, save_hf
from understudy.recipe import load_recipe
from understudy.report import svg
from understudy.report.read import Series


def prune(teacher: str, drop: set[int], out: str) -> None:
    """Saves a copy of the teacher without these layers, counted from 0."""
    model = load_causal_lm(teacher, dtype="float32")
    decoder, config = model.get_decoder(), model.config
    if not drop < set(range(len(decoder.layers))):
        raise SystemExit(f"--drop must name some of the layers 0 to {len(decoder.layers) - 1}")
    kept = [layer for index, layer in enumerate(decoder.layers) if index not in drop]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    decoder.layers = torch.nn.ModuleList(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [kind for index, kind in enumerate(config.layer_types) if index not in drop]
    config.num_hidden_layers = len(kept)
    save_hf(model, load_tokenizer(teacher), Path(out))
    print(f"{out}: {len(kept)} layers, {sum(weight.numel() for weight in model.parameters()):,} parameters", flush=True)


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
