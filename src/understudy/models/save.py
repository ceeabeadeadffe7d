"""LoRA adapters, and models on disk as plain Hugging Face directories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from understudy.errors import RecipeError
from understudy.models.backbone import unwrap


def apply_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    seed: int = 0,
) -> nn.Module:
    """The model with adapters `W + alpha / rank * B A` on `target_modules`; all else frozen, the output layer too.

    Raises RecipeError when peft is not installed, when a module name matches nothing, or when it is the output layer.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError("LoRA needs the package peft: pip install 'understudy[lora]'") from error
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none", task_type="CAUSAL_LM"
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(f"cannot add LoRA to {type(model).__name__}: {str(error).splitlines()[0]}") from error
    if hasattr(unwrap(adapted).get_output_embeddings(), "base_layer"):
        raise RecipeError(
            f"LoRA on the output layer is not supported (target_modules {target_modules!r}): losses read its weight"
        )
    return adapted


def save_hf(model: nn.Module, tokenizer: Any, directory: str | Path, *, merged: bool = True) -> None:
    """A directory that `AutoModelForCausalLM` (`merged`) or PEFT (an adapter) loads, with the tokenizer. Safetensors.

    Merging forms `W + delta` on the side: the live model and its adapters stay as they are.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    base = unwrap(model)
    if base is not model and merged:
        base.save_pretrained(target, state_dict=merged_state_dict(model))
    else:
        cast("Any", model).save_pretrained(target)
    tokenizer.save_pretrained(target)


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the plain model, with every adapter added to a copy of the weight that it belongs to."""
    base = unwrap(model)
    module: Any
    state: dict[str, Tensor] = {}
    for name, value in base.state_dict().items():
        if ".lora_" in name:
            continue
        state[name.replace(".base_layer.", ".")] = value
    for name, module in base.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        weight = state[f"{name}.weight"]
        # at least float32, so that a small delta is rounded once, with the sum
        total = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for adapter in module.active_adapters:
            total = total + module.get_delta_weight(adapter).to(total.dtype)
        state[f"{name}.weight"] = total.to(weight.dtype)
    return state
