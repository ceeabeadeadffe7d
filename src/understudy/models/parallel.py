"""A model in shards over ranks, by PyTorch's `fully_shard` (FSDP2): each rank keeps a part of every weight."""

from __future__ import annotations

import copy
import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from understudy.errors import RecipeError
from understudy.lazy import Tensor, nn, no_grad, torch
from understudy.models.backbone import backbone_hidden, blocks_of, decoder_of, unwrap

PIECE_BYTES = 2**30
"""Weights that are held at a time, beside the model, on their way to files and engines."""


@dataclass(frozen=True, eq=False)
class Shards:
    """The modules of a model that gather their weights, the root (all that is in no block) last."""

    blocks: tuple[Any, ...]
    root: Any
    reshard: bool
    """Whether a block drops its gathered weights after its forward."""
    whole_gradients: bool
    """Whether gradients of several backwards add up whole on each rank."""
    head: Any = None
    """The output layer where each rank keeps a slice of the vocabulary, which no update gathers; None: a part of the root."""
    head_dtype: torch.dtype | None = None
    """Precision of the whole head that samples are written with; None: its own."""


def shards_of(model: nn.Module) -> Shards | None:
    """The shards of a model that `shard` was called with; None for any other."""
    return getattr(unwrap(model), "shards", None)


def shard(
    model: nn.Module,
    mesh: Any,
    *,
    reshard: bool = True,
    whole_gradients: bool = False,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    vocabulary: bool = False,
) -> None:
    """Leaves every rank its part of the weights. A collective call over a mesh of dimensions "replicate" and "shard".

    A block gathers its weights when it runs, in `param_dtype`. The embedding, the final norm and the output layer, which may be
    tied, are one more part: it is gathered by the first forward of an update and stays until its last backward, so the head is
    gathered once, not for every chunk, and its gradient is reduced once. Gradients are summed over all ranks in
    `reduce_dtype`. None: the weights' own precision.

    `vocabulary`: each rank keeps its rows of the output layer, in their own precision, and `lm_head` gives the head in slices
    (`linear.Slice`) over the ranks of "shard".

    Raises RecipeError for a model whose blocks are not known, and with `vocabulary` where the embedding is the output layer.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    base, decoder, blocks = unwrap(model), decoder_of(model), blocks_of(model)
    if not blocks:
        raise RecipeError(
            f"{type(base).__name__} does not say which of its modules are its blocks, so it cannot be sharded; remove the "
            "section parallel, or choose another model"
        )
    head = base.get_output_embeddings() if vocabulary else None
    if head is not None and head.weight is base.get_input_embeddings().weight:
        raise RecipeError(
            f"{type(base).__name__} has one weight for embedding and output layer (tie_word_embeddings), which is gathered for "
            "the embedding anyway; remove parallel.vocabulary"
        )
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    for module in (*blocks, base):
        own = None if head is None else set(head.parameters())
        part: Any = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, ignored_params=own)
        # a loss is normalised by the counts of all ranks, so gradients are added up; gloo knows no mean
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    base.set_reshard_after_forward(False, recurse=False)
    # by name: else a backward gathers ahead what ran before in earlier forwards too, and ranks that wrote no sample had none
    for before, module in pairwise((base, *blocks, base)):
        module.set_modules_to_backward_prefetch([before])

    # the losses run the backbone without the model's own forward, where the root's hooks are
    def run_decoder(**given: Any) -> Any:
        return decoder(**given)

    base.run_decoder = run_decoder
    register_fsdp_forward_method(base, "run_decoder")
    base.shards = Shards(tuple(blocks), base, reshard, whole_gradients, head, param_dtype)
    for name, value in [] if head is None else list(head.named_parameters()):
        rows = _by_rows(value.detach(), mesh)
        setattr(head, name, nn.Parameter(rows, requires_grad=value.requires_grad))
    # the first forward decides which module is the root; a block that ran alone would take itself for one
    idle(model)
    release(model)


def can_slice(model: nn.Module, num_ranks: int, vocab_size: int) -> bool:
    """Whether an output layer can be in slices of the vocabulary: it is not the embedding too, and each rank has a token."""
    base = unwrap(model)
    weight = base.get_output_embeddings().weight
    most = -(-weight.shape[0] // num_ranks)
    return weight is not base.get_input_embeddings().weight and (num_ranks - 1) * most < vocab_size


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """The whole weights on every rank inside, gathered once for all forwards, which are then no collective calls. Nothing may
    be trained inside. Entering is a collective call; a model that is not in shards stays as it is."""
    shards = shards_of(model)
    if shards is None:
        yield
        return
    modules = [*shards.blocks, shards.root]
    rows = {} if shards.head is None else dict(shards.head.named_parameters())
    try:
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        for name, value in rows.items():
            all_rows = whole(value.detach()).to(shards.head_dtype or value.dtype)
            setattr(shards.head, name, nn.Parameter(all_rows, requires_grad=False))
        yield
    finally:
        for name, value in rows.items():
            setattr(shards.head, name, value)
        release(model)
        for block in shards.blocks:
            block.set_reshard_after_forward(shards.reshard, recurse=False)


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of the model whose weights have no memory: `save_hf` writes given weights with it while shards are in use."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {
        id(value): nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
        for value, empty in ((value, torch.empty_like(value, device="meta")) for value in tensors)
    }
    return copy.deepcopy(model, memo)


@contextmanager
def own_class(model: nn.Module) -> Iterator[None]:
    """The model's own class inside, by whose name transformers knows how weights are called in files: shards change it."""
    base: Any = unwrap(model)
    changed = type(base)
    base.__class__ = changed if shards_of(model) is None else changed.__mro__[2]
    try:
        yield
    finally:
        base.__class__ = changed


def longest(model: nn.Module, number: int) -> int:
    """The largest `number` of any rank, which is how many forwards all of them have to make. A collective call."""
    count = torch.tensor(number, device=next(model.parameters()).device)
    torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)
    return int(count)


@no_grad
def idle(model: nn.Module) -> None:
    """Takes part in a forward that other ranks make."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    backbone_hidden(model, ids, ids)


def release(model: nn.Module) -> None:
    """Drops all that was gathered of a model in shards."""
    shards = shards_of(model)
    if shards is not None:
        for module in (*shards.blocks, shards.root):
            module.reshard()


def reduce_gradients(model: nn.Module, *, now: bool) -> None:
    """Whether the next backward is the last of an update, behind which the gradient of all of them is there. Until then each
    rank keeps its gradient of what is in no block whole, and a block's is reduced within a group of shards at most."""
    shards = shards_of(model)
    if shards is not None:
        shards.root.set_requires_all_reduce(now)
        shards.root.set_requires_gradient_sync(now, recurse=False)
        shards.root.set_reshard_after_backward(now, recurse=False)
        for block in shards.blocks:
            block.set_requires_gradient_sync(now or not shards.whole_gradients, recurse=False)
            block.set_reshard_after_backward(now or shards.reshard, recurse=False)


def sum_head_gradients(model: nn.Module) -> None:
    """Adds up over the groups of shards the gradient of a head in slices of the vocabulary, which has the rows of a group."""
    shards = shards_of(model)
    for value in [] if shards is None or shards.head is None else shards.head.parameters():
        groups = value.device_mesh["replicate"]
        if value.grad is not None and groups.size() > 1:
            torch.distributed.all_reduce(local(value.grad), group=groups.get_group())


def _by_rows(value: Tensor, mesh: Any) -> Tensor:
    """The tensor, which every rank has, in shards of its rows over the dimension "shard" of the mesh."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    return distribute_tensor(value, mesh, [Replicate(), Shard(0)], src_data_rank=None)


def local(value: Tensor) -> Tensor:
    """This rank's part of a tensor in shards; any other tensor as it is."""
    part: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return part


