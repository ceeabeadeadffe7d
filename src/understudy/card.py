"""The model card of a student."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from understudy import config, facts
from understudy.eval.summary import EvalSummary
from understudy.recipe import Recipe
from understudy.trainer.checkpoint import Progress


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
