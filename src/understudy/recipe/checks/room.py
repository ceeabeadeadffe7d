"""Room on the disk and in memory, before the models are loaded and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from understudy.engines.hf.engine import MAX_BATCH_TOKENS
from understudy.linear.chunked import CHUNK_ELEMENTS
from understudy.models import num_positions
from understudy.recipe.checks.files import Files
from understudy.recipe.checks.findings import Check, Level, Result
from understudy.recipe.checks.parts import Parts
from understudy.recipe.checks.sizes import Size, amount, free_disk, free_memory, size_of, size_on_disk, used_by
from understudy.recipe.load import choose_device
from understudy.recipe.schema import Recipe
from understudy.trainer.loop import SAVED_SAMPLES
from understudy.trainer.update import MICRO_BATCH_TOKENS, MICRO_BATCH_TOKENS_ELSEWHERE

TEXT_BYTES = 6
"""Bytes of a token in a file of samples: its text, and what JSON adds."""
ADAM_MOMENTS = 2


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The sizes that the estimates of disk and memory are made from."""

    recipe: Recipe
    device: torch.device
    student: Size
    others: Mapping[str, Size]
    """Teachers, judge and reference by label, on the device."""
    moving: int = 0
    """Bytes of a teacher that moves, in a checkpoint."""
    vocab_size: int | None = None
    positions: int | None = None
    is_loaded: bool = False
    """Whether all weights are in memory already."""
    has_moments: bool = False
    """Whether the optimizer's moments are in memory already, as in a resumed run."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        most = self.recipe.train.max_prompt_tokens + self.recipe.sampling.max_new_tokens
        return most if self.positions is None else min(most, self.positions)

    @property
    def num_samples(self) -> int:
        """Samples of one step."""
        return self.recipe.train.prompts_per_step * self.recipe.train.samples_per_prompt


def _before(files: Files) -> list[Needs]:
    """By the files of the models; empty where some are not on this machine, which are looked at once loaded."""
    recipe = files.recipe
    sections = recipe.all_teachers | ({} if recipe.reference is None else {"reference": recipe.reference})
    others: dict[str, Size] = {}
    try:
        student = size_on_disk(recipe.student.model, recipe.student.dtype)
        for label, section in sections.items():
            weights = section.weights
            size = None if weights is None else size_on_disk(weights.model, weights.dtype)
            if size is not None and weights is not None and not weights.offload:
                others[label] = size
    except (OSError, ValueError, KeyError):
        # loading will say what is wrong with the directory
        return []
    # with adapters little is trained, and how much is known once they are there
    if student is None or recipe.student.lora is not None:
        return []
    return [Needs(recipe=recipe, device=choose_device(recipe.device), student=student, others=others)]


def _after(parts: Parts) -> Needs:
    loaded, teachers = parts.loaded, parts.teachers
    models = dict(parts.models) | ({} if teachers.judge is None else {"judge": teachers.judge.model})
    positions = [num_positions(model) for model in parts.models.values()]
    state = {} if teachers.teacher is None else teachers.teacher.state()
    return Needs(
        recipe=parts.recipe,
        device=loaded.device,
        student=size_of(loaded.model),
        others={label: size_of(model) for label, model in models.items() if model not in (None, loaded.model)},
        moving=sum(value.numel() * value.element_size() for value in state.values()),
        vocab_size=loaded.vocab_size,
        positions=min((size for size in positions if size is not None), default=None),
        is_loaded=True,
        has_moments=bool(parts.trainer.optimizer.state()),
    )


def _disk(run: Needs) -> Result:
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
    exact, need = count * checkpoint + student.weights, samples
    if recipe.responses is not None and recipe.responses.in_run_dir:
        need += settings.steps * settings.prompts_per_step * text
    folder = Path(recipe.run_dir)
    free = free_disk(folder) + used_by(folder / "checkpoints")
    found = (
        f"{count} checkpoints of {amount(checkpoint)}, the student {amount(student.weights)}, at most {amount(samples)} of "
        f"samples; {amount(free)} are free at {recipe.run_dir}"
    )
    advice = "free space, choose another run_dir, or lower train.keep_last"
    if exact > free:
        return Result(found, "error", advice)
    if exact + need > free:
        # only a warning: files of samples are bounded above, not known
        return Result(found, "warning", f"{advice}; raise train.save_samples_every and eval.every")
    return Result(found)


def _memory(run: Needs) -> Result:
    free = free_memory(run.device)
    if free is None:
        return Result("this system does not say how much is free, so nothing was compared")
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
    return Result(found, level, advice[level])


def _persistent(run: Needs) -> dict[str, int]:
    """Bytes that are held all the time."""
    held = {} if run.has_moments else {"optimizer": ADAM_MOMENTS * run.student.trained}
    if run.is_loaded:
        return held
    # an engine of this process that writes beside an update has weights of its own
    has_copy = run.recipe.engine.runs_here and run.recipe.engine.beside_update
    copies = {"the engine's copy": has_copy * run.student.weights}
    others = {label: size.weights for label, size in run.others.items()}
    return {"student": run.student.weights} | copies | others | held


def _update(run: Needs) -> dict[str, int]:
    """Bytes that one forward and backward adds."""
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


def _cache(run: Needs) -> int:
    """Bytes of the keys and values of what is written at a time."""
    if not run.recipe.uses.own_samples or not run.recipe.engine.runs_here:
        return 0
    tokens = min(MAX_BATCH_TOKENS, run.num_samples * run.longest)
    return tokens * run.student.cache_elements * run.student.number_bytes


DISK, MEMORY = "free space against checkpoints, student and samples", "free memory against an estimate of one step"
CHECKS = (
    Check("disk", "room", DISK, lambda files: map(_disk, _before(files))),
    Check("memory", "room", MEMORY, lambda files: map(_memory, _before(files))),
    Check("disk", "loaded", DISK, lambda parts: [_disk(_after(parts))]),
    Check("memory", "loaded", MEMORY, lambda parts: [_memory(_after(parts))]),
)
