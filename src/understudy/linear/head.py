"""The output head of a language model: from hidden states to logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LMHead:
    """`logits = softcap(scale * (hidden @ weight.T + bias)) / temperature`, over the first `vocab_size` rows of `weight`.

    `softcap(z) = cap * tanh(z / cap)`; None: the identity. Rows past `vocab_size` are padding of the embedding: they are
    cut off before the softmax and get a zero gradient.

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
        """Size of the vocabulary after the cut."""
        return self.vocab_size or self.weight.shape[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """The definition, differentiable, in the precision of the inputs but never below float32. [T, H] -> [T, V]."""
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, self.weight.dtype), torch.float32)
        z = hidden.to(dtype) @ self.weight[: self.num_tokens].to(dtype).T
        if self.bias is not None:
            z = z + self.bias[: self.num_tokens].to(dtype)
        z = z * self.scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature
