"""Room on the disk and in memory, and servers that answer: what needs no sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from understudy.engines import HF
from understudy.engines.hf.engine import MAX_BATCH_TOKENS
from understudy.linear.chunked import CHUNK_ELEMENTS
from understudy.models import num_positions
from understudy.recipe import load
from understudy.recipe.doctor.findings import Finding, Level, attempt, within
from understudy.recipe.doctor.parts import HEALTH_S, Check, Parts
from understudy.recipe.doctor.sizes import Size, amount, free_disk, free_memory, size_of, size_on_disk, used_by
from understudy.recipe.schema import Recipe
from understudy.teachers import Local, Privileged, Verbal
from understudy.teachers.judges.verbal import VerbalTeacher
from understudy.teachers.stores.responses import TeacherResponses
from understudy.trainer.loop import SAVED_SAMPLES
from understudy.trainer.update import MICRO_BATCH_TOKENS, MICRO_BATCH_TOKENS_ELSEWHERE

TEXT_BYTES = 6
"""Of a token in a file of samples: its text, and what JSON adds."""
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Run:
    """What a run's needs are counted from."""

    recipe: Recipe
    device: torch.device
    student: Size
    others: Mapping[str, Size]
    """Teachers, judge and reference by label, on the device."""
    moving: int
    """Bytes of a teacher that moves, in a checkpoint."""
    vocab_size: int | None
    positions: int | None
    is_loaded: bool
    """Whether all weights are in memory already."""
    has_moments: bool = False
    """Whether the optimizer's are, as in a run that goes on."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        most = self.recipe.train.max_prompt_tokens + self.recipe.sampling.max_new_tokens
        return most if self.positions is None else min(most, self.positions)

    @property
    def num_samples(self) -> int:
        """Of one step."""
        return self.recipe.train.prompts_per_step * self.recipe.train.samples_per_prompt


def before_loading(recipe: Recipe) -> list[Finding]:
    """Disk and memory, where all models lie on this machine; else they are looked at once loaded."""
    try:
        student = size_on_disk(recipe.student.model, recipe.student.dtype)
        sections: dict[str, Any] = recipe.judges | ({} if recipe.reference is None else {"reference": recipe.reference})
        others: dict[str, Size] = {}
        for label, section in sections.items():
            source = getattr(section, "model", None) if isinstance(section, Local | Privileged | Verbal) else None
            found = size_on_disk(source, getattr(section, "dtype", "auto"))
            if found is not None and not section.offload:
                others[label] = found
    except (OSError, ValueError, KeyError):
        # loading will say what is wrong with the directory
        return []
    # with adapters little is trained, and how much is known once they are there
    if student is None or recipe.student.lora is not None:
        return []
    device = load.choose_device(recipe.device)
    return _room(Run(recipe, device, student, others, 0, None, None, is_loaded=False))


def checks(parts: Parts) -> list[Check]:
    """Those that apply once everything is loaded."""
    found: list[Check] = [("room", "disk and memory", lambda: _room(_loaded(parts)))]
    for label, health in parts.servers.items():

        def ask(label: str = label, health: Callable[[], object] = health) -> Iterator[Finding]:
            said = within(HEALTH_S, f"the {label}", health)
            text = ", ".join(f"{key} {value}" for key, value in said.items()) if isinstance(said, dict) else str(said)
            yield Finding(f"{label}: health", "ok", "whether its server answers", text)

        found.append((f"{label}: health", "whether its server answers", ask))
    return found


def _loaded(parts: Parts) -> Run:
    models: dict[str, Any] = {side.label: side.model for side in parts.sides}
    judge = parts.judges.judge
    if isinstance(judge, VerbalTeacher):
        models["judge"] = judge.model
    student, teacher = parts.loaded.model, parts.judges.teacher
    others = {label: size_of(model) for label, model in models.items() if model is not None and model is not student}
    moving = sum(value.numel() * value.element_size() for value in (teacher.state() if teacher else {}).values())
    positions = [num_positions(model) for model in (student, *parts.judges.models)]
    known = min((size for size in positions if size is not None), default=None)
    loaded, recipe = parts.loaded, parts.recipe
    sizes = size_of(student), others, moving, loaded.vocab_size, known
    return Run(recipe, loaded.device, *sizes, is_loaded=True, has_moments=bool(parts.trainer.optimizer.state()))


def _room(run: Run) -> list[Finding]:
    disk = attempt("disk", "free space against checkpoints, student and samples", lambda: _disk(run))
    return disk + attempt("memory", "free memory against an estimate of one step", lambda: _memory(run))


def _disk(run: Run) -> Iterator[Finding]:
    recipe, settings, student = run.recipe, run.recipe.train, run.student
    saved = student.weights if recipe.student.lora is None else student.trained
    checkpoint = saved + ADAM_MOMENTS * student.trained + run.moving
    count = settings.keep_last + settings.keep_best + 1
    text = TEXT_BYTES * recipe.sampling.max_new_tokens
    files = 1 + settings.steps // settings.save_samples_every if settings.save_samples_every else 0
    samples = files * min(SAVED_SAMPLES, run.num_samples) * text
    if recipe.eval is not None and recipe.eval.problems is not None:
        times = 2 + (settings.steps // recipe.eval.every if recipe.eval.every else 0)
        samples += times * recipe.eval.problems * recipe.eval.samples_per_prompt * text
    need = {"checkpoints": count * checkpoint, "student": student.weights, "samples": samples}
    if isinstance(recipe.responses, TeacherResponses) and recipe.responses.cache is None:
        need["responses"] = settings.steps * settings.prompts_per_step * text
    folder = Path(recipe.run_dir)
    free = free_disk(folder) + used_by(folder / "checkpoints")
    exact = need["checkpoints"] + need["student"]
    found = (
        f"{count} checkpoints of {amount(checkpoint)}, the student {amount(student.weights)}, at most {amount(samples)} of "
        f"samples; {amount(free)} are free at {recipe.run_dir}"
    )
    level: Level = "error" if exact > free else "warning" if sum(need.values()) > free else "ok"
    advice = "free space, choose another run_dir, or lower train.keep_last" if level != "ok" else ""
    # a warning's: files of samples are bounded above, not known
    advice += "; raise train.save_samples_every and eval.every" if level == "warning" else ""
    yield Finding("disk", level, "free space against checkpoints, student and samples", found, advice)


def _memory(run: Run) -> Iterator[Finding]:
    free, checked = free_memory(run.device), "free memory against an estimate of one step"
    if free is None:
        yield Finding("memory", "ok", checked, "this system does not say how much is free, so nothing was compared")
        return
    held, update, cache = _persistent(run), _update(run), _cache(run)
    certain = sum(held.values()) + run.student.trained
    estimate = sum(held.values()) + max(sum(update.values()), cache)
    shown = held | update | {"generation cache": cache}
    listed = ", ".join(f"{name} {amount(value)}" for name, value in shown.items() if value)
    after = " beside the weights, which are loaded" if run.is_loaded else ""
    found = f"{listed}; at most {amount(estimate)} at a time{after}; {amount(free)} are free on {run.device}"
    level: Level = "error" if certain > free else "warning" if estimate > free else "ok"
    advice = {
        "ok": "",
        "warning": "this is an estimate; where memory runs out, lower train.micro_batch_tokens or set "
        "train.gradient_checkpointing",
        "error": "weights, gradients and optimizer alone do not fit: take a smaller model, student.lora, student.dtype "
        "bfloat16, or teacher.offload",
    }
    yield Finding("memory", level, checked, found, advice[level])


def _persistent(run: Run) -> dict[str, int]:
    """What is there all the time."""
    weights = {} if run.is_loaded else {"student": run.student.weights}
    engine = run.recipe.engine
    if isinstance(engine, HF) and engine.copy and not run.is_loaded:
        weights["the engine's copy"] = run.student.weights
    weights |= {} if run.is_loaded else {label: size.weights for label, size in run.others.items()}
    return weights | ({} if run.has_moments else {"optimizer": ADAM_MOMENTS * run.student.trained})


def _update(run: Run) -> dict[str, int]:
    """What one forward and backward adds."""
    settings, student = run.recipe.train, run.student
    default = MICRO_BATCH_TOKENS.get(run.device.type, MICRO_BATCH_TOKENS_ELSEWHERE)
    tokens = min(max(settings.micro_batch_tokens or default, run.longest), run.num_samples * run.longest)
    number = 2 if settings.compute_dtype == "bfloat16" else student.number_bytes
    layers = student.layers * student.layer_elements
    if settings.gradient_checkpointing:
        layers = student.layers * student.hidden + student.layer_elements
    found = {"gradients": student.trained, "activations": tokens * layers * number}
    if run.vocab_size is not None:
        rows = 2 if "full" in run.recipe.method.needs else 1
        found["logits"] = 4 * rows * min(CHUNK_ELEMENTS, tokens * run.vocab_size)
    return found


def _cache(run: Run) -> int:
    """Keys and values of what is written at a time."""
    own = any(part.plan(0).on_policy_share > 0 for part in run.recipe.method.members)
    if not own or not isinstance(run.recipe.engine, HF):
        return 0
    tokens = min(MAX_BATCH_TOKENS, run.num_samples * run.longest)
    return tokens * run.student.cache_elements * run.student.number_bytes


__all__ = ["before_loading", "checks"]
