"""Log-probabilities that two engines with the same weights must agree on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Probe:
    """Sequences with the trainer's own log-probabilities: at temperature 1, over every row of the head, padding included."""

    token_ids: tuple[Tensor, ...]
    """Of [L] int64, L at least 2."""
    logprob: tuple[Tensor, ...]
    """Of [L - 1]: of each token but the first, given those before it. NaN: not compared."""

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprob):
            raise ValueError(f"{len(self.token_ids)} sequences and {len(self.logprob)} rows of log-probabilities")
        for ids, logprob in zip(self.token_ids, self.logprob, strict=True):
            if ids.numel() < 2 or logprob.shape != (ids.numel() - 1,):
                raise ValueError(f"{ids.numel()} tokens and log-probabilities of shape {tuple(logprob.shape)}")

    @property
    def num_compared(self) -> int:
        """Tokens whose log-probability is there."""
        return sum(int((~logprob.isnan()).sum()) for logprob in self.logprob)

    def first(self, num_tokens: int, longest: int) -> Probe:
        """The sequences from the start until `num_tokens` are compared, each cut to its first `longest` tokens."""
        ids, logprob, found = [], [], 0
        for row, values in zip(self.token_ids, self.logprob, strict=True):
            if found >= num_tokens or longest < 2:
                break
            ids.append(row[:longest])
            logprob.append(values[: longest - 1])
            found += int((~logprob[-1].isnan()).sum())
        return Probe(tuple(ids), tuple(logprob))
