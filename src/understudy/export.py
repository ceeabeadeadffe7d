"""The outputs of a finished run: the student with its model card, and the facts of the run."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from understudy import config
from understudy.errors import RecipeError
from understudy.eval.summary import EvalSummary
from understudy.files import hash_values, write_json
from understudy.format import count, interval
from understudy.given import is_given
from understudy.lazy import nn, torch
from understudy.models import read_back, save_hf, unwrap
from understudy.models.backbone import TOLERANCE
from understudy.recipe import Recipe
from understudy.recipe.checks import Parts
from understudy.recipe.checks.room import free_memory
from understudy.text import plain_tree, printable
from understudy.trainer.checkpoint import Progress, RunDir, written_whole
from understudy.trainer.observe import peak_memory_gib


def export_student(parts: Parts, run_dir: RunDir) -> None:
    """Writes the final student and its card, and warns where what was written does not load as it was trained.

    Raises CheckpointError.
    """
    recipe, trainer, lora = parts.recipe, parts.trainer, parts.recipe.student.lora
    with written_whole(run_dir.student) as aside:
        merged = lora is None or lora.save == "merged"
        renderer = parts.loaded.renderer
        save_hf(parts.loaded.model, renderer.tokenizer, aside, merged=merged, stop_ids=renderer.stop_ids)
        card = model_card(recipe, trainer.progress, trainer.observer.summaries)
        (aside / "README.md").write_text(card, encoding="utf-8")
    if merged and (reason := _not_as_trained(parts.loaded.model, run_dir.student)):
        trainer.observer.warn(trainer.progress.step, f"{run_dir.student} {reason}")


def _not_as_trained(model: nn.Module, student: Path) -> str | None:
    """How the saved student differs from the trained one once it is loaded; None where it does not."""
    free, size = free_memory(torch.device("cpu")), sum(value.nbytes for value in model.parameters())
    if free is not None and free < 2 * size:
        return "was not loaded for a comparison with the trained student: too little memory is free"
    try:
        error = read_back(model, student)
    except RecipeError as refused:
        return f"cannot be loaded: {refused}"
    # written so that NaN is a difference too
    if not error <= TOLERANCE[str(unwrap(model).dtype)]:
        return (
            f"gives other logits than the trained student once transformers loads it (relative error {error:.1e}): this "
            "architecture does not load as it is saved, so compare before you use it"
        )
    return None


def data_facts(parts: Parts) -> dict[str, Any]:
    """Counts of the data, taken before the first step: files may change while a run goes on."""
    return {
        "rows": {name: intake.num_rows for name, intake in parts.intakes.items()},
        "rows_skipped": {name: intake.num_skipped for name, intake in parts.intakes.items()},
        "prompts_with_special_tokens": len(parts.spelling),
    }


def write_facts(parts: Parts, run_dir: RunDir, status: str, facts: Mapping[str, Any]) -> None:
    """Writes what became of the run, on which machine and with which versions; "running" until it has ended.

    `facts`: the start in seconds since 1970, those of `data_facts`, and what else is to be told.
    """
    data = dict(facts)
    started = data.pop("started")
    progress, parameters = parts.trainer.progress, list(parts.loaded.model.parameters())
    values = {
        "status": status,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        **({} if status == "running" else {"ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}),
        "steps": progress.step,
        "updates": progress.updates,
        "samples": progress.num_samples,
        "response_tokens": progress.num_tokens,
        "training_s": round(progress.elapsed_s, 2),
        "student_parameters": sum(value.numel() for value in parameters),
        "trained_parameters": sum(value.numel() for value in parameters if value.requires_grad),
        "vocabulary": parts.loaded.vocab_size,
        "teacher": ", ".join(section.shown for section in parts.recipe.all_teachers.values()) or None,
        **data,
        "hardware": hardware(parts.loaded.device),
        "peak_memory_gib": round(peak_memory_gib(), 3),
        "versions": installed(),
        "commit": commit(),
    }
    plain = {name: plain_tree(value, name) for name, value in values.items()}
    if status != "running":
        plain["files"] = {name: list(hashed) for name, hashed in run_dir.hash_files(whole=True).items()}
    write_json(run_dir.facts, plain | {"digest": hash_values(plain)})


def model_card(recipe: Recipe, progress: Progress, summaries: Sequence[EvalSummary]) -> str:
    """Markdown with the metadata block of the Hugging Face hub: method, data, teacher, commit, metrics, recipe.

    Paths of this machine are shortened to their last part, and secrets hidden.
    """
    start, made = recipe.student.model, commit()
    metadata = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    metadata |= {"base_model": start} if start and not is_given(start) and not Path(start).expanduser().exists() else {}
    rows = {
        "Method": f"`{recipe.method_name}`",
        "Started from": f"`{start}`" if start else "random weights",
        "Teacher": ", ".join(f"`{section.shown}`" for section in recipe.all_teachers.values()) or "none",
        "Data": f"`{recipe.task.name}`",
        "Steps": f"{progress.step:,} ({progress.num_samples:,} samples, {progress.num_tokens:,} response tokens)",
        "Seed": str(recipe.seed),
        "Made with": f"understudy {installed().get('understudy', '(not installed)')}"
        + (f", commit `{made}`" if made else ""),
    }
    parts = [
        f"---\n{config.write_yaml(metadata | {'tags': ['distillation', 'on-policy', 'understudy']})}---\n",
        f"# {recipe.run_dir.rstrip('/').rpartition('/')[2]}\n",
        "A student trained by distillation with `understudy`.\n",
        "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items()),
    ]
    if summaries:
        last = summaries[-1]
        measured = "".join(f"| {name} | {interval(name, found)} |\n" for name, found in last.metrics.items())
        parts.append(
            f"## Evaluation\n\n{count(last.num_problems, 'problem')} of `{recipe.held_out.name}`, {last.split} split, "
            f"{count(last.samples_per_prompt, 'sample')} each, after step {last.step:,}; [95 % intervals] over problems.\n\n"
            f"| metric | value |\n|---|---|\n{measured}"
        )
    values: Any = plain_tree(config.dump(recipe))
    text = "\n".join([*parts, f"## Recipe\n\n```yaml\n{config.write_yaml(values)}```\n"])
    leaves = [one for leaf in config.flatten(values).values() for one in (leaf if isinstance(leaf, list) else [leaf])]
    paths = {one for one in leaves if isinstance(one, str) and Path(one).is_absolute() and Path(one).exists()}
    # who reads a published card has another machine: of a path here, the last part says which model or file it was
    for path in sorted(paths, key=len, reverse=True):
        text = text.replace(path, Path(path).name)
    return printable(text)


@cache
def installed() -> dict[str, str]:
    """Versions of Python and of the packages that compute; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in ("understudy", "torch", "transformers", "tokenizers", "datasets", "peft"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@cache
def commit() -> str | None:
    """The git commit of this package's source as this process first asked, "-dirty" behind it where files were changed.

    None outside a checkout.
    """

    def git(*asked: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *asked]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603 (fixed)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        inside = git("ls-files", "--error-unmatch", Path(__file__).name)
        return (
            git("describe", "--always", "--dirty", "--abbrev=40", "--match=", "--exclude=*") if inside else ""
        ) or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def hardware(device: torch.device) -> str:
    """The card, or the processor and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = platform.processor() or platform.machine()
    with suppress(OSError):  # Linux alone has it, and Python does not read it
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else platform.machine()
    return f"{processor}, {torch.get_num_threads()} of {os.cpu_count()} threads"
