"""Tiny runs for tests: a teacher and a student on two-digit additions that train in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from understudy.tasks import build_tokenizer

BUILD = {"architecture": "llama", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_position_embeddings": 64}


def tiny_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """SFT from scratch in `folder`/run; `changes` are merged section by section, None removes one."""
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "student": {"build": dict(BUILD)},
        "task": {"type": "arithmetic", "family": "addition", "digits": 2},
        "method": {"type": "sft"},
        "sampling": {"max_new_tokens": 24},
        "train": {"steps": 6, "prompts_per_step": 8, "lr": 3e-3, "save_samples_every": 0},
        "device": "cpu",
    }
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict) and "type" not in value:
            values[key] = values[key] | value
        else:
            values[key] = value
    return {key: value for key, value in values.items() if value is not None}


def write_recipe(folder: Path, **changes: Any) -> Path:
    """The recipe as a file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(folder, **changes), sort_keys=False))
    return path


def save_tiny_model(path: Path, *, seed: int, hidden_size: int = 16, family: str = "addition") -> str:
    """A random model with the task's tokenizer, as a Hugging Face directory."""
    from understudy.models import build_causal_lm, save_hf

    tokenizer = build_tokenizer(family)  # type: ignore[arg-type]
    model = build_causal_lm(
        BUILD | {"hidden_size": hidden_size},
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        seed=seed,
    )
    save_hf(model, tokenizer, path)
    return str(path)


def distillation(folder: Path, *, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Changes that make the tiny recipe on-policy distillation between two random models."""
    folder.mkdir(parents=True, exist_ok=True)
    student = save_tiny_model(folder / "student", seed=1 + seed)
    teacher = save_tiny_model(folder / "teacher", seed=2 + seed, hidden_size=32)
    return (
        {
            "student": None,
            "teacher": {"type": "local", "model": teacher},
            "method": {"type": "gkd"},
        }
        | changes
        | {"student": {"model": student, "build": None} | changes.get("student", {})}
    )
