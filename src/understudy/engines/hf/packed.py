"""Products of few rows on a CPU, where generation spends its time: by oneDNN, with weights in the layout that it reads.

`x @ W.T` by MKL, which torch calls for float32, packs all of W again in every call: at 8 rows that is half of its time; under
autocast torch casts all of W again in every call. A copy that was cast and packed once spares both (`benchmarks/generate.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from understudy.lazy import Tensor, nn, torch
from understudy.linear.head import LMHead
from understudy.models import has_bfloat16
from understudy.models.backbone import decoder_of
from understudy.models.parallel import shards_of

MIN_ELEMENTS = 2**17
"""A weight with fewer is multiplied as it is: the call itself takes the time there."""
PACK, MULTIPLY = "_reorder_linear_weight", "_linear_pointwise"
"""Operators that torch.compile uses for inference on a CPU. They are torch's own: without them products stay plain."""
PACK_FROM = 32
"""New tokens from which packed copies pay: to make them takes as long as 15 tokens save."""


@contextmanager
def fast_products(
    model: nn.Module, head: LMHead, dtype: torch.dtype | None = None, autocast: torch.dtype | None = None
) -> Iterator[Callable[[Tensor], Tensor] | None]:
    """Gives the product of float32 rows with the head's weight, [b, H] -> [b, V]; None: the plain one has to do.

    Inside, linear layers multiply by packed copies of their weights, in `autocast` as it would, or in `dtype` (None: their own)
    and return the type of their input; the head's copy is in float32. The copies take the memory of the weights, which must
    not change meanwhile, and nobody else may run the model. A model on a GPU, in shards or in float64 stays as it is.
    """
    if (
        head.weight.device.type != "cpu"
        or head.weight.dtype not in (torch.float32, torch.bfloat16)
        or shards_of(model) is not None
        or not torch.backends.mkldnn.is_available()
        or not all(hasattr(torch.ops.mkldnn, name) for name in (PACK, MULTIPLY))
    ):
        yield None
        return
    layers: list[nn.Linear] = []
    try:
        for layer in decoder_of(model).modules():
            # an instance's own forward is somebody else's
            if type(layer) is nn.Linear and "forward" not in vars(layer):
                copied = autocast or dtype or layer.weight.dtype
                can = copied == torch.float32 or (copied == torch.bfloat16 and has_bfloat16(layer.weight.device))
                if can and layer.weight.numel() >= MIN_ELEMENTS:
                    vars(layer)["forward"] = _packed(layer, copied, keeps_type=autocast is None)
                    layers.append(layer)
        weight = head.weight.detach()[: head.num_tokens]
        if weight.numel() < MIN_ELEMENTS:
            yield None
        else:
            packed = _pack(weight.float())
            yield lambda rows: _multiply(rows, packed, None)
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _packed(layer: nn.Linear, dtype: torch.dtype, *, keeps_type: bool) -> Callable[[Tensor], Tensor]:
    weight = _pack(layer.weight.detach().to(dtype))
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(states: Tensor) -> Tensor:
        found = _multiply(states.to(dtype), weight, bias)
        return found.to(states.dtype) if keeps_type else found

    return forward


def _multiply(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` by oneDNN, whose weight may be packed."""
    product: Tensor = getattr(torch.ops.mkldnn, MULTIPLY)(states, weight, bias, "none", [], "")
    return product


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = getattr(torch.ops.mkldnn, PACK)(weight)
    return packed
