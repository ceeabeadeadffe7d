"""The output head of a language model: from hidden states to logits, and the gradient back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from understudy.lazy import Tensor, torch
from understudy.linear.columns import Columns, Slice, parts

ABSENT = -1e5
"""Logit of an id that is not a token: probability exactly 0, in float64 too, with finite differences."""
TILE_ELEMENTS = 4 * 1024 * 1024
"""Weights of a 16-bit head that are upcast at a time: 16 MiB in float32."""
PRODUCT_ELEMENTS = 64 * 1024 * 1024
"""Entries of d weight that tensor cores form at a time: 256 MiB in float32."""


@dataclass(frozen=True, eq=False)
class LMHead:
    """`logits = softcap(scale * (hidden @ weight.T + bias)) / temperature`, over the first `vocab_size` rows of `weight`.

    `softcap(z) = cap * tanh(z / cap)`; None: the identity. Rows past `vocab_size` are padding of the embedding: they are
    cut off before the softmax and get a zero gradient. Ids in `absent` are not tokens either: their logits are `ABSENT`, which
    gives them probability 0 and no gradient, like a logit of -inf from a bias that masks a token.

    Raises ValueError for shapes that do not fit and for a temperature, scale or cap that is not positive.
    """

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None = None
    """[V]"""
    softcap: float | None = None
    scale: float = 1.0
    temperature: float = 1.0
    vocab_size: int | None = None
    absent: Tensor | None = None
    """[A] ids below `vocab_size`."""
    slice: Slice | None = None
    """Which rows these are of a vocabulary sharded over ranks; see `cut`."""

    def __post_init__(self) -> None:
        rows = self.weight.shape[0]
        if self.weight.dim() != 2 or (self.bias is not None and self.bias.shape != (rows,)):
            raise ValueError("LMHead needs weight [V, H] and bias [V]")
        if self.vocab_size is not None and not 0 < self.vocab_size <= rows:
            raise ValueError(f"LMHead.vocab_size is {self.vocab_size}; the weight has {rows} rows")
        if min(self.scale, self.temperature, 1.0 if self.softcap is None else self.softcap) <= 0:
            raise ValueError("LMHead: scale, temperature and softcap must be positive")

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary without padding; of the slice, if the head is sliced."""
        return self.vocab_size or self.weight.shape[0]

    def cut(self, part: Slice, num_tokens: int) -> LMHead:
        """The head over `num_tokens` of its tokens, starting at `part.start`.

        Raises ValueError for a part of another vocabulary, and if a rank would have no token.
        """
        if part.size != self.num_tokens or not 0 < num_tokens <= self.num_tokens - part.start:
            raise ValueError(
                f"tokens {part.start} to {part.start + num_tokens - 1} of {part.size} are no part of a vocabulary of "
                f"{self.num_tokens}"
            )
        rows, absent = slice(part.start, part.start + num_tokens), self.absent
        if absent is not None:
            absent = absent[(absent >= rows.start) & (absent < rows.stop)] - rows.start
        bias = None if self.bias is None else self.bias[rows]
        return replace(self, weight=self.weight[rows], bias=bias, vocab_size=None, absent=absent, slice=part)

    @property
    def excludes(self) -> bool:
        """Whether the head may give a token probability 0."""
        return self.bias is not None or self.absent is not None

    def logits(self, hidden: Tensor) -> Tensor:
        """The definition, differentiable, in the precision of the inputs but never below float32. [T, H] -> [T, V]."""
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, self.weight.dtype), torch.float32)
        z = hidden.to(dtype) @ self.weight[: self.num_tokens].to(dtype).T
        if self.bias is not None:
            z = z + self.bias[: self.num_tokens].to(dtype)
        z = z * self.scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        z = z / self.temperature
        if self.bias is not None:
            z = z.clamp_min(ABSENT)
        return z if self.absent is None else z.index_fill(-1, self.absent, ABSENT)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """float32 for anything up to float32, float64 for float64: the only place where logits are upcast."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _tiles(head: LMHead, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head's rows in `dtype`, upcast tile by tile if needed, so that no float32 copy of the head exists."""
    weight = head.weight.detach()[: head.num_tokens]
    rows = head.num_tokens if weight.dtype == dtype else max(1, TILE_ELEMENTS // weight.shape[1])
    for part in parts(head.num_tokens, rows):
        yield part, weight[part].to(dtype)


def has_tensor_cores(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the device multiplies bf16 matrices with float32 accumulation: NVIDIA GPUs from Ampere on."""
    if not (hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16):
        return False
    return torch.version.hip is None and torch.cuda.is_bf16_supported(including_emulation=False)


def multiply_bfloat16(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`a @ b` of bf16 matrices, accumulated in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if out is None else torch.mm(a, b, out_dtype=torch.float32, out=out)


def project(
    hidden: Tensor, head: LMHead, out: Tensor | None = None, multiply: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """`LMHead.logits` without gradient, into `out`. [C, H] -> [C, V] in the precision of `out`, or `compute_dtype`.

    `multiply`: the product with the first `num_tokens` rows of the weight, in place of the plain one and of `out`.
    """
    dtype = compute_dtype(hidden) if out is None else out.dtype
    if multiply is not None:
        z = multiply(hidden.to(dtype))
    else:
        z = hidden.new_empty(hidden.shape[0], head.num_tokens, dtype=dtype) if out is None else out
        if has_tensor_cores(hidden, head.weight):
            multiply_bfloat16(hidden, head.weight.detach()[: head.num_tokens].T, out=z)
        else:
            states = hidden.to(dtype)
            for part, weight in _tiles(head, dtype):
                torch.mm(states, weight.T, out=z[:, part]) if weight.shape[0] == z.shape[1] else z[:, part].copy_(
                    states @ weight.T
                )
    if head.bias is not None:
        z.add_(head.bias.detach()[: head.num_tokens].to(z.dtype))
    if head.scale != 1.0:
        z.mul_(head.scale)
    if head.softcap is not None:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    if head.temperature != 1.0:
        z.div_(head.temperature)
    if head.bias is not None:
        z.clamp_(min=ABSENT)
    if head.absent is not None:
        z.index_fill_(-1, head.absent, ABSENT)
    return z


class Gradients:
    """Gradients of hidden states, weight and bias, summed over chunks in float32 or float64; only those that are needed."""

    def __init__(self, head: LMHead, hidden: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool) -> None:
        self._head = head
        dtype = compute_dtype(hidden)
        self.wanted = need_hidden or need_weight or need_bias
        self._hidden = torch.zeros_like(hidden) if need_hidden else None
        self._weight = torch.zeros_like(head.weight, dtype=dtype) if need_weight else None
        self._bias = torch.zeros_like(head.bias, dtype=dtype) if need_bias and head.bias is not None else None

    def add(self, index: Tensor, states: Tensor, logits_grad: Tensor, columns: Columns) -> None:
        """`d hidden = dZ W`, `d weight += dZ^T X`, `d bias += sum dZ`. [own], [C, H], [C, V]."""
        if columns.slice is None and has_tensor_cores(states, self._head.weight):
            self._add_bfloat16(index, states, logits_grad)
        else:
            states = states.to(logits_grad.dtype)
            if self._hidden is not None:
                grad = torch.zeros_like(states)
                for part, weight in _tiles(self._head, states.dtype):
                    grad.addmm_(logits_grad[:, part], weight)
                self._hidden[index] = columns.own(columns.sum(grad)).to(self._hidden.dtype)
            if self._weight is not None:
                self._weight[: self._head.num_tokens].addmm_(logits_grad.T, states)
        if self._bias is not None:
            self._bias[: self._head.num_tokens] += logits_grad.sum(0)

    def _add_bfloat16(self, index: Tensor, states: Tensor, logits_grad: Tensor) -> None:
        # two bf16 numbers, the second the rounding error of the first, hold a float32 to 2^-17; one product takes both
        high = logits_grad.to(torch.bfloat16)
        both = torch.cat([high, (logits_grad - high).to(torch.bfloat16)])
        if self._hidden is not None:
            weight = self._head.weight.detach()[: self._head.num_tokens]
            high_part, low_part = multiply_bfloat16(both, weight).chunk(2)
            self._hidden[index] = high_part.add_(low_part).to(self._hidden.dtype)
        if self._weight is not None:
            twice = torch.cat([states, states])
            # in tiles, because a product of bf16 matrices cannot be added to a float32 matrix in place
            for tile in parts(self._head.num_tokens, max(1, PRODUCT_ELEMENTS // states.shape[1])):
                self._weight[tile] += multiply_bfloat16(both[:, tile].T, twice)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of hidden, weight and bias in the types of their inputs."""
        weight, bias = self._head.weight, self._head.bias
        return (
            self._hidden,
            None if self._weight is None else self._weight.to(weight.dtype),
            None if self._bias is None or bias is None else self._bias.to(bias.dtype),
        )
