"""Load models (checked first, safetensors only, no remote code) and save them."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from safetensors import safe_open

from understudy import given
from understudy.errors import RecipeError, nearest
from understudy.lazy import Tensor, nn, no_grad, torch
from understudy.models.attention import NAME as SEGMENTS
from understudy.models.attention import attention_name
from understudy.models.backbone import evaluating, unwrap, vision_of
from understudy.models.files import ADAPTER, adapter_base, check_model_dir, locate, positions_of, said_by
from understudy.models.lora import merge_adapter, merged_state_dict, untie_adapted
from understudy.models.parallel import pieces
from understudy.models.vision import Vision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DType = Literal["auto", "float32", "float16", "bfloat16", "float64"]
_ATTENTION_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
"""Attention -> the module that it needs, and its package. The package kernels fetches them from the hub."""


def load_causal_lm(
    path_or_name: str,
    *,
    dtype: DType = "auto",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    revision: str | None = None,
    copy: bool = False,
    vision: Vision | None = None,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, an adapter merged into the base that it names.

    `dtype="auto"` keeps the checkpoint's own precision, but for bfloat16 on a device that lacks its instructions: float32.
    `copy`: of a model that was given from Python, not itself. `vision`: the model's own (`load_vision`), to read images with;
    without it a model of images and text is loaded for text alone, where transformers can.

    Raises RecipeError when the directory is incomplete, nothing can be loaded, or weights and configuration do not fit: some
    would be random, or left out.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if (pair := given.find(path_or_name)) is not None:
        return _loaded_before(deepcopy(pair[0]) if copy else pair[0], path_or_name, dtype, device, attn_implementation)
    check_model_dir(path_or_name)
    local = Path(path_or_name).expanduser()
    if (local / ADAPTER).is_file():
        base = load_causal_lm(
            adapter_base(local), dtype=dtype, device=device, attn_implementation=attn_implementation, vision=vision
        )
        return merge_adapter(base, local)
    source, offline = locate(path_or_name)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    kind = AutoModelForCausalLM if vision is None else AutoModelForImageTextToText
    try:
        model, info = kind.from_pretrained(
            source,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            revision=revision or "main",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            # they are refused below, by name
            ignore_mismatched_sizes=True,
            **options,
        )
    except Exception as error:
        # a configuration or a file may make any part of transformers raise
        raise RecipeError(f"cannot load the model {path_or_name!r}: {_why_not(error, offline)}") from error
    _check_weights(model, path_or_name, info)
    _untie_separate(model)
    if vision is not None:
        model.vision = vision
    if dtype == "auto" and model.dtype == torch.bfloat16 and not has_bfloat16(torch.device(device)):
        model = model.float()
    return cast("PreTrainedModel", model.to(device).eval())


def drop_layers(model: PreTrainedModel, dropped: Collection[int]) -> None:
    """Takes these layers, counted from 0, out of a decoder whose layers are a plain list, such as Llama's and Qwen's.

    Raises RecipeError for layers that it does not have, and where none would be left.
    """
    decoder: Any = model.get_decoder()
    config: Any = model.config.get_text_config()
    if not set(dropped) < set(range(len(decoder.layers))):
        raise RecipeError(
            f"layers {sorted(dropped)} cannot be dropped; name some, not all, of 0 to {len(decoder.layers) - 1}"
        )
    kept = [layer for index, layer in enumerate(decoder.layers) if index not in dropped]
    for index, layer in enumerate(kept):
        # the cache of keys and values is kept by this number
        layer.self_attn.layer_idx = index
    decoder.layers = nn.ModuleList(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [kind for index, kind in enumerate(config.layer_types) if index not in dropped]
    config.num_hidden_layers = len(kept)


def _why_not(error: Exception, offline: str | None) -> str:
    text = said_by(error, offline)
    if text.startswith("Unrecognized configuration class"):
        kind = text.partition("'>")[0].rpartition(".")[2].removesuffix("Config")
        return (
            f"transformers has no causal language model of the kind {kind} (an encoder, an encoder with a decoder, or a model "
            "that reads more than text); choose a causal language model"
        )
    if "custom code" in text:
        return (
            "it needs code from its directory, which is never run here; choose a model that transformers has by itself"
        )
    return (
        text
        if isinstance(error, (OSError, ValueError, ImportError, RuntimeError))
        else f"{type(error).__name__}: {text}"
    )


def _check_weights(model: Any, name: str, info: Mapping[str, Any]) -> None:
    """Raises RecipeError for weights that the model needs and lacks, that have another shape, or that belong to a part of it
    and would be left out. Parts that it does not have, such as a value head or a vision tower, may be left out: their tensors
    are in `model.left_out`, which the doctor tells of."""
    kind = type(model).__name__
    if info["mismatched_keys"]:
        first, stored, wanted = sorted(info["mismatched_keys"])[0]
        raise RecipeError(
            f"the weights of {name!r} do not fit its config.json: {first!r} is {list(stored)} in the file and {list(wanted)} "
            f"by the configuration ({len(info['mismatched_keys'])} tensors differ)"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise RecipeError(
            f"the weights of {name!r} lack {len(missing)} tensors of {kind}, first {missing[0]!r}: they would be random. Is it "
            "a checkpoint of another kind of model?"
        )
    own = {part for part, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None}
    # "layers.4.mlp.up_proj" belongs to a model with "layers.0.mlp.up_proj", whose configuration says fewer layers
    left_out = sorted(
        key
        for key in info["unexpected_keys"]
        if own & {key.rpartition(".")[0], re.sub(r"\.\d+\.", ".0.", key.rpartition(".")[0])}
    )
    if left_out:
        raise RecipeError(
            f"the weights of {name!r} hold {len(left_out)} tensors that its config.json has no place for, first "
            f"{left_out[0]!r}: {kind} would run without them. Correct config.json (layers, biases, quantization), "
            "or choose another model"
        )
    model.left_out = sorted(info["unexpected_keys"])


def _untie_separate(model: Any) -> None:
    """Says in the configuration that embedding and output layer are not tied where the file holds both and they differ:
    transformers keeps them apart then, and an engine that goes by the configuration would not."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [getattr(layer, "weight", None) for layer in (embedding, head)]
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if is_tied and None not in weights and weights[0] is not weights[1]:
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; without them it is emulated, at a fraction of float32's speed."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    instructions = torch.cpu.get_capabilities()
    # the first two of x86, the third of ARM
    return any(instructions.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _loaded_before(
    model: Any, name: str, dtype: DType, device: str | torch.device, attn_implementation: str | None
) -> PreTrainedModel:
    """A model that was given from Python: itself, or a copy where another precision is asked for."""
    attention = attention_name(model)
    if attn_implementation not in (None, attention):
        raise RecipeError(
            f"{name} has the attention {attention!r}; load it with {attn_implementation!r}, or leave attn_implementation out"
        )
    wanted = model.dtype if dtype == "auto" else getattr(torch, dtype)
    return cast("PreTrainedModel", (model if wanted == model.dtype else deepcopy(model).to(wanted)).to(device).eval())


def check_attention(name: str | None, place: str) -> None:
    """Raises RecipeError for an attention that transformers does not know, or whose package is not installed."""
    # a name with a slash is a kernel of the hub
    if name is None or "/" in name or "|" in name:
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()} - {SEGMENTS}
    known -= {one for one in ALL_ATTENTION_FUNCTIONS if "|" in one}
    if name not in known:
        raise RecipeError(f"{place}.attn_implementation is {name!r}; {nearest(name, known)}")
    package, install = _ATTENTION_PACKAGES.get(name, ("torch", ""))
    if not any(map(importlib.util.find_spec, (package, "kernels"))):
        raise RecipeError(
            f"{place}.attn_implementation is {name!r}, but the package {install} is not installed; install it, or take sdpa"
        )


