"""From a recipe to the parts of a run: first everything that can be checked, then everything that is loaded."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from understudy.engines import HFEngine
from understudy.errors import RecipeError, VocabularyError
from understudy.models import (
    apply_lora,
    build_causal_lm,
    check_build,
    check_model_dir,
    compare_chat_templates,
    compare_vocabularies,
    disable_dropout,
    enable_gradient_checkpointing,
    load_causal_lm,
    load_tokenizer,
    num_positions,
    probe_head,
    stop_ids,
)
from understudy.recipe.checks import (
    check_coverage,
    check_fields,
    check_rejection,
    check_source,
    check_training,
    is_here,
)
from understudy.recipe.schema import Recipe, Student
from understudy.tasks import Arithmetic, Mix, build_tokenizer
from understudy.tasks.mix import record_parts
from understudy.tasks.renderer import Renderer
from understudy.teachers import Http, Local, Privileged, Served
from understudy.trainer.loggers import check_loggers
from understudy.types import Prompt, Sampling

NUM_REHEARSED = 8
"""Prompts that a dry run renders."""


def check(recipe: Recipe, *, training: bool = True, fetch: bool = False) -> list[str]:
    """Everything that can be found wrong without loading a model. Returns what was checked, a line each.

    `training=False`: for an evaluation or samples, which need no solutions. `fetch`: data and tokenizers are read from the
    network where they are not on this machine; else they stay unchecked.

    Raises RecipeError, DataError or VocabularyError.
    """
    check_loggers(recipe.loggers)
    choose_device(recipe.device)
    if recipe.student.build is not None:
        check_build(recipe.student.build)
    lines = [f"task: {recipe.task.name}"]
    recipe.task.check_files()
    check_source(recipe.task, "train", "task")
    check_fields(recipe, training=training)
    if recipe.eval is not None:
        recipe.held_out.check_files()
        check_source(recipe.held_out, recipe.eval.split, "eval_task" if recipe.eval_task else "task")
        check_rejection(recipe)
        lines.append(f"evaluation: {recipe.held_out.name}, {recipe.eval.split} split")
    if recipe.train.stop_at is not None and (recipe.eval is None or recipe.eval.every is None):
        raise RecipeError("train.stop_at waits for an evaluation, so eval.every must say how often there is one")
    if recipe.student.lora is not None and importlib.util.find_spec("peft") is None:
        raise RecipeError("student.lora needs the package peft; run: pip install 'understudy[lora]'")
    if recipe.rollout is not None:
        lines.append(recipe.rollout.check())
    if recipe.student.model is not None:
        lines.append(f"student: {check_model_dir(recipe.student.model)}")
    lines += [section.check() for section in recipe.judges.values()]
    lines += [section.check() for section in (recipe.reference, recipe.responses) if section is not None]
    if training:
        check_training(recipe, fetch=fetch)
    if recipe.reference is None and "reference" in recipe.method.needs:
        lines.append("reference: the student's start")
    return [*lines, *_check_tokenizers(recipe, training=training, fetch=fetch)]


def shared_vocabulary(recipe: Recipe) -> list[tuple[str, str | None]]:
    """The models, with their revisions, that must share the student's tokens: those whose probabilities are compared."""
    sections = (*recipe.judges.values(), recipe.reference)
    here = [section for section in sections if isinstance(section, Local | Privileged)]
    there = [section.tokenizer for section in sections if isinstance(section, Http | Served)]
    return [
        *((section.model, section.revision) for section in here if section.model is not None),
        *((name, None) for name in there if name is not None),
    ]


def _check_tokenizers(recipe: Recipe, *, training: bool, fetch: bool) -> list[str]:
    """Those that lie on this machine, and with `fetch` the others, are loaded, compared and tried."""
    source = tokenizer_source(recipe)
    if source is not None and not (fetch or Path(source).expanduser().exists()):
        return [f"tokenizer: {source} is a hub name, not checked offline"]
    renderer = Renderer(student_tokenizer(recipe), recipe.student.template_kwargs)
    tokenizer = renderer.tokenizer
    lines = [f"tokenizer: {len(tokenizer):,} tokens"]
    for section in recipe.judges.values():
        if isinstance(section, Http):
            asked = [part.reads.k for part in recipe.method.members if "topk" in part.needs]
            section.check_k(min(max(asked, default=1), len(tokenizer)))
    for model, revision in shared_vocabulary(recipe):
        if fetch or Path(model).expanduser().exists():
            size = compare_vocabularies(tokenizer, load_tokenizer(model, revision=revision))
            lines.append(f"the student and {model} share {size:,} tokens")
    if fetch or is_here(recipe.task):
        lengths = [len(renderer.start(prompt)) for prompt in islice(recipe.task.prompts("train"), NUM_REHEARSED)]
        if recipe.eval is not None and (fetch or is_here(recipe.held_out)):
            for prompt in islice(eval_prompts(recipe), NUM_REHEARSED):
                renderer.start(prompt)
        lines.append(f"first prompts: {min(lengths)} to {max(lengths)} tokens")
    if training:
        check_coverage(recipe, renderer, fetch=fetch)
    return lines


def choose_device(name: str) -> torch.device:
    """Raises RecipeError for a device that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device is {name!r}, which torch does not know; use auto, cpu, cuda or cuda:N") from error
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise RecipeError(f"device is {name}, which torch does not see on this machine; use auto or cpu")
    if ":" not in name:
        # torchrun starts one process for each GPU of a machine
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def tokenizer_source(recipe: Recipe) -> str | None:
    """Where the student's tokenizer is read from; None: the task has its own."""
    source = recipe.student.tokenizer or recipe.student.model
    if source is None and _own_alphabet(recipe) is None:
        raise RecipeError("student.build needs student.tokenizer: the task has no tokenizer of its own")
    return source


