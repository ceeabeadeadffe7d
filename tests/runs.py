"""Tiny runs for tests: a teacher and a student on two-digit additions that train in seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from understudy.tasks import build_tokenizer
from understudy.teachers.judges.wording import Wording
from understudy.types import Grade, Prompt, Sample, Verdict

SHORT = {"type": "verbal", "template": "{problem}{response}#", "step_template": "{problem}{steps};{step}#"}
"""A judge in the alphabet of the task; it lacks the model."""
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


def train(folder: Path, *, resume: bool = False, examine: bool = False, **changes: Any) -> Path:
    """Trains the tiny recipe in `folder`; its run directory. `examine`: after the doctor, whose rehearsal counts as calls."""
    from understudy import config, run
    from understudy.recipe import Recipe
    from understudy.trainer import checkpoint
    from understudy.trainer.console import Console

    recipe = config.parse(Recipe, tiny_recipe(folder, **changes))
    with pytest.MonkeyPatch.context() as patch:
        # neither a page nor a safe disk is what these runs are for
        patch.setattr(run, "write_report", lambda path: path)
        patch.setattr(checkpoint, "_sync", lambda path: None)
        return run.train(recipe, resume=resume, examine=examine, console=Console(quiet=True)).run_dir.path


def train_in_two(folder: Path, at: int, **changes: Any) -> Path:
    """The same, interrupted before step `at` + 1 and resumed."""
    from understudy.trainer.loop import Trainer

    plain = Trainer._take_step

    def interrupted(self: Trainer) -> None:
        if self.progress.step == at:
            raise KeyboardInterrupt
        plain(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_take_step", interrupted)
        train(folder, **changes)
    return train(folder, resume=True, **changes)


def weights(run_dir: Path) -> dict[str, Tensor]:
    """Of the final student."""
    return load_file(run_dir / "student" / "model.safetensors")


def metric_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Everything that was logged at each step, without what a clock or the memory says."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in row if not name.endswith(("_s", "_gib"))} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    """Bit-equal weights, equal numbers."""
    assert metric_rows(one) == metric_rows(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def assert_close_run(one: Path, other: Path, *, atol: float) -> None:
    """Equal counts, losses and weights but for sums that round in another order."""
    for row, like in zip(metric_rows(one), metric_rows(other), strict=True):
        assert row.keys() == like.keys()
        for name, value in row.items():
            assert like[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (row["step"], name)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=0, atol=atol)


def grade_by_length(task: object, prompt: Prompt, text: str) -> Grade:
    """A verifier that random models can please: of four scores one, by the number of characters."""
    return Grade(len(text) % 4 / 3)


def judge_by_length(
    judge: object, samples: Sequence[Sample], *, score: str = "argmax", steps: bool = False
) -> list[Verdict]:
    """A judge that uses all ten digits, of steps that end with ";" too; first steps are good."""
    if not steps:
        return [Verdict(float(len(sample.text) * 7 % 10), signal_bytes=1) for sample in samples]
    found = []
    for sample in samples:
        starts = Wording(separator=";").starts(sample, steps=True)
        digits = tuple(float((start + len(sample.text)) * 7 % 10) if start else 9.0 for start in starts)
        found.append(Verdict(min(digits), digits, starts, signal_bytes=len(digits)))
    return found


def train_all(*folders: Path) -> None:
    """Trains the recipe of each folder, one after the other, graded and judged by length: what a rank does."""
    from understudy import run
    from understudy.recipe import load_recipe
    from understudy.tasks import Arithmetic
    from understudy.teachers.judges.verbal import VerbalTeacher
    from understudy.trainer.console import Console
    from understudy.trainer.distributed import Ranks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Arithmetic, "grade", grade_by_length)
        patch.setattr(VerbalTeacher, "judge", judge_by_length)
        for folder in folders:
            run.train(load_recipe(folder / "recipe.yaml"), console=Console(quiet=True))
    # without it a thread of gloo may abort the process at its end
    Ranks.from_environment(lambda: torch.device("cpu")).close()