def whole(value: Tensor) -> Tensor:
    """The whole of a tensor in shards, a collective call; any other tensor as it is."""
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full


def like(value: Tensor, other: Any) -> Tensor:
    """A whole tensor, which every rank has, on the device of `other` and in shards as that is; one in shards as it is."""
    if not hasattr(other, "device_mesh") or hasattr(value, "device_mesh"):
        return value.to(other.device)
    from torch.distributed.tensor import distribute_tensor

    # no rank needs to be sent what it has
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def stream(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as in the model's state dict, of a model in shards whole: on every rank, one tensor after the other,
    each gathered when it is asked for. Every rank has to read to the end."""
    for names, value in _tensors(model):
        full = whole(value)
        for name in names:
            yield name, full
        del full


def snapshot(model: nn.Module, group: Any) -> Iterator[tuple[str, Tensor]]:
    """As `stream`, of the weights at the time of the call and on the first rank alone, in host memory. Of a model with adapters
    without the weights that are not trained.

    Ranks of the first group of shards keep copies of their parts. Each sends them as it reads to the end, which it has to, over
    `group`: a group of all ranks for CPU tensors, which nothing else uses meanwhile.
    """
    rank, adapted = torch.distributed.get_rank(), unwrap(model) is not model
    kept: deque[tuple[list[str], torch.Size, int, Tensor]] = deque()
    for names, value in _tensors(model, trained=adapted):
        size = value.device_mesh.size(-1) if hasattr(value, "device_mesh") else 1
        if rank < size:
            kept.append((names, value.shape, size, local(value).to("cpu", copy=True).contiguous()))

    def read() -> Iterator[tuple[str, Tensor]]:
        while kept:
            names, shape, size, own = kept.popleft()
            if rank > 0:
                if own.numel():
                    torch.distributed.send(_bytes(own), 0, group)
                continue
            full = own if size == 1 else own.new_empty(shape)
            # in as many parts as there are ranks, or fewer where there are fewer rows
            for number, part in enumerate(full.chunk(size) if size > 1 else ()):
                if number == 0:
                    part.copy_(own)
                else:
                    torch.distributed.recv(_bytes(part), number, group)
            del own
            for name in names:
                yield name, full
            del full

    return read()


def pieces(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The tensors in groups of at most `PIECE_BYTES`, or of one layer; a group is emptied when the next is asked for.

    A layer stays together, because files and engines may have one tensor for several of its own.
    """
    piece: dict[str, Tensor] = {}
    layer: list[tuple[str, Tensor]] = []

    def size(tensors: Iterable[Tensor]) -> int:
        # tied ones are the same object
        return sum({id(one): one.nbytes for one in tensors}.values())

    def unit(name: str, tensor: Tensor) -> object:
        found = re.match(r".*?\.\d+\.", name)
        return found[0] if found else id(tensor)

    for _, tensors in groupby(weights, lambda named: unit(*named)):
        layer += tensors
        if piece and size([*piece.values(), *(tensor for _, tensor in layer)]) > PIECE_BYTES:
            yield piece
            piece.clear()
        piece.update(layer)
        layer.clear()
    if piece:
        yield piece


def _tensors(model: nn.Module, *, trained: bool = False) -> list[tuple[list[str], Tensor]]:
    """The tensors of the state dict, each with its names, of which a tied one has several; `trained`: without parameters that
    are not."""
    names: dict[Tensor, list[str]] = {}
    # shards take the place of what is gathered; the parameters themselves, for of tied ones each name has the same
    for name, value in model.state_dict(keep_vars=True).items():
        if not (trained and isinstance(value, nn.Parameter) and not value.requires_grad):
            names.setdefault(value, []).append(name)
    return [(tied, value.detach()) for value, tied in names.items()]


def _bytes(value: Tensor) -> Tensor:
    """The memory of a contiguous tensor, in a type that every transport takes."""
    return value.view(-1).view(torch.uint8)
