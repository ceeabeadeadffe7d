"""Room on the disk and in memory, before the models are loaded and after: sizes of models, and how much is free."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from understudy.engines.hf.engine import MAX_BATCH_TOKENS
from understudy.engines.hf.packed import PACK_FROM
from understudy.lazy import nn, torch
from understudy.linear.chunked import chunk_elements
from understudy.models import config_on_disk, has_bfloat16, unwrap
from understudy.recipe.checks.parts import Check, Files, Finding, Parts
from understudy.recipe.load import choose_device
from understudy.recipe.schema import Recipe
from understudy.trainer.loop import SAVED_SAMPLES
from understudy.trainer.update import MICRO_BATCH_TOKENS, MICRO_BATCH_TOKENS_ELSEWHERE

TEXT_BYTES = 6
"""Bytes of a token in a file of samples: its text, and what JSON adds."""
TOKEN_BYTES = 300
"""Bytes of a token that is kept with the most likely tokens of both sides (`trainer.tokens`): 190 to 290 were measured."""
ADAM_MOMENTS = 2
GIB = 2**30
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of a number, by the names of torch and of safetensors."""
_CGROUP = (
    ("/sys/fs/cgroup/memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Limit, use, and the part of the use that is given back when it is needed; versions 2 and 1."""


@dataclass(frozen=True)
class Size:
    """A model in bytes, and what its activations are counted from."""

    weights: int
    trained: int
    """Bytes of the weights that get a gradient."""
    trained_half: int
    """Bytes of those of them that have 16 bits."""
    layer_elements: int
    """Numbers that one layer keeps for its backward, a token."""
    cache_elements: int
    """Numbers in the key-value cache, a token."""
    hidden: int
    layers: int
    number_bytes: int


def size_of(model: nn.Module) -> Size:
    """Returns the size of a loaded model."""
    parameters = list(model.parameters())
    weights = sum(value.nbytes for value in parameters)
    trained = [value for value in parameters if value.requires_grad]
    half = sum(value.nbytes for value in trained if value.element_size() == BYTES["bfloat16"])
    size = sum(value.nbytes for value in trained)
    return _size(unwrap(model).config.get_text_config(), weights, size, half, parameters[0].element_size())


def size_on_disk(source: str | None, dtype: str, device: torch.device) -> Size | None:
    """Returns the size that a model directory has once it is loaded, from its configuration and the headers of its weights;
    None for anything else."""
    folder = Path(source or "").expanduser()
    files = sorted(folder.glob("*.safetensors")) if source else []
    if not files or not (folder / "config.json").is_file():
        return None
    elements = stored = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            for part in map(tensors.get_slice, tensors.keys()):
                elements += math.prod(part.get_shape())
                stored += math.prod(part.get_shape()) * BYTES.get(part.get_dtype(), 1)
    number = BYTES[dtype] if dtype in BYTES else max(1, round(stored / max(1, elements)))
    if dtype == "auto" and number == BYTES["bfloat16"] and not has_bfloat16(device):
        number = BYTES["float32"]
    half = elements * number if number == BYTES["bfloat16"] else 0
    return _size(config_on_disk(source), elements * number, elements * number, half, number)


def _size(config: Any, weights: int, trained: int, trained_half: int, number_bytes: int) -> Size:
    """A layer keeps its two normalised inputs, queries, keys, values, the attention's output and both residuals (12 H with
    what softmax and norm add), and four rows of the feed-forward; attention scores are not kept."""
    hidden = int(getattr(config, "hidden_size", 0) or 0)
    heads = int(getattr(config, "num_attention_heads", 1) or 1)
    wide = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    head = int(getattr(config, "head_dim", None) or hidden // heads)
    shared = int(getattr(config, "num_key_value_heads", None) or heads)
    elements = 12 * hidden + 4 * wide, 2 * layers * shared * head
    return Size(weights, trained, trained_half, *elements, hidden, layers, number_bytes)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take there; None where nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    for limit, used, cached in _CGROUP:
        folder = Path(limit).parent
        try:
            left = int(Path(limit).read_text()) - int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free = min(free, left + int(stat.get(cached, 0)))
        except (OSError, ValueError):
            # no limit ("max"), or another system
            continue
    # processes of one machine share its memory
    return max(0, free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def amount(size: float) -> str:
    """As "1.25 GiB", "3.1 MiB" or "12 KiB"."""
    if size >= GIB / 10:
        return f"{size / GIB:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 / 10 else f"{size / 2**10:.0f} KiB"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The sizes that the estimates of disk and memory are made from."""

    recipe: Recipe
    device: torch.device
    student: Size
    others: Mapping[str, Size]
    """Teachers, judge and references by label, on the device; a reference that several teachers have is one."""
    moving: int = 0
    """Bytes of a teacher that moves, in a checkpoint."""
    vocab_size: int | None = None
    positions: int | None = None
    is_loaded: bool = False
    """Whether all weights are in memory already."""
    has_moments: bool = False
    """Whether the optimizer's moments are in memory already, as in a resumed run."""
    ranks: int = 1
    """Processes that share the samples of a step."""
    shards: int = 1
    """Processes that divide the optimizer's state among them."""

    @property
    def masters(self) -> int:
        """Bytes of float32 copies of weights in 16 bits."""
        return 2 * self.student.trained_half if self.recipe.train.master_weights else 0

    @property
    def updated(self) -> int:
        """Bytes of what the optimizer updates, and of its gradients and each of its moments."""
        return self.student.trained + self.masters // 2

    @property
    def moments(self) -> int:
        """Bytes of the optimizer's moments that this process holds."""
        return ADAM_MOMENTS * self.updated // self.shards

    @property
    def num_samples(self) -> int:
        """Samples of one step on one rank."""
        return math.ceil(self.recipe.train.prompts_per_step * self.recipe.train.samples_per_prompt / self.ranks)


def _shards(recipe: Recipe) -> int:
    return 1 if recipe.parallel is None else recipe.parallel.shard


def _before(files: Files) -> list[Needs]:
    """By the files of the models; empty where some are not on this machine, which are looked at once loaded."""
    recipe = files.recipe
    others: dict[str, Size] = {}
    device = choose_device(recipe.device)
    try:
        student = size_on_disk(recipe.student.model, recipe.student.dtype, device)
        for place, section in recipe.scorers.items():
            weights = section.weights
            if weights is None or weights.offload:
                continue
            model, dtype = recipe.student.model, weights.dtype
            if weights.source is not None:
                model = weights.source.name
            elif dtype == "auto":
                dtype = recipe.student.dtype
            size = size_on_disk(model, dtype, device)
            if size is not None:
                others[place] = size
    except (OSError, ValueError, KeyError, SafetensorError):
        # loading will say what is wrong with the directory
        return []
    # with adapters little is trained, and how much is known once they are there
    if student is None or recipe.student.lora is not None:
        return []
    return [Needs(recipe=recipe, device=device, student=student, others=others, shards=_shards(recipe))]


def _after(parts: Parts) -> Needs:
    loaded, teachers = parts.loaded, parts.teachers
    models = dict(parts.models) | ({} if teachers.judge is None else {"judge": teachers.judge.model})
    state = {} if teachers.teacher is None else teachers.teacher.state()
    return Needs(
        recipe=parts.recipe,
        device=loaded.device,
        student=size_of(loaded.model),
        others={label: size_of(model) for label, model in models.items() if model not in (None, loaded.model)},
        moving=sum(value.nbytes for value in state.values()),
        vocab_size=loaded.vocab_size,
        positions=parts.rollouts.collector.max_tokens,
        is_loaded=True,
        # shards get theirs later
        has_moments=parts.trainer.progress.updates > 0 and not parts.recipe.is_sharded,
        shards=_shards(parts.recipe),
    )


def _disk(run: Needs) -> Finding:
    recipe, settings, student = run.recipe, run.recipe.train, run.student
    saved = student.weights if recipe.student.lora is None else student.trained
    checkpoint = saved + ADAM_MOMENTS * run.updated + run.masters + run.moving
    count = settings.keep_last + settings.keep_best + 1
    text = TEXT_BYTES * recipe.sampling.max_new_tokens
    files = 1 + settings.steps // settings.save_samples_every if settings.save_samples_every else 0
    samples = files * min(SAVED_SAMPLES, run.num_samples) * text
    if settings.records_tokens:
        kept = TOKEN_BYTES * recipe.sampling.max_new_tokens * settings.save_tokens
        samples += min(settings.save_tokens_bytes, 2 * files * kept)
    if recipe.eval is not None and recipe.eval.problems is not None:
        times = 2 + (settings.steps // recipe.eval.every if recipe.eval.every else 0)
        samples += times * recipe.eval.problems * recipe.eval.samples_per_prompt * text
    exact, need = count * checkpoint + student.weights, samples
    if recipe.responses is not None and recipe.responses.in_run_dir:
        need += settings.steps * settings.prompts_per_step * text
    run_dir = Path(recipe.run_dir).absolute()
    replaced = sum(file.stat().st_size for file in (run_dir / "checkpoints").rglob("*") if file.is_file())
    folder = next(one for one in (run_dir, *run_dir.parents) if one.exists())
    free = shutil.disk_usage(folder).free + replaced
    found = (
        f"{count} checkpoints of {amount(checkpoint)}, the student {amount(student.weights)}, at most {amount(samples)} of "
        f"samples; {amount(free)} are free at {recipe.run_dir}"
    )
    advice = "free space, choose another run_dir, or lower train.keep_last"
    if exact > free:
        return Finding(found, "error", advice)
    # only a warning: files of samples are bounded above, not known
    advice += "; raise train.save_samples_every and eval.every"
    return Finding(found, "warning" if exact + need > free else "ok", advice)


@dataclass(frozen=True)
class Item:
    """One part of the memory of a run."""

    name: str
    size: int
    """Bytes."""
    when: Literal["held", "update", "generate"] = "held"
    """All the time, in one forward and backward, or while samples are written."""
    formula: str = ""


def memory_items(run: Needs) -> list[Item]:
    """The memory of one step, without what is there already. The largest of its times is the peak."""
    recipe, settings, student = run.recipe, run.recipe.train, run.student
    items = []
    if not run.is_loaded:
        items += [
            Item("student", student.weights, "held", "weights x bytes of a weight"),
            Item("master weights", run.masters, "held", "weights in 16 bits x 4 bytes"),
        ]
        if recipe.engine.runs_here and recipe.engine.beside_update:
            # it writes beside an update
            items.append(Item("the engine's copy", student.weights, "held", "weights x bytes of a weight"))
        items += [
            Item(label, size.weights, "held", "weights x bytes of a weight") for label, size in run.others.items()
        ]
    if not run.has_moments:
        items.append(Item("optimizer", run.moments, "held", "trained weights x 2 moments"))
    longest = settings.max_prompt_tokens + recipe.sampling.max_new_tokens
    longest = longest if run.positions is None else min(longest, run.positions)
    default = MICRO_BATCH_TOKENS.get(run.device.type, MICRO_BATCH_TOKENS_ELSEWHERE)
    tokens = min(max(settings.micro_batch_tokens or default, longest), run.num_samples * longest)
    layers, formula = student.layers * student.layer_elements, "tokens x layers x (12 H + 4 F)"
    if settings.gradient_checkpointing:
        layers = student.layers * student.hidden + student.layer_elements
        formula = "tokens x (layers x H + 12 H + 4 F)"
    mixed = settings.compute_dtype == "bfloat16" or (settings.compute_dtype == "auto" and has_bfloat16(run.device))
    number = 2 if mixed else student.number_bytes
    items += [
        Item("gradients", run.updated, "update", "trained weights x bytes of a weight"),
        Item("activations", tokens * layers * number, "update", f"{formula} x {number} bytes, {tokens:,} tokens"),
    ]
    if run.vocab_size is not None:
        rows = 2 if "full" in recipe.method.needs else 1
        logits = 4 * rows * min(chunk_elements(run.device), tokens * run.vocab_size)
        items.append(Item("logits", logits, "update", f"{rows} x a chunk of rows x vocabulary x 4 bytes"))
    if recipe.uses.own_samples and recipe.engine.runs_here:
        held = min(MAX_BATCH_TOKENS, run.num_samples * longest)
        cache = held * student.cache_elements * student.number_bytes
        formula = f"{held:,} tokens x layers x 2 x heads of keys x their size"
        items.append(Item("generation cache", cache, "generate", formula))
        if run.device.type == "cpu" and recipe.sampling.max_new_tokens >= PACK_FROM:
            items.append(Item("packed weights", student.weights, "generate", "weights x bytes of a weight"))
    return [item for item in items if item.size]


def peak(items: Sequence[Item]) -> int:
    """Bytes at the worst time."""
    held, update, generate = (
        sum(item.size for item in items if item.when == when) for when in ("held", "update", "generate")
    )
    return held + max(update, generate)


def _memory(run: Needs) -> Finding:
    free = free_memory(run.device)
    if free is None:
        return Finding("this system does not say how much is free, so nothing was compared")
    items = memory_items(run)
    certain, estimate = sum(item.size for item in items if item.when == "held") + run.updated, peak(items)
    listed = ", ".join(f"{item.name} {amount(item.size)}" for item in items)
    after = " beside the weights, which are loaded" if run.is_loaded else ""
    found = f"{listed}; at most {amount(estimate)} at a time{after}; {amount(free)} are free on {run.device}"
    if certain > free:
        advice = (
            "weights, gradients and optimizer alone do not fit: take a smaller model, student.lora, teacher.offload, or "
            "student.dtype bfloat16 with train.master_weights false, which halves them and rounds small updates away "
            "(update_survives says how much is left)"
        )
        return Finding(found, "error", advice)
    advice = (
        "this is an estimate; where memory runs out, lower train.micro_batch_tokens or set train.gradient_checkpointing"
    )
    return Finding(found, "warning" if estimate > free else "ok", advice)


DISK, MEMORY = "free space against checkpoints, student and samples", "free memory against an estimate of one step"
CHECKS = (
    Check("disk", "room", DISK, lambda files: map(_disk, _before(files))),
    Check("memory", "room", MEMORY, lambda files: map(_memory, _before(files))),
    Check("disk", "loaded", DISK, lambda parts: [_disk(_after(parts))]),
    Check("memory", "loaded", MEMORY, lambda parts: [_memory(_after(parts))]),
)
