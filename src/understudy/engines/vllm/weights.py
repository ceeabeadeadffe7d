"""How the student's weights travel: as files that a server on the same file system reads, or from GPU to GPU by NCCL."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from threading import Thread
from typing import IO, Any

from understudy.engines.base import Weights
from understudy.engines.sections import EngineSetup
from understudy.engines.vllm.servers import Servers
from understudy.engines.vllm.settings import VLLM
from understudy.errors import EngineError, RecipeError
from understudy.lazy import Tensor, nn, safetensors, torch
from understudy.models import unwrap
from understudy.models.parallel import own_class, pieces

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (where the kernel keeps it)
ROOM = 1.05
"""Free space over the weights' size: headers, configuration and tokenizer come on top."""


def with_head(model: nn.Module, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """The weights with the head also where it is the embedding: an engine may keep a copy of its own (vLLM's on CPUs does)."""
    embedding, head = _tied_names(unwrap(model)) or (None, None)
    kept: Tensor | None = None
    for name, tensor in weights:
        kept = tensor if name == embedding else None if name == head else kept
        yield name, tensor
    if head is not None and kept is not None:
        yield head, kept


def _tied_names(model: Any) -> tuple[str, str] | None:
    """Names of the embedding's weight and of the head's where they are one tensor."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    names = {module: name for name, module in model.named_modules() if module in (embedding, head)}
    return f"{names[embedding]}.weight", f"{names[head]}.weight"


class WeightStore:
    """Directories with one version of the weights each, written whole or not at all, and gone after `close`.

    The folder is named after `run_dir`, so that the next run there finds and removes what a killed one left.
    """

    def __init__(self, section: VLLM, setup: EngineSetup, dtype: torch.dtype) -> None:
        """Raises RecipeError where another run is at work, and for a folder that others can write to."""
        self._model, self._tokenizer = unwrap(setup.model), setup.tokenizer
        self._dtype = dtype
        tensors: list[Tensor] = [*self._model.parameters(), *self._model.buffers()]
        num_tied = self._model.get_input_embeddings().weight.numel() if _tied_names(self._model) else 0
        self._num_bytes = (sum(tensor.numel() for tensor in tensors) + num_tied) * dtype.itemsize
        name = "understudy-" + blake2b(str(setup.run_dir.resolve()).encode(), digest_size=6).hexdigest()
        shared = SHARED_MEMORY / name
        in_memory = section.weights == "shm"
        if section.weights == "auto" and section.weights_dir is None and section.is_local:
            # what a killed run left there counts as free, because it is removed before anything is written
            in_memory = SHARED_MEMORY.is_dir() and _free(SHARED_MEMORY) + _size(shared) > ROOM * self._num_bytes
        elif in_memory and not SHARED_MEMORY.is_dir():
            raise RecipeError(f"rollout.weights is shm, but there is no {SHARED_MEMORY}; use directory")
        place = setup.run_dir / "weights" if section.weights_dir is None else Path(section.weights_dir).expanduser()
        self.folder = shared if in_memory else place / name
        self._lock: IO[bytes] | None = _take_folder(self.folder)

    @contextmanager
    def written(self, weights: Weights, name: str, *, keeps_config: bool = False) -> Iterator[Path]:
        """A directory that vLLM loads, removed at the end; `keeps_config`: except configuration and tokenizer, which a
        server that is started with them may read again. Raises EngineError where it cannot be written."""
        directory = self.write(weights, name)
        try:
            yield directory
        finally:
            for path in directory.glob("*.safetensors"):
                path.unlink(missing_ok=True)
            if not keeps_config:
                shutil.rmtree(directory, ignore_errors=True)

    def write(self, weights: Weights, name: str) -> Path:
        """As `written`, but it stays until `close`."""
        target, aside = self.folder / name, self.folder / f"{name}.tmp"
        try:
            for path in (aside, target):
                shutil.rmtree(path, ignore_errors=True)
            aside.mkdir()
            free = _free(self.folder)
            if free < ROOM * self._num_bytes:
                raise EngineError(
                    f"{self.folder} has {free / 2**30:.2f} GiB free, and the student's weights take "
                    f"{self._num_bytes / 2**30:.2f}; free some, or set rollout.weights: directory and rollout.weights_dir"
                )
            self._write_files(weights, aside)
            config: Any = type(self._model.config).from_dict(self._model.config.to_dict())
            # the files' precision, not the model's
            config.dtype = self._dtype
            with own_class(self._model):
                config.architectures = [type(self._model).__name__]
            config.save_pretrained(aside)
            self._tokenizer.save_pretrained(aside)
            aside.rename(target)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise EngineError(
                f"cannot write the weights to {target}: {error.strerror or error}; free space there, or set "
                "rollout.weights: directory and rollout.weights_dir"
            ) from error
        return target

    def close(self) -> None:
        """Removes everything."""
        if self._lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.close()
            self._lock = None

    def _write_files(self, weights: Weights, directory: Path) -> None:
        def on_host(tensor: Tensor) -> Tensor:
            value = tensor.detach().to("cpu", self._dtype if tensor.is_floating_point() else None)
            # safetensors refuses tensors that share memory, and those of a tied head do
            return (value.clone() if value.data_ptr() == tensor.data_ptr() else value).contiguous()

        files: dict[str, str] = {}
        for number, piece in enumerate(pieces((name, on_host(tensor)) for name, tensor in weights), 1):
            file = f"model-{number:05d}.safetensors"
            safetensors.save_file(piece, directory / file, metadata={"format": "pt"})
            files |= dict.fromkeys(piece, file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def _take_folder(folder: Path) -> IO[bytes]:
    """Makes, locks and empties a folder for this user alone. The kernel releases the lock however this process ends.

    Raises RecipeError for a folder that another user made or may write to, as its name can be guessed and /dev/shm is
    everybody's, and for one where another run is at work.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = True
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        made = False
    found, wrong = folder.lstat(), None
    if not stat.S_ISDIR(found.st_mode):
        wrong = "is a link" if stat.S_ISLNK(found.st_mode) else "is no folder"
    # a network file system may give a folder that was just made to another user
    elif not made and found.st_uid != os.geteuid():
        wrong = f"belongs to another user ({found.st_uid})"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        wrong = "may be written to by others"
    if wrong is not None:
        raise RecipeError(
            f"{folder}, where the student's weights were to go, {wrong}, and nothing is written there: see who made it and "
            "remove it, or set rollout.weights_dir"
        )
    path = folder / "lock"
    try:
        # no link is followed
        lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "r+b")
    except OSError as error:
        raise RecipeError(f"cannot open {path}: {error.strerror}; see who made it and remove it") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise RecipeError(
            f"another run is at work with the same run_dir (it holds {folder}); wait for it, or choose another"
        ) from error
    for left in folder.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
    return lock