def _own_alphabet(recipe: Recipe) -> Arithmetic | None:
    """The task, or the part of a mix with the most tokens, that brings a tokenizer."""
    task = recipe.task
    parts = list(task.parts.values()) if isinstance(task, Mix) else [task]
    built_in = [part for part in parts if isinstance(part, Arithmetic)]
    return max(built_in, key=lambda part: part.num_tokens) if len(built_in) == len(parts) else None


def student_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer of the student. Raises VocabularyError if it has no EOS."""
    source = tokenizer_source(recipe)
    if source is None:
        task = _own_alphabet(recipe)
        assert task is not None
        return build_tokenizer(task.alphabet or task.family)
    tokenizer = load_tokenizer(source, revision=recipe.student.revision)
    if tokenizer.eos_token_id is None:
        raise VocabularyError(
            f"the tokenizer of {source} has no EOS, so no response would ever end; set eos_token in its configuration"
        )
    return tokenizer


@dataclass(frozen=True)
class Loaded:
    """A student that is ready to sample."""

    model: nn.Module
    renderer: Renderer
    vocab_size: int
    device: torch.device
    compute_dtype: torch.dtype | None
    warnings: tuple[str, ...]

    def engine(self, seed: int, model: nn.Module | None = None) -> HFEngine:
        """Samples with the live weights, or with those of a `model` like it."""
        return HFEngine(
            model or self.model,
            self.renderer.tokenizer,
            seed=seed,
            stop_ids=self.renderer.stop_ids,
            vocab_size=self.vocab_size,
            autocast=self.compute_dtype,
        )


def load_student(recipe: Recipe, *, resume_from: Path | None = None) -> Loaded:
    """The student of a recipe, or as a checkpoint left it, beside its tokenizer compared with the teacher's."""
    device = choose_device(recipe.device)
    tokenizer = student_tokenizer(recipe)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    warnings: list[str] = []
    for source, revision in shared_vocabulary(recipe):
        other = load_tokenizer(source, revision=revision)
        vocab_size = compare_vocabularies(tokenizer, other)
        warned = compare_chat_templates(tokenizer, other) if _is_chat(recipe) else None
        warnings += [warned] if warned else []
    model = _load_model(recipe.student, tokenizer, vocab_size, device, recipe.seed, resume_from)
    disable_dropout(model)
    probe_head(model)
    if recipe.train.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    dtype = recipe.train.compute_dtype
    return Loaded(
        model=model.train(),
        renderer=Renderer(tokenizer, recipe.student.template_kwargs, stop_ids(tokenizer, model)),
        vocab_size=vocab_size,
        device=device,
        compute_dtype=None if dtype is None else getattr(torch, dtype),
        warnings=tuple(warnings),
    )


def _is_chat(recipe: Recipe) -> bool:
    return any(part.chat for part in record_parts(recipe.task).values())


def _load_model(
    student: Student, tokenizer: Any, vocab_size: int, device: torch.device, seed: int, resume_from: Path | None
) -> nn.Module:
    adapters = student.lora is not None
    model = load_base(student, tokenizer, vocab_size, device, seed, None if adapters else resume_from)
    return _adapt(model, student, seed, resume_from) if adapters else model


def load_base(
    student: Student, tokenizer: Any, vocab_size: int, device: torch.device, seed: int, resume_from: Path | None
) -> nn.Module:
    """Without adapters."""
    source = student.model if resume_from is None else str(resume_from)
    model: nn.Module
    if source is None:
        assert student.build is not None
        model = build_causal_lm(
            student.build,
            vocab_size=vocab_size,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            dtype="float32" if student.dtype == "auto" else student.dtype,
            device=device,
            seed=seed,
        )
    else:
        model = load_causal_lm(
            source,
            dtype=student.dtype,
            device=str(device),
            attn_implementation=student.attn_implementation,
            revision=student.revision if source == student.model else None,
        )
    return model


def _adapt(model: nn.Module, student: Student, seed: int, resume_from: Path | None) -> nn.Module:
    assert student.lora is not None
    lora = student.lora
    adapted = apply_lora(
        model,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        target_modules=lora.target_modules or "all-linear",
        seed=seed,
    )
    if resume_from is not None:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(adapted, load_file(resume_from / "adapter_model.safetensors"))
    return adapted


def prompt_limit(recipe: Recipe, sampling: Sampling, *models: nn.Module) -> int:
    """The longest prompt in tokens that leaves room for a response: `train.max_prompt_tokens`, or what positions allow.

    Raises RecipeError where no room is left.
    """
    limits = [limit - sampling.max_new_tokens for model in models if (limit := num_positions(model)) is not None]
    limit = min([recipe.train.max_prompt_tokens, *limits])
    if limit < 1:
        raise RecipeError(
            f"max_new_tokens is {sampling.max_new_tokens}, but a model has {limit + sampling.max_new_tokens} positions "
            "(max_position_embeddings): no prompt fits before the response; lower max_new_tokens"
        )
    return limit


def eval_prompts(recipe: Recipe) -> Sequence[Prompt]:
    """The held-out problems that the section `eval` names."""
    assert recipe.eval is not None
    prompts = recipe.held_out.prompts(recipe.eval.split)
    return prompts if recipe.eval.problems is None else prompts[: recipe.eval.problems]
