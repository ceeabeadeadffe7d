"""Weights from the trainer's GPU to those of vLLM servers (0.32 or later), without a file.

One NCCL group: the trainer is rank 0, the workers of all servers follow. They are told what comes, and the tensors are
broadcast one by one. The order of requests and ranks is tested against a server that is a stub; the project's tests have
no GPU, so the broadcasts themselves are not: what stands behind a push is that log-probabilities are compared after it.
"""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from threading import Thread
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from understudy.engines.vllm.servers import Servers
from understudy.errors import EngineError, RecipeError

Result = TypeVar("Result")
_POLL_S = 0.01


class Group(Protocol):
    """Rank 0 of an NCCL group."""

    def broadcast(self, tensor: Tensor) -> None:
        """Queued; the others receive it."""
        ...

    def is_done(self) -> bool:
        """Whether everything that was queued has been sent."""
        ...


class NCCLGroup:
    """A group on one GPU, by torch's own bindings. Returns when all ranks are there."""

    def __init__(self, unique_id: bytes, num_ranks: int, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._comm = [torch.cuda.nccl.init_rank(num_ranks, unique_id, 0)]
            # vLLM's ranks begin with the sum of one number each
            torch.cuda.nccl.all_reduce([torch.zeros(1, device=device)], comms=self._comm)

    def broadcast(self, tensor: Tensor) -> None:
        """On the current stream."""
        with torch.cuda.device(self._device):
            torch.cuda.nccl.broadcast([tensor], comms=self._comm)

    def is_done(self) -> bool:
        """Whether the current stream is idle."""
        return torch.cuda.current_stream(self._device).query()


class NCCLTransfer:
    """Sends weights to all servers at the same time; what fails or takes longer than `patience_s` is an EngineError."""

    def __init__(
        self,
        servers: Servers,
        dtype: torch.dtype,
        device: torch.device,
        patience_s: float,
        open_group: Callable[[bytes, int, torch.device], Group] | None = None,
    ) -> None:
        """`dtype`: of the engine; `device`: of the weights. Raises RecipeError where that is no GPU."""
        if open_group is None and device.type != "cuda":
            raise RecipeError("rollout.weights is nccl, but the trainer has no GPU; use auto, shm or directory")
        self._servers = servers
        self._dtype = dtype
        self._device = device
        self._patience_s = patience_s
        self._open_group = open_group or NCCLGroup
        self._new_id = torch.cuda.nccl.unique_id if open_group is None else lambda: bytes(128)
        self._group: Group | None = None

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """All of them, in the precision of the engine."""
        if self._group is None:
            self._group = self._connect()
        group, given = self._group, list(weights)
        told = {
            "names": [name for name, _ in given],
            "dtype_names": [str(self._dtype).removeprefix("torch.")] * len(given),
            "shapes": [list(tensor.shape) for _, tensor in given],
        }
        self._servers.post_all("/start_weight_update", {})
        received = _begin(
            lambda: self._servers.post_all("/update_weights", [{"update_info": told}] * self._num_servers)
        )
        # kept until they have been sent
        sent = [tensor.detach().to(self._device, self._dtype).contiguous() for _, tensor in given]
        for tensor in sent:
            group.broadcast(tensor)
        self._wait(received.done, received)
        received.result()
        self._wait(group.is_done, received)
        self._servers.post_all("/finish_weight_update", {})

    @property
    def _num_servers(self) -> int:
        return len(self._servers.urls)

    def _connect(self) -> Group:
        """Both sides wait for each other, so each does in a thread of its own."""
        sizes = self._servers.world_sizes()
        num_ranks, unique_id = 1 + sum(sizes), self._new_id()
        common = {"nccl_unique_id_b64": b64encode(unique_id).decode(), "world_size": num_ranks, "packed": False}
        told = [{"init_info": common | {"rank_offset": 1 + sum(sizes[:server])}} for server in range(self._num_servers)]
        joined = _begin(lambda: self._servers.post_all("/init_weight_transfer_engine", told))
        opened = _begin(lambda: self._open_group(unique_id, num_ranks, self._device))
        self._wait(lambda: joined.done() and opened.done(), joined, opened)
        return opened.result()

    def _wait(self, done: Callable[[], bool], *others: Future[Any]) -> None:
        until = time.monotonic() + self._patience_s
        while not done():
            for other in others:
                if other.done() and other.exception() is not None:
                    other.result()
            if time.monotonic() > until:
                raise EngineError(
                    f"weights did not pass to the rollout engine by NCCL in {self._patience_s:g} s: see that its GPUs and the "
                    "trainer's reach each other, or use rollout.weights: auto"
                )
            time.sleep(_POLL_S)


def _begin(work: Callable[[], Result]) -> Future[Result]:
    """In a thread that nobody has to wait for: a collective that lost a peer never returns."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="nccl", daemon=True).start()
    return future
