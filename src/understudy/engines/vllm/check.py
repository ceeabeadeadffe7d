"""Whether servers have the weights that were pushed: their log-probabilities of some sequences, against the trainer's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from understudy.engines.base import Probe, Weights
from understudy.engines.vllm.servers import Servers
from understudy.errors import EngineError
from understudy.lazy import Tensor, torch

MAX_STILL = 3
"""Pushes in a row that change weights and no number of a server. One may be too small to show, but three add up."""
MIN_MOVABLE = 16
"""Tokens whose log-probability must stay the same before that means anything."""
PIECE = 2**24
"""Numbers of a tensor that are summed at a time, because a sum of integers copies them to 64 bits."""
CERTAIN = -1e-3
"""Nats: a log-probability above this may round to the same number whatever is learnt."""


class DisagreesError(EngineError):
    """Log-probabilities are not the trainer's."""


@dataclass(eq=False)
class PushCheck:
    """Detects a push that did not arrive, by either of two signs.

    The server's log-probabilities differ from the trainer's by more than `tolerance` nats on average. At the learning rates
    of 16-bit training one lost push changes less than that, hence the second sign: the weights changed, and yet the server's
    log-probabilities of the sequences of the last comparison are the same to the last bit, several times in a row. Nothing
    else may be asked meanwhile, because what is computed beside a request changes its last bits.
    """

    servers: Servers
    dtype: torch.dtype
    """The engine's."""
    tolerance: float
    num_tokens: int
    """The most that are compared."""
    last_gap: float = field(default=math.nan, init=False)
    """The largest mean distance, in nats, of a server's log-probabilities from the trainer's."""
    _checksums: dict[str, int] = field(default_factory=dict, init=False)
    """Checksums of the last weights, by name."""
    _changed: bool = field(default=False, init=False)
    """Whether weights changed since the last comparison."""
    _asked: list[list[int]] = field(default_factory=list, init=False)
    """The sequences of the last comparison."""
    _answers: dict[str, list[list[float]]] = field(default_factory=dict, init=False)
    """The answers to `_asked`, by server."""
    _num_still: dict[str, int] = field(default_factory=dict, init=False)
    """Pushes in a row that moved nothing, by server."""

    def noted(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """The same weights; once all are read, it is known whether they differ from the last ones in the engine's precision."""
        checksums: dict[str, int] = {}
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[self.dtype.itemsize]
        for name, tensor in weights:
            if tensor.is_floating_point():
                # the bits of every number as an integer: equal for equal numbers, and rarely for others
                pieces = tensor.detach().reshape(-1).split(PIECE)
                sums = [piece.to(self.dtype).view(kind).sum(dtype=torch.int64) for piece in pieces]
                checksums[name] = int(torch.stack(sums).sum())
            yield name, tensor
        self._changed |= bool(self._checksums) and checksums != self._checksums
        self._checksums = checksums

    def after_push(self, probe: Probe, version: int) -> float | None:
        """Returns the gap. Raises EngineError for a server that disagrees, and for one in which nothing moves."""
        asked, own = self._choose(probe)
        old = self._asked if self._changed else []
        answers = self.servers.score(old + asked)
        new = {url: rows[len(old) :] for url, rows in answers.items()}
        gap = self._compare(own, new, version)
        for url, rows in answers.items() if old else ():
            movable = sum(value < CERTAIN for row in self._answers[url] for value in row)
            if rows[: len(old)] != self._answers[url]:
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
        self._asked, self._answers, self._changed = asked, new, False
        return gap

    def again(self, probe: Probe, version: int) -> None:
        """Raises DisagreesError if a server no longer has the weights of the last push."""
        asked, own = self._choose(probe)
        self._compare(own, self.servers.score(asked), version)

    def _choose(self, probe: Probe) -> tuple[list[list[int]], Tensor]:
        """The first sequences with enough tokens to compare, cut to what fits, and the trainer's log-probabilities of all."""
        # scoring writes one token, which has to fit too
        longest = (self.servers.facts.max_length or 2**31) - 1
        asked, own = [], torch.empty(0, dtype=torch.float64)
        for ids, logprob in zip(probe.token_ids, probe.logprob, strict=True):
            if int((~own.isnan()).sum()) >= self.num_tokens:
                break
            asked.append(ids[:longest].tolist())
            own = torch.cat([own, logprob[: longest - 1].double()])
        return asked, own

    def _compare(self, own: Tensor, answers: dict[str, list[list[float]]], version: int) -> float | None:
        """Returns the largest gap of all servers, None where there is nothing to compare. Raises DisagreesError."""
        compared = ~own.isnan()
        num_compared = int(compared.sum())
        if num_compared == 0:
            return None
        gaps = {}
        for url, rows in answers.items():
            values = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
            gaps[url] = float((values - own)[compared].abs().mean())
        self.last_gap = max(gaps.values())
        # so written that NaN is an error too
        if not self.last_gap <= self.tolerance:
            each = ", ".join(f"{url}: {gap:.2g}" for url, gap in gaps.items())
            raise DisagreesError(
                f"after the push of version {version} the rollout engine's log-probabilities are not the trainer's: they "
                f"differ by {each} nats on average over {num_compared} tokens, and the precision explains "
                f"{self.tolerance:g}. The weights did not arrive, or a tied output layer kept its old copy, or the engine "
                "computes in another precision (rollout.dtype) or reports another kind of number (its --logprobs-mode)"
            )
        return self.last_gap
