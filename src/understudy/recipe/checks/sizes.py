"""How large models are, loaded or on the disk, and how much room there is."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from understudy.models import unwrap

GIB = 2**30
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of a number, by the names of torch and of safetensors."""
_CGROUP = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)
"""Limit, use, and the part of the use that is given back when it is needed; versions 2 and 1."""


@dataclass(frozen=True)
class Size:
    """A model in bytes, and what its activations are counted from."""

    weights: int
    trained: int
    """Bytes of the weights that get a gradient."""
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
    weights = sum(value.numel() * value.element_size() for value in parameters)
    trained = sum(value.numel() * value.element_size() for value in parameters if value.requires_grad)
    return _size(unwrap(model).config.get_text_config(), weights, trained, parameters[0].element_size())


def size_on_disk(source: str | None, dtype: str) -> Size | None:
    """Returns the size of a model directory from its configuration and the headers of its weights; None for anything else."""
    folder = Path(source or "").expanduser()
    files = sorted(folder.glob("*.safetensors")) if source else []
    if not files or not (folder / "config.json").is_file():
        return None
    from transformers import AutoConfig

    elements = stored = 0
    for file in files:
        for entry in _header(file).values():
            elements += math.prod(entry["shape"])
            stored += math.prod(entry["shape"]) * _BYTES.get(entry["dtype"], 1)
    number = _BYTES[dtype] if dtype in _BYTES else max(1, round(stored / max(1, elements)))
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False).get_text_config()
    return _size(config, elements * number, elements * number, number)


def _header(file: Path) -> dict[str, Any]:
    """`{tensor: {dtype, shape, ...}}`."""
    with file.open("rb") as stream:
        values = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {name: entry for name, entry in values.items() if name != "__metadata__"}


def _size(config: Any, weights: int, trained: int, number_bytes: int) -> Size:
    """A layer keeps its two normalised inputs, queries, keys, values, the attention's output and both residuals (12 H with
    what softmax and norm add), and four rows of the feed-forward; attention scores are not kept."""
    hidden = int(getattr(config, "hidden_size", 0) or 0)
    heads = int(getattr(config, "num_attention_heads", 1) or 1)
    wide = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    head = int(getattr(config, "head_dim", None) or hidden // heads)
    shared = int(getattr(config, "num_key_value_heads", None) or heads)
    return Size(weights, trained, 12 * hidden + 4 * wide, 2 * layers * shared * head, hidden, layers, number_bytes)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take there; None where nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return _free_host()


def _free_host() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    for limit, used, cached in _CGROUP:
        try:
            left = int(Path(limit).read_text()) - int(Path(used).read_text())
            stat = dict(line.split() for line in Path(used).with_name("memory.stat").read_text().splitlines())
            free = min(free, left + int(stat.get(cached, 0)))
        except (OSError, ValueError):
            # no limit ("max"), or another system
            continue
    # processes of one machine share its memory
    return max(0, free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_disk(folder: Path) -> int:
    """Bytes free where the folder is, or will be made."""
    folder = folder.expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def used_by(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0


def amount(size: float) -> str:
    """As "1.25 GiB", "3.1 MiB" or "12 KiB"."""
    if size >= GIB / 10:
        return f"{size / GIB:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 / 10 else f"{size / 2**10:.0f} KiB"
