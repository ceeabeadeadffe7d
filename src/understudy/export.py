"""The outputs of a finished run: the student with its model card, and the facts of the run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from safetensors import SafetensorError

from understudy import config, facts
from understudy.errors import CheckpointError
from understudy.eval.summary import EvalSummary
from understudy.files import write_json
from understudy.models import save_hf
from understudy.recipe import Recipe
from understudy.recipe.checks import Parts
from understudy.trainer.checkpoint import Progress, sync_tree
from understudy.trainer.observe import peak_memory_gib
from understudy.trainer.rundir import RunDir


def export_student(parts: Parts, run_dir: RunDir) -> None:
    """Writes the final student and its card. Raises CheckpointError."""
    recipe, trainer, lora = parts.recipe, parts.trainer, parts.recipe.student.lora
    # a killed export leaves this directory and never half a student
    aside = run_dir.path / ".writing-student"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        merged = lora is None or lora.save == "merged"
        save_hf(parts.loaded.model, parts.loaded.renderer.tokenizer, aside, merged=merged)
        card = model_card(recipe, trainer.progress, trainer.observer.summaries)
        (aside / "README.md").write_text(card, encoding="utf-8")
        sync_tree(aside)
        shutil.rmtree(run_dir.student, ignore_errors=True)
        aside.rename(run_dir.student)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"cannot write {run_dir.student}: {error}; free space, then finish with --resume"
        ) from error


def write_facts(parts: Parts, run_dir: RunDir, status: str, started: float) -> None:
    """Writes what became of the run, on which machine and with which versions. `started`: seconds since 1970."""
    progress, parameters = parts.trainer.progress, list(parts.loaded.model.parameters())
    values = {
        "status": status,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "steps": progress.step,
        "updates": progress.updates,
        "samples": progress.num_samples,
        "response_tokens": progress.num_tokens,
        "training_s": round(progress.elapsed_s, 2),
        "student_parameters": sum(value.numel() for value in parameters),
        "trained_parameters": sum(value.numel() for value in parameters if value.requires_grad),
        "vocabulary": parts.loaded.vocab_size,
        "teacher": ", ".join(section.shown for section in parts.recipe.all_teachers.values()) or None,
        "hardware": facts.hardware(parts.loaded.device),
        "peak_memory_gib": round(peak_memory_gib(), 3),
        "versions": facts.installed(),
        "commit": facts.commit(),
    }
    write_json(run_dir.facts, values)


def model_card(recipe: Recipe, progress: Progress, summaries: Sequence[EvalSummary]) -> str:
    """Markdown with the metadata block of the Hugging Face hub: method, data, teacher, commit, metrics, recipe."""
    teacher = ", ".join(f"`{section.shown}`" for section in recipe.all_teachers.values()) or "none"
    start = f"`{recipe.student.model}`" if recipe.student.model else "random weights"
    rows = {
        "Method": f"`{type(recipe.method).__name__}`",
        "Started from": start,
        "Teacher": teacher,
        "Data": f"`{recipe.task.name}`",
        "Steps": f"{progress.step:,} ({progress.num_samples:,} samples, {progress.num_tokens:,} response tokens)",
        "Seed": str(recipe.seed),
        "Made with": f"understudy {facts.installed().get('understudy', '(not installed)')}"
        + (f", commit `{found}`" if (found := facts.commit()) else ""),
    }
    parts = [
        f"---\n{yaml.safe_dump(_metadata(recipe), sort_keys=False)}---\n",
        f"# {recipe.run_dir.rstrip('/').rpartition('/')[2]}\n",
        "A student trained by distillation with `understudy`.\n",
        "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items()),
        _metrics(recipe, summaries),
        f"## Recipe\n\n```yaml\n{config.write_yaml(config.dump(recipe))}```\n",
    ]
    return "\n".join(part for part in parts if part)


def _metadata(recipe: Recipe) -> dict[str, object]:
    values: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if recipe.student.model and not Path(recipe.student.model).expanduser().exists():
        values["base_model"] = recipe.student.model
    return values | {"tags": ["distillation", "on-policy", "understudy"]}


def _metrics(recipe: Recipe, summaries: Sequence[EvalSummary]) -> str:
    if not summaries:
        return ""
    last = summaries[-1]
    rows = "".join(
        f"| {name} | {found.value:.4g} | {found.low:.4g} to {found.high:.4g} |\n"
        for name, found in last.metrics.items()
    )
    return (
        f"## Evaluation\n\n{last.num_problems:,} problems of `{recipe.held_out.name}`, {last.split} split, "
        f"{last.samples_per_prompt} samples each, after step {last.step:,}; 95 % intervals over problems.\n\n"
        f"| metric | value | interval |\n|---|---|---|\n{rows}"
    )