ADAPTER_DIR = "adapter"
"""Folder of the adapter beside the model that it is merged into."""


def save_hf(
    model: nn.Module,
    tokenizer: Any,
    directory: str | Path,
    *,
    merged: bool = True,
    stop_ids: Sequence[int] | None = None,
    weights: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """A directory that `AutoModelForCausalLM` (`merged`) or PEFT (an adapter) loads, with the tokenizer. Safetensors.

    The model keeps its generation settings; `stop_ids` are saved in them, so that whoever serves it stops where the run did.

    Merging forms `W + delta` on the side: the live model and its adapters stay as they are, and the adapters are saved
    too, in `ADAPTER_DIR`.

    `weights`: names and tensors in place of the model's own, read once and written some at a time; not to be merged.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    base: Any = unwrap(model)
    adapted: Any = model
    if base is adapted and weights is not None:
        _save_pieces(base, target, weights)
    elif base is adapted:
        base.save_pretrained(target)
    else:
        # the embedding has its own size, so peft need not look for that of the base on the hub, nor save it whole
        adapted.save_pretrained(
            target / ADAPTER_DIR if merged else target,
            save_embedding_layers=False,
            state_dict=None if weights is None else dict(weights),
        )
        if merged:
            untie_adapted(model)
            base.save_pretrained(target, state_dict=merged_state_dict(model))
    settings = target / "generation_config.json"
    if stop_ids is not None and settings.is_file():
        # in the file: transformers refuses to save settings like `top_k` without `do_sample` once one of them was changed
        values = json.loads(settings.read_text()) | {"eos_token_id": list(stop_ids), "_from_model_config": False}
        settings.write_text(json.dumps(values, indent=2))
    tokenizer.save_pretrained(target)
    if (vision := vision_of(model)) is not None:
        for name, text in vision.files.items():
            (target / name).write_text(text, encoding="utf-8")


def _save_pieces(base: Any, target: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Each piece by transformers, which may have other names and shapes in files, to a file of its own."""
    names: dict[Path, list[str]] = {}
    size, written = 0, target / "model.safetensors"
    for number, piece in enumerate(pieces(weights), 1):
        base.save_pretrained(target, state_dict=dict(piece), max_shard_size=2**62)
        path = written.rename(target / f"model-{number:05d}.safetensors")
        with safe_open(path, "pt") as file:
            names[path] = list(file.keys())
        size += path.stat().st_size
    if len(names) == 1:
        path.rename(written)
        return
    files: dict[str, str] = {}
    for path, inside in names.items():
        of_all = path.rename(path.with_stem(f"{path.stem}-of-{len(names):05d}"))
        files |= dict.fromkeys(inside, of_all.name)
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


@no_grad
def read_back(model: nn.Module, directory: str | Path) -> float:
    """The largest difference between the logits of the model and of what was saved in the directory, over the largest logit.

    Some architectures do not load as they were saved: transformers empties the embedding's row of the padding token of one.
    Raises RecipeError for what cannot be loaded.
    """
    base = unwrap(model)
    dtype = str(base.dtype).removeprefix("torch.")
    # on the CPU: a GPU may have no room for a second copy
    again = load_causal_lm(str(directory), dtype=cast("DType", dtype), vision=vision_of(model))
    rows, limit = base.get_output_embeddings().weight.shape[0], positions_of(base.config.get_text_config())
    # the first ids are most often the special ones
    ids = torch.arange(min(16, rows, limit or 16))[None]
    with evaluating(model):
        live = base(input_ids=ids.to(base.device), use_cache=False).logits.float().cpu()
    saved = again(input_ids=ids, use_cache=False).logits.float()
    return float((saved - live).abs().max() / live.abs().max().clamp_min(1e-30))
