"""Real files through the public command line: GSM8K, the Qwen tokenizer and chat template, heads with padding."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from understudy.cli.app import app
from understudy.models import build_causal_lm, load_tokenizer, save_hf
from understudy.recipe import load_recipe
from understudy.tasks.renderer import Renderer

ROOT = Path(__file__).parents[2]
NUM_TOKENS = 151_669
PADDED = {"student": 151_936, "teacher": 152_064}
"""Rows of the heads of the smaller and the larger Qwen models: the padding differs, the tokens do not."""
SIZES = {
    "student": {"architecture": "qwen3", "hidden_size": 32, "num_layers": 1, "num_heads": 2},
    "teacher": {"architecture": "qwen3", "hidden_size": 64, "num_layers": 2, "num_heads": 4},
}
FLOAT_BYTES = 4
STEPS = 3


def understudy(*arguments: object, **environment: str) -> str:
    """Standard output of the command line; fails with its error."""
    command = [sys.executable, "-m", "understudy", *map(str, arguments)]
    given = os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=given)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def models(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with padded heads."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = load_tokenizer(str(shared / "tokenizers" / "qwen"))
    for name, num_rows in PADDED.items():
        model = build_causal_lm(
            SIZES[name] | {"tie_word_embeddings": True},
            vocab_size=num_rows,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            seed=len(name),
        )
        save_hf(model, tokenizer, folder / name)
    return folder


@pytest.fixture
def recipe(shared: Path, models: Path, tmp_path: Path) -> Path:
    """The recipe of docs/real-input.md on them."""
    values = yaml.safe_load((ROOT / "recipes" / "local" / "gsm8k-qwen-tiny.yaml").read_text())
    values |= {"run_dir": str(tmp_path / "run"), "device": "cpu", "eval": None}
    values["student"] = {"model": str(models / "student"), "template_kwargs": {"enable_thinking": False}}
    values["teacher"]["model"] = str(models / "teacher")
    values["task"] |= {
        "path": str(shared / "data" / "gsm8k" / "train.jsonl"),
        "test_path": str(shared / "data" / "gsm8k" / "test.jsonl"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_dry_run_compares_the_vocabularies(recipe: Path) -> None:
    done = CliRunner().invoke(app, ["train", str(recipe), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert f"share {NUM_TOKENS:,} tokens" in done.output
    assert not (recipe.parent / "run").exists()


@pytest.mark.slow
def test_steps_on_gsm8k_through_the_qwen_tokenizer(recipe: Path, models: Path) -> None:
    small = [f"train.steps={STEPS}", "train.prompts_per_step=4", "sampling.max_new_tokens=16"]
    understudy("train", recipe, *small, "train.save_samples_every=1")
    run_dir = recipe.parent / "run"
    steps = rows(run_dir / "metrics.jsonl")
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in steps)
    assert all(row["loss"] > 0 and row["prompts_too_long"] == 0 for row in steps)
    # a random student is nearly undecided among the tokens that exist
    assert math.log(NUM_TOKENS) - 0.1 < steps[0]["student_entropy"] < math.log(NUM_TOKENS)

    facts = json.loads((run_dir / "run.json").read_text())
    assert facts["status"] == "finished"
    assert facts["vocabulary"] == NUM_TOKENS
    assert 0 < steps[-1]["peak_memory_gib"] <= facts["peak_memory_gib"] + 1e-3
    check_padding(models / "student", run_dir / "student")
    check_prompts(recipe, run_dir)


def check_padding(before: Path, after: Path) -> None:
    """The saved student has the rows of its model; those past the last token took no part, so none of them moved."""
    old, new = (load_file(path / "model.safetensors")["model.embed_tokens.weight"] for path in (before, after))
    assert old.shape == new.shape == (PADDED["student"], SIZES["student"]["hidden_size"])
    assert torch.equal(old[NUM_TOKENS:], new[NUM_TOKENS:])
    assert bool((old[:NUM_TOKENS] != new[:NUM_TOKENS]).any(-1).all()), "every token has a share in a full softmax"


def check_prompts(recipe: Path, run_dir: Path) -> None:
    """Every sample answers a question of the data, worded as the recipe says and rendered by the chat template."""
    loaded = load_recipe(recipe)
    known = {prompt.id: prompt for prompt in loaded.task.prompts("train")}
    tokenizer = load_tokenizer(str(run_dir / "student"))
    samples = [row for path in sorted((run_dir / "samples").glob("*.jsonl")) for row in rows(path)]
    assert len(samples) == STEPS * 4
    assert len({row["prompt_id"] for row in samples}) == STEPS * 4
    for row in samples:
        prompt = known[row["prompt_id"]]
        assert row["prompt"].endswith("Reason step by step and put the final answer in \\boxed{}.")
        text = tokenizer.decode(Renderer(tokenizer, loaded.student.template_kwargs).start(prompt))
        question = row["prompt"]
        assert text == (f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.slow
def test_a_step_takes_far_less_memory_than_its_logits(recipe: Path) -> None:
    """One step of 4,096 response tokens: the whole process stays under one [T, V] tensor."""
    num_prompts, num_new = 64, 64
    understudy(
        "train",
        recipe,
        "train.steps=1",
        f"train.prompts_per_step={num_prompts}",
        f"sampling.max_new_tokens={num_new}",
    )
    (step,) = rows(recipe.parent / "run" / "metrics.jsonl")
    num_trained = step["response_tokens"] * num_prompts
    assert num_trained > 0.95 * num_prompts * num_new
    logits_gib = num_trained * NUM_TOKENS * FLOAT_BYTES / 2**30
    # a dense step holds three, 7 GiB: the student's log-probabilities, the teacher's, and a gradient. Here the process holds
    # its libraries (0.5 to 1 GiB, as the machine is), two models, the optimizer's state and chunks of 256 rows
    assert step["peak_memory_gib"] < logits_gib, (step["peak_memory_gib"], logits_gib)
