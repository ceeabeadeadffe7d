"""The student's weights as files that a server on the same machine, or on the same file system, reads."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from understudy.engines.vllm.shared_memory import SHARED_MEMORY, make_private, memory_left, open_lock
from understudy.errors import EngineError, RecipeError
from understudy.models import unwrap

SHARD_BYTES = 4 * 2**30
"""Of one file: what is copied to the CPU at a time."""
ROOM = 1.05
"""Of the weights' size that must be free: headers, configuration and tokenizer come on top."""
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class WeightStore:
    """Directories with one version of the weights each, written whole or not at all, and gone after `close`.

    A folder in shared memory is named after `run_dir`, so that the next run there finds and removes what a killed one left.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        run_dir: Path,
        *,
        dtype: torch.dtype,
        place: Path | Literal["shm"] | None,
    ) -> None:
        """`place`: None for shared memory where it has room and `run_dir` where it has not. Raises RecipeError for another
        run that is at work there, and for a folder there that others can write to."""
        self._model = unwrap(model)
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._tied = _tied_head(self._model)
        self._folder = self._choose(run_dir, place)
        self._lock: IO[bytes] | None = self._take()

    @property
    def folder(self) -> Path:
        """Where everything lies."""
        return self._folder

    @property
    def num_bytes(self) -> int:
        """Of one version."""
        tensors: list[Tensor] = [*self._model.parameters(), *self._model.buffers()]
        numbers = sum(tensor.numel() for tensor in tensors) + (self._tied.num_weights if self._tied else 0)
        return numbers * self._dtype.itemsize

    def write(self, weights: Iterable[tuple[str, Tensor]], name: str) -> Path:
        """A directory that vLLM loads. Raises EngineError where it cannot be written."""
        target, aside = self._folder / name, self._folder / f"{name}.tmp"
        try:
            for path in (aside, target):
                shutil.rmtree(path, ignore_errors=True)
            aside.mkdir()
            self._check_room(self._folder)
            self._write_shards(weights, aside)
            self._describe(aside)
            aside.rename(target)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise EngineError(
                f"cannot write the weights to {target}: {error.strerror or error}; free space there, or set "
                "rollout.weights: directory and rollout.weights_dir"
            ) from error
        return target

    def drop_tensors(self, directory: Path) -> None:
        """Leaves configuration and tokenizer, which a server that was started with them may read again."""
        for path in directory.glob("*.safetensors"):
            path.unlink(missing_ok=True)

    def drop(self, directory: Path) -> None:
        """Removes one version."""
        shutil.rmtree(directory, ignore_errors=True)

    def close(self) -> None:
        """Removes everything."""
        if self._lock is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._lock.close()
            self._lock = None

    def _choose(self, run_dir: Path, place: Path | Literal["shm"] | None) -> Path:
        name = "understudy-" + blake2b(str(run_dir.resolve()).encode(), digest_size=6).hexdigest()
        if isinstance(place, Path):
            return place / name
        shared = SHARED_MEMORY / name
        if place == "shm":
            if not SHARED_MEMORY.is_dir():
                raise RecipeError(f"rollout.weights is shm, but there is no {SHARED_MEMORY}; use directory")
            return shared
        # what a killed run left there is room too, and is removed before anything is written
        has_room = SHARED_MEMORY.is_dir() and _free(SHARED_MEMORY) + _size(shared) > ROOM * self.num_bytes
        return shared if has_room else run_dir / "weights" / name

    def _take(self) -> IO[bytes]:
        """Ours alone while the file is open: the kernel gives it free when this process ends, however it ends."""
        make_private(self._folder)
        lock = open_lock(self._folder / "lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise RecipeError(
                f"another run is at work with the same run_dir (it holds {self._folder}); wait for it, or choose another"
            ) from error
        for path in self._folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
        return lock

    def _check_room(self, folder: Path) -> None:
        free = _free(folder)
        if free < ROOM * self.num_bytes:
            raise EngineError(
                f"{folder} has {free / 2**30:.2f} GiB free, and the student's weights take {self.num_bytes / 2**30:.2f}; free "
                "some, or set rollout.weights: directory and rollout.weights_dir"
            )

    def _write_shards(self, weights: Iterable[tuple[str, Tensor]], directory: Path) -> None:
        index: dict[str, str] = {}
        shard: dict[str, Tensor] = {}
        size = 0
        for name, tensor in weights:
            value = tensor.detach().to("cpu", self._dtype if tensor.is_floating_point() else None)
            # safetensors refuses tensors that share memory
            shard[name] = value.clone() if value.data_ptr() == tensor.data_ptr() else value
            shard[name] = shard[name].contiguous()
            size += value.numel() * value.element_size()
            if size >= SHARD_BYTES:
                _flush(shard, directory, index)
                size = 0
        _flush(shard, directory, index)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))

    def _describe(self, directory: Path) -> None:
        """Configuration and tokenizer. The precision is that of the files."""
        config: Any = type(self._model.config).from_dict(self._model.config.to_dict())
        config.dtype = self._dtype
        config.architectures = [type(self._model).__name__]
        config.save_pretrained(directory)
        self._tokenizer.save_pretrained(directory)


def with_head(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The head also where it is the embedding: an engine may keep a copy of its own (vLLM's on CPUs packs one)."""
    tied = _tied_head(unwrap(model))
    found: dict[str, Tensor] = {}
    for name, tensor in weights:
        if tied is not None and name in (tied.embedding, tied.head):
            found[name] = tensor
        yield name, tensor
    if tied is not None and tied.head not in found:
        if tied.embedding not in found:
            raise ValueError(f"the weights have no {tied.embedding}, which is also the head")
        yield tied.head, found[tied.embedding]


def engine_dtype(asked: str, model: nn.Module) -> torch.dtype:
    """`auto` is that of the student's weights, and float32 for those that no engine has."""
    own = unwrap(model).dtype
    return FLOATS.get(asked, own if own in (torch.float32, torch.bfloat16, torch.float16) else torch.float32)


@dataclass(frozen=True)
class _Tied:
    """Names of an embedding's weight and of the head's, which are one."""

    embedding: str
    head: str
    num_weights: int


def _tied_head(model: Any) -> _Tied | None:
    """None where each has its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    names = {module: name for name, module in model.named_modules() if module in (embedding, head)}
    return _Tied(f"{names[embedding]}.weight", f"{names[head]}.weight", embedding.weight.numel())


def _flush(shard: dict[str, Tensor], directory: Path, index: dict[str, str]) -> None:
    if shard:
        file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))
        shard.clear()


def _free(folder: Path) -> int:
    free = shutil.disk_usage(folder).free
    # what is free in shared memory is a limit, and no memory that is set aside
    left = memory_left() if folder.is_relative_to(SHARED_MEMORY) else None
    return free if left is None else min(free, left)


def _size(folder: Path) -> int:
    total = 0
    with suppress(OSError):
        total = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    return total
