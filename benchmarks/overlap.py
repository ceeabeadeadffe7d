"""Steps with generation, scoring and updates at the same time, beside the same steps one after the other.

Engine and teacher are stubs of vLLM's server around tiny models, whose delays are drawn from seeds: a token takes some
milliseconds, a request to the teacher some tenths of a second, and the engine writes one step's responses at a time. Means
over all steps after the first three; the target is 1.1 times the slower of (generate) and (score + update).

    python benchmarks/overlap.py
    python benchmarks/overlap.py --steps 40 --json overlap.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

PROMPTS, NEW_TOKENS, WARM_UP = 16, 24, 3
CASES = {"generation is slower": (40, 300), "about equal": (20, 450), "scoring is slower": (10, 700)}
"""Milliseconds of a token, and of a request to the teacher."""


def make_models(folder: Path) -> dict[str, Any]:
    """A student and a teacher from scratch."""
    from tests.runs import distillation

    return distillation(folder)


def seconds_of(run_dir: Path) -> dict[str, float]:
    """Mean of every number of a step that is a time, and of the samples' age."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    names = [name for name in rows[0] if name.endswith("_s") or name == "staleness"]
    return {name: statistics.fmean(row[name] for row in rows) for name in names}


def run(folder: Path, models: dict[str, Any], urls: tuple[str, str], steps: int, staleness: int | None) -> Path:
    """Trains as users do; its run directory."""
    from understudy import run
    from understudy.recipe import load_recipe
    from understudy.trainer.console import Console

    engine, teacher = urls
    recipe: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "device": "cpu",
        "student": {"model": models["student"]["model"]},
        "teacher": {"type": "http", "api": "vllm", "url": teacher, "model": models["teacher"]["model"]},
        "task": {"type": "arithmetic", "family": "addition", "digits": 2},
        "method": {"type": "opd"},
        "rollout": {"type": "vllm", "url": engine, "dtype": "float32"},
        "sampling": {"max_new_tokens": NEW_TOKENS},
        "train": {"steps": steps, "prompts_per_step": PROMPTS, "lr": 1e-4, "save_samples_every": 0},
    }
    if staleness is not None:
        recipe["async"] = {"max_staleness": staleness}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with Console(quiet=True) as console:
        return run.train(load_recipe(folder / "recipe.yaml"), console=console).run_dir.path


def measure(folder: Path, models: dict[str, Any], case: tuple[int, int], steps: int) -> dict[str, Any]:
    """Seconds of a step in turn and overlapped, each with servers of its own."""
    from tests.processes import stub

    token_ms, score_ms = case
    found: dict[str, Any] = {}
    for staleness in (None, 0, 1, 2):
        with contextlib.ExitStack() as stack:
            place = folder / f"{token_ms}-{score_ms}-{staleness}"
            place.mkdir(parents=True)
            options = ["--token-latency", f"lognormal:{token_ms / 1000}:0.3:1", "--concurrency", str(PROMPTS)]
            engine = stack.enter_context(stub(models["student"]["model"], place / "engine.log", *options))
            delay = f"lognormal:{score_ms / 1000}:0.3:2"
            teacher = stack.enter_context(stub(models["teacher"]["model"], place / "teacher.log", "--latency", delay))
            name = "in turn" if staleness is None else f"max_staleness {staleness}"
            found[name] = seconds_of(run(place, models, (engine.url, teacher.url), steps, staleness))
    return found


def show(name: str, found: dict[str, Any]) -> None:
    """One table."""
    plain = found["in turn"]
    generate, rest = plain["generate_s"], plain["score_s"] + plain["update_s"] + plain["push_s"]
    slower = max(generate, rest)
    print(f"\n{name}: generate {generate:.2f} s, score + update {rest:.2f} s (of it push {plain['push_s']:.3f} s)")
    print(f"  {'':16} {'step, s':>8} {'over the slower':>16} {'over the sum':>13} {'age, steps':>11}")
    for label, values in found.items():
        step = values["step_s"]
        print(
            f"  {label:16} {step:8.2f} {step / slower:16.2f} {step / (generate + rest):13.2f} {values['staleness']:11.2f}"
        )


def main() -> None:
    """Prints the tables; --json writes all numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=23)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    everything = {}
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder) / "models")
        for name, case in CASES.items():
            everything[name] = measure(Path(folder), models, case, args.steps)
            show(name, everything[name])
    if args.json is not None:
        args.json.write_text(json.dumps(everything, indent=2))


if __name__ == "__main__":
    main()