def memory_left(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process may still take before something is killed; None where the kernel does not say.

    The least of what the machine has and what the limit of each of its control groups leaves. Cached files count as free: the
    kernel drops them first.
    """

    def entries(path: Path) -> dict[str, int]:
        # lines such as `MemAvailable: 1024 kB` and `active_file 4096`
        words = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
        return {name: int(value) for name, value, *_ in words if value.isdigit()}

    found = []
    with suppress(OSError, ValueError):
        found.append(1024 * entries(proc / "meminfo")["MemAvailable"])
    groups: list[Path] = []
    with suppress(OSError):
        # "0::" is the hierarchy of version 2; limits of the groups above hold too
        own = [line[3:] for line in (proc / "self" / "cgroup").read_text().splitlines() if line.startswith("0::")]
        groups = [cgroups / part for path in own for part in (Path(path.strip("/")), *Path(path.strip("/")).parents)]
    for folder in groups:
        with suppress(OSError, ValueError):
            limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
            if limit != "max":
                cached = entries(folder / "memory.stat")
                files = cached.get("active_file", 0) + cached.get("inactive_file", 0)
                found.append(max(0, int(limit) - int(used) + files))
    return min(found, default=None)


def _free(folder: Path) -> int:
    free = shutil.disk_usage(folder).free
    # the size of shared memory is a limit, and the memory behind it may be taken already
    left = memory_left() if folder.is_relative_to(SHARED_MEMORY) else None
    return free if left is None else min(free, left)


def _size(folder: Path) -> int:
    with suppress(OSError):
        return sum(path.lstat().st_size for path in folder.glob("*/*.safetensors"))
    return 0


class NCCLGroup:
    """Rank 0 of a group, by torch's own bindings. Returns when all ranks are there."""

    def __init__(self, unique_id: bytes, num_ranks: int, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._comm = [torch.cuda.nccl.init_rank(num_ranks, unique_id, 0)]
            # vLLM's ranks begin with the sum of one number each
            torch.cuda.nccl.all_reduce([torch.zeros(1, device=device)], comms=self._comm)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Returns when all other ranks have received the tensors."""
        with torch.cuda.device(self._device):
            for tensor in tensors:
                torch.cuda.nccl.broadcast([tensor], comms=self._comm)
            torch.cuda.current_stream().synchronize()


@dataclass(eq=False)
class NCCLTransfer:
    """Sends weights from the trainer's GPU to those of vLLM servers (0.32 or later), without a file.

    One NCCL group: the trainer is rank 0, the workers of all servers follow. Tests have no GPU: the order of requests and
    ranks is tested against a stub of a server, the broadcasts are not, so the comparison after a push is what counts.
    Whatever fails or takes longer than `timeout_s` is an EngineError.
    """

    servers: Servers
    dtype: torch.dtype
    """Precision of the engine's weights."""
    device: torch.device
    """The trainer's GPU, which holds the weights."""
    timeout_s: float
    open_group: Callable[[bytes, int, torch.device], NCCLGroup] = NCCLGroup
    new_id: Callable[[], bytes] = torch.cuda.nccl.unique_id
    _group: NCCLGroup | None = field(default=None, init=False)

    def send(self, weights: Weights) -> None:
        """Broadcasts the weights in the precision of the engine, some at a time."""
        if self._group is None:
            self._group = self._connect()
        group = self._group
        empty: list[dict[str, Any]] = [{}] * len(self.servers.urls)
        self.servers.everywhere("/start_weight_update", bodies=empty)
        for piece in pieces((name, tensor.detach().to(self.device, self.dtype)) for name, tensor in weights):
            tensors = [tensor.contiguous() for tensor in piece.values()]
            info = {
                "names": list(piece),
                "dtype_names": [str(self.dtype).removeprefix("torch.")] * len(piece),
                "shapes": [list(tensor.shape) for tensor in tensors],
            }
            # servers answer when they have received all of it
            update = [{"update_info": info}] * len(empty)
            self._together(
                partial(self.servers.everywhere, "/update_weights", bodies=update), partial(group.broadcast, tensors)
            )
            del tensors
        self.servers.everywhere("/finish_weight_update", bodies=empty)

    def _connect(self) -> NCCLGroup:
        sizes = self.servers.world_sizes()
        num_ranks, unique_id = 1 + sum(sizes), self.new_id()
        common = {"nccl_unique_id_b64": b64encode(unique_id).decode(), "world_size": num_ranks, "packed": False}
        bodies = [{"init_info": common | {"rank_offset": 1 + sum(sizes[:number])}} for number in range(len(sizes))]
        group: NCCLGroup = self._together(
            lambda: self.servers.everywhere("/init_weight_transfer_engine", bodies=bodies),
            lambda: self.open_group(unique_id, num_ranks, self.device),
        )
        return group

    def _together(self, ask: Callable[[], Any], take_part: Callable[[], Any]) -> Any:
        """Returns the result of `take_part`. Servers and trainer wait for each other, so each side has a thread of its own."""
        futures: list[Future[Any]] = []
        for work in (ask, take_part):
            future: Future[Any] = Future()

            def run(work: Callable[[], Any] = work, future: Future[Any] = future) -> None:
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)

            # not in a pool that is waited for: a collective that lost a peer never returns
            Thread(target=run, name="nccl", daemon=True).start()
            futures.append(future)
        done, late = wait(futures, self.timeout_s, FIRST_EXCEPTION)
        for future in done:
            future.result()
        if late:
            raise EngineError(
                f"weights did not pass to the rollout engine by NCCL in {self.timeout_s:g} s: see that its GPUs and the "
                "trainer's reach each other, or use rollout.weights: auto"
            )
        return futures[1].result()
