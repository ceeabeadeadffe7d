"""Whether servers have the weights that were pushed to them: by what they say about the same sequences as the trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from understudy.engines.probe import Probe
from understudy.engines.vllm.servers import Servers
from understudy.errors import EngineError

Rows = list[list[float]]

MAX_STILL = 3
"""Pushes in a row that change weights and no number of a server. One may be too small to show; what is learnt adds up."""
MIN_MOVABLE = 16
"""Tokens that have to stay as they are before that means anything."""
PIECE = 2**24
"""Numbers of a tensor that are summed at a time."""
CERTAIN = -1e-3
"""Nats: a log-probability above this may round to the same number whatever is learnt."""


class DisagreesError(EngineError):
    """Log-probabilities are not the trainer's."""


class PushCheck:
    """Two signs of a push that did not arrive.

    The server's log-probabilities are not the trainer's: by more than `tolerance` nats on average. At the learning rates of
    16 bits many pushes together change less than that, so there is another: weights changed, and the server's
    log-probabilities of sequences that it was asked about before are the same to the last bit, several times in a row. Both
    times nothing else is asked, because what is computed beside a request changes its last bits.
    """

    def __init__(self, servers: Servers, dtype: torch.dtype, tolerance: float, num_tokens: int) -> None:
        """`dtype`: the engine's. `num_tokens`: the most that are compared."""
        self._servers = servers
        self._dtype = dtype
        self._tolerance = tolerance
        self._num_tokens = num_tokens
        self._marks: dict[str, int] = {}
        """Of the last weights, by name: the sum of their bits, read as integers."""
        self._changed = False
        """Since the last probe."""
        self._asked: list[list[int]] = []
        self._said: dict[str, Rows] = {}
        """By server, about `_asked`."""
        self._num_still: dict[str, int] = {}
        self.last_gap = float("nan")
        """Nats: the largest mean distance of a server's log-probabilities from the trainer's."""

    def watch(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same weights; whether the engine's precision tells them from the last is noted in passing."""
        marks: dict[str, int] = {}
        for name, tensor in weights:
            if tensor.is_floating_point():
                marks[name] = _sum_of_bits(tensor, self._dtype)
            yield name, tensor
        self._changed |= bool(self._marks) and marks != self._marks
        self._marks = marks

    def after_push(self, probe: Probe, version: int) -> float | None:
        """The gap. Raises EngineError for a server that disagrees, and for one in which nothing moves."""
        chosen = self._choose(probe)
        asked = [row.tolist() for row in chosen.token_ids]
        old = list(self._asked) if self._changed else []
        said = self._servers.score(old + asked)
        again = {url: rows[: len(old)] for url, rows in said.items()}
        now = {url: rows[len(old) :] for url, rows in said.items()}
        gap = self._measure(chosen, now, version)
        if old:
            self._check_moved(again, version)
        self._asked, self._said, self._changed = asked, now, False
        return gap

    def again(self, probe: Probe, version: int) -> None:
        """Raises DisagreesError where the weights of the last push are there no more."""
        chosen = self._choose(probe)
        self._measure(chosen, self._servers.score([row.tolist() for row in chosen.token_ids]), version)

    def _choose(self, probe: Probe) -> Probe:
        facts = self._servers.facts
        longest = (None if facts is None else facts.max_length) or 2**31
        return probe.first(self._num_tokens, longest - 1)

    def _measure(self, chosen: Probe, said: dict[str, Rows], version: int) -> float | None:
        """None where there is nothing to compare."""
        if chosen.num_compared == 0:
            return None
        own = torch.cat([row.double() for row in chosen.logprob])
        there = ~own.isnan()
        gaps = {
            url: float((torch.tensor([value for row in rows for value in row]).double() - own)[there].abs().mean())
            for url, rows in said.items()
        }
        self.last_gap = max(gaps.values())
        if not self.last_gap <= self._tolerance:
            each = ", ".join(f"{url}: {gap:.2g}" for url, gap in gaps.items())
            raise DisagreesError(
                f"after the push of version {version} the rollout engine's log-probabilities are not the trainer's: they "
                f"differ by {each} nats on average over {chosen.num_compared} tokens, and the precision explains "
                f"{self._tolerance:g}. The weights did not arrive, or a tied output layer kept its old copy, or the engine "
                "computes in another precision (rollout.dtype) or reports another kind of number (its --logprobs-mode)"
            )
        return self.last_gap

    def _check_moved(self, again: dict[str, Rows], version: int) -> None:
        for url, rows in again.items():
            movable = sum(value < CERTAIN for row in self._said[url] for value in row)
            if rows != self._said[url]:
                self._num_still[url] = 0
            elif movable >= MIN_MOVABLE:
                self._num_still[url] = self._num_still.get(url, 0) + 1
        still = [url for url, count in self._num_still.items() if count >= MAX_STILL]
        if still:
            raise EngineError(
                f"weights changed in {MAX_STILL} pushes up to version {version}, and {', '.join(still)} gave the same "
                "log-probabilities before and after each, to the last bit: pushes do not arrive there. See that the server "
                "reads the weights that it is sent (rollout.weights), and that train.lr is large enough to change anything"
            )


def _sum_of_bits(tensor: Tensor, dtype: torch.dtype) -> int:
    """In the engine's precision: of the same numbers the same, of others rarely."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    # a sum of integers is made from a copy in 64 bits
    pieces = tensor.detach().reshape(-1).split(PIECE)
    return int(torch.stack([piece.to(dtype).view(kind).sum(dtype=torch.int64) for piece in pieces]).sum())
