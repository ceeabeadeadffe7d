"""Replicas of one server: which is asked next, and which is left alone for a while."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any

from .reply import MAX_WAIT_S


@dataclass
class Counts:
    """Of HTTP requests; bytes are those of bodies."""

    requests: int = 0
    retries: int = 0
    failures: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(eq=False)
class Replica:
    """One address, and how it has done of late."""

    url: str
    in_flight: int = 0
    failures: int = 0
    """In a row."""
    openings: int = 0
    """Of its circuit breaker since the last success; 0: closed."""
    open_until: float = 0.0
    on_trial: bool = False
    counts: Counts = field(default_factory=Counts)


@dataclass(eq=False)
class Turn:
    """Leave to send one request to one replica; what came of it is told once, by `Replicas.settle`."""

    replica: Replica
    trial: bool
    arrived: bool = False
    settled: bool = False


@dataclass
class Asker:
    """What one request remembers of its attempts."""

    pinned: int | None = None
    turns: list[Turn] = field(default_factory=list)
    not_before: dict[str, float] = field(default_factory=dict)
    """By url, where a server asked to wait."""

    @property
    def urls(self) -> list[str]:
        """That were asked, each once."""
        return list(dict.fromkeys(turn.replica.url for turn in self.turns))

    def tried(self, replica: Replica) -> int:
        """How often it was asked."""
        return sum(turn.replica is replica for turn in self.turns)


class Replicas:
    """The ready replica that was asked least by this request, then that with the fewest in flight, then in turn.

    After `break_after` failures in a row a breaker opens for `cool_down_s`; then one trial closes it, or opens it for twice
    as long, at most `MAX_WAIT_S`. It keeps requests away only while another replica can be asked: a single replica and
    a pinned one are always asked, and when all are open the first to be ready is asked by all who wait.
    """

    def __init__(
        self, urls: Sequence[str], *, break_after: int, cool_down_s: float, clock: Callable[[], float]
    ) -> None:
        self._all = [Replica(url) for url in urls]
        self._break_after = break_after
        self._cool_down_s = cool_down_s
        self._clock = clock
        self._lock = Lock()
        self._next = 0

    def take(self, asker: Asker) -> Turn | float:
        """A turn, or the seconds until there may be one."""
        with self._lock:
            now = self._clock()
            among = self._all if asker.pinned is None else [self._all[asker.pinned]]
            from_s = {replica.url: asker.not_before.get(replica.url, now) for replica in among}
            if len(among) > 1:
                for replica in among:
                    if replica.openings:
                        from_s[replica.url] = max(from_s[replica.url], replica.open_until)
            ready = [replica for replica in among if from_s[replica.url] <= now]
            if not ready:
                return min(from_s.values()) - now
            alone = [replica for replica in ready if not replica.on_trial]
            return self._give(self._best(alone or ready, asker), asker)

    def _best(self, ready: list[Replica], asker: Asker) -> Replica:
        def order(replica: Replica) -> tuple[int, int, int]:
            turn = (self._all.index(replica) - self._next) % len(self._all)
            return asker.tried(replica), replica.in_flight, turn

        return min(ready, key=order)

    def _give(self, replica: Replica, asker: Asker) -> Turn:
        self._next = self._all.index(replica) + 1
        turn = Turn(replica, trial=bool(replica.openings) and not replica.on_trial)
        replica.on_trial |= turn.trial
        replica.in_flight += 1
        replica.counts.requests += 1
        replica.counts.retries += bool(asker.turns)
        asker.turns.append(turn)
        return turn

    def arrive(self, turn: Turn, *, sent: int, received: int) -> None:
        """No longer in flight."""
        with self._lock:
            if not turn.arrived:
                turn.arrived = True
                turn.replica.in_flight -= 1
                turn.replica.counts.bytes_sent += sent
                turn.replica.counts.bytes_received += received

    def settle(self, turn: Turn, *, right: bool | None) -> None:
        """Whether the reply was right; None: nobody knows, because it was given up. Only the first word counts."""
        with self._lock:
            if turn.settled:
                return
            turn.settled = True
            replica = turn.replica
            if turn.trial:
                replica.on_trial = False
            if right:
                replica.failures = replica.openings = 0
                replica.on_trial = False
            elif right is False:
                replica.counts.failures += 1
                replica.failures += 1
                # what was sent before a breaker opened says nothing new
                if turn.trial or (not replica.openings and replica.failures >= self._break_after):
                    self._open(replica)

    def _open(self, replica: Replica) -> None:
        replica.openings += 1
        full: float = self._cool_down_s * 2.0 ** min(replica.openings - 1, 60)
        replica.open_until = self._clock() + min(MAX_WAIT_S, full)

    def stats(self) -> dict[str, Any]:
        """`Counts` of all, and of each by its url under "replicas"."""
        with self._lock:
            by_url = {replica.url: asdict(replica.counts) for replica in self._all}
        total = {name: sum(counts[name] for counts in by_url.values()) for name in asdict(Counts())}
        return {**total, "replicas": by_url}
