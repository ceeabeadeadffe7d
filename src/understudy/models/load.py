"""Models from a directory or the hub: checked first, safetensors only, no code of strangers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from understudy.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DType = Literal["auto", "float32", "float16", "bfloat16", "float64"]
_WEIGHTS, _INDEX, _ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"


def check_model_dir(path: str) -> str:
    """What can be said about a model without loading it: a directory that is complete, or a name for the hub.

    Raises RecipeError for a path that exists and is no directory, or lacks config.json or weights, and for what looks
    like a path but does not exist.
    """
    directory = Path(path).expanduser()
    if not directory.exists():
        if path.startswith((".", "/", "~")) or path.count("/") > 1 or not path.strip():
            raise RecipeError(
                f"no model directory at {path!r}; give an existing directory or a hub name like 'org/name'"
            )
        return f"{path}: looks like a hub name, not checked offline"
    if not directory.is_dir():
        raise RecipeError(f"{path!r} is a file; a model is a directory with config.json and {_WEIGHTS}")
    if (directory / _ADAPTER).is_file():
        return f"{path}: a LoRA adapter on {check_model_dir(_adapter_base(directory))}"
    if not (directory / "config.json").is_file():
        raise RecipeError(f"{path!r} has no config.json, so it is no model directory; write one with `save_pretrained`")
    _check_weights(directory)
    return f"{path}: config.json and weights are there"


def _check_weights(directory: Path) -> None:
    index = directory / _INDEX
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise RecipeError(f"{index} cannot be read ({error}); download the model again") from error
        missing = sorted(shard for shard in shards if not (directory / shard).is_file())
        if missing:
            raise RecipeError(
                f"{str(directory)!r} lacks {len(missing)} of its {len(shards)} weight files: {missing[0]}"
            )
    elif not (directory / _WEIGHTS).is_file():
        other = sorted(
            file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in directory.glob(pattern)
        )
        hint = f"; {other[0]} is another format, save it with `save_pretrained` as safetensors" if other else ""
        raise RecipeError(f"{str(directory)!r} has no weights: neither {_WEIGHTS} nor {_INDEX}{hint}")


def load_causal_lm(
    path_or_name: str,
    *,
    dtype: DType = "auto",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """A causal language model in evaluation mode. `dtype="auto"` keeps the checkpoint's own precision.

    Raises RecipeError when the directory is incomplete, nothing can be loaded, or weights of the model are missing
    (they would be random).
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    check_model_dir(path_or_name)
    local = Path(path_or_name).expanduser()
    if (local / _ADAPTER).is_file():
        return _load_adapted(local, dtype, device, attn_implementation)
    source = str(local) if local.exists() else path_or_name
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            revision=revision or "main",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise RecipeError(f"cannot load the model {path_or_name!r}: {_first_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise RecipeError(
            f"the weights of {path_or_name!r} lack {len(missing)} tensors of {type(model).__name__}, first "
            f"{missing[0]!r}: they would be random. Is it a checkpoint of another kind of model?"
        )
    return cast("PreTrainedModel", model.to(device).eval())


def _load_adapted(
    directory: Path, dtype: DType, device: str | torch.device, attn_implementation: str | None
) -> PreTrainedModel:
    """The base that an adapter names, with the adapter merged into its weights."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise RecipeError(f"{directory} is a LoRA adapter; run: pip install 'understudy[lora]'") from error
    base = load_causal_lm(_adapter_base(directory), dtype=dtype, device=device, attn_implementation=attn_implementation)
    merged: Any = PeftModel.from_pretrained(base, str(directory)).merge_and_unload()
    return cast("PreTrainedModel", merged.eval())


def _adapter_base(directory: Path) -> str:
    return str(json.loads((directory / _ADAPTER).read_text())["base_model_name_or_path"])


def _first_line(error: BaseException) -> str:
    text: Any = str(error).strip()
    return str(text.splitlines()[0]) if text else type(error).__name__
